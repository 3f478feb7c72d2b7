"""The README says what the files of this tree say."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_links_lead_somewhere():
    """Every relative link and picture of the README is a file or folder."""
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", README) if not t.startswith("http")]
    assert len(targets) > 5
    for target in targets:
        assert (ROOT / target).exists(), target


def test_demo_table_is_the_recorded_run():
    """The demo's table holds the distances and evaluations of benchmarks/results/demo.json."""
    figures = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (\d+|-) \| ([\d.]+) \|", README, flags=re.MULTILINE)
    assert {name for name, _, _ in rows} == figures.keys() - {"seconds", "machine", "versions"}
    for name, nfe, distance in rows:
        assert nfe == str(figures[name]["nfe"] or "-")
        assert distance == f"{figures[name]['fd']:.2f}"
        ratio, seen = figures[name]["fd"] / figures["teacher"]["fd"], figures[name]["fd_training_half"]
        assert f"| {distance} | {ratio:.2f} | {seen:.2f} |" in README
    assert f"{figures['seconds']:.0f} seconds" in README
    text = " ".join(README.split())
    unseen, seen = (
        [figures[name][key] / figures["teacher"][key] for name in ("scd_2step", "sct_2step")]
        for key in ("fd", "fd_training_half")
    )
    assert f"within {unseen[0]:.2f} (sCD) and {unseen[1]:.2f} (sCT) of its distance" in text
    assert f"they stand at {seen[0]:.2f} and {seen[1]:.2f}" in text


def test_attention_table_is_the_recorded_run():
    """The attention tables hold the medians of benchmarks/results/jvp_attention.json, a column for each backend."""
    results = json.loads((ROOT / "benchmarks/results/jvp_attention.json").read_text())["results"]
    cuda_page = (ROOT / "docs/cuda.md").read_text()
    for result in results:
        row = [", ".join(map(str, result["shape"])) + ", cosine" * (result["op"] == "cosine_attention")]
        same = [r for r in results if (r["op"], r["shape"]) == (result["op"], result["shape"])]
        ms = {r["backend"]: f"{r['ours_ms']:.3g}" for r in same}
        row += [ms.get("cuda", "-"), ms["triton"], f"{result['floor_ms']:.3g}"]
        peers = {name: f"{peer:.3g}" for one in same for name, peer in one["peers_ms"].items()}
        naive = peers.get("torch.compile(naive torch.func.jvp)", peers["naive torch.func.jvp"])
        assert f"| {' | '.join([*row, peers.get('jvp-flash-attention', '-'), naive])} |" in README
        if result["backend"] == "cuda":
            assert f"| {' | '.join(row)} | {result['ours_ms'] / result['floor_ms']:.2f} |" in cuda_page


def test_costs_are_the_recorded_runs():
    """What the paper's networks and their steps cost is what networks.json and training_step.json say."""
    results = ROOT / "benchmarks/results"
    networks, steps = (
        json.loads((results / f"{name}.json").read_text())["networks"] for name in ("networks", "training_step")
    )
    kinds, page = ("diffusion", "sct", "scd"), (ROOT / "docs/scaling.md").read_text()
    label = {name: name.upper().replace("EDM2_", "EDM2-") for name in networks | steps}
    label |= {"ddpmpp": "DDPM++, CIFAR-10", "dit_xl": "DiT-XL/2's size"}
    ms, peaks = {}, {}
    for name, step in steps.items():
        ms[name] = [step["compiled"][kind]["ms"] for kind in kinds]
        peaks[name] = ", ".join(f"{step['compiled'][kind]['peak_gb']:.1f}" for kind in kinds)
        row = f"| {label[name]}, {step['batch']} | {ms[name][0]:.1f} ms | "
        row += " | ".join(f"{x:.1f} ms = {x / ms[name][0]:.2f} ×" for x in ms[name][1:])
        share = ", ".join(f"{100 * step['ceiling_fraction'][kind]:.0f}" for kind in kinds)
        assert f"{row} | {peaks[name]} GB | {share} % |" in page, name
    eager = [f"{steps[name]['eager']['scd']['ms']:.0f}" for name in ("edm2_s", "edm2_m", "ddpmpp", "dit_xl")]
    assert f"Ours, eager as well, take {', '.join(eager[:3])} and {eager[3]} ms" in page
    for name, found in networks.items():
        state = found["state_gb"]["scd"]
        row = f"| {label[name]} | {found['parameters'] / 1e6:.0f} M | {found['forward_gflop']:.0f}"
        row += f" | {found['activations_mb']:.0f} | {state['1']:.1f} | {state['8']:.1f}"
        step = f"{', '.join(f'{x:.0f}' for x in ms[name])} | {peaks[name]}" if name in steps else "- | -"
        assert f"{row} | {step} |" in README, name
    small = steps["edm2_s"]
    two = small["trainer_2_devices"]["scd"]
    each = " and ".join(f"{found['ms']:.1f}" for found in two["alone"])
    said = f"took {two['ms']:.1f} ms for a step of sCD-S with {two['batch']} images each, where each by itself, under"
    said += f" the same Trainer and at the same time as the other, took {each}: together they do"
    assert f"{said} {100 * small['scaling_efficiency_2']:.1f} % of the images" in " ".join(page.split())
    text = f"{small['scd_over_diffusion']:.2f} (sCD) and {small['sct_over_diffusion']:.2f} (sCT) diffusion steps"
    peers = f"sCD the peers' way {small['peers_scd_ms'] / small['diffusion_ms']:.2f} "
    assert text in (words := " ".join(README.split())) and peers in words


def test_fashion_mnist_tables_are_the_recorded_runs():
    """docs/fashion_mnist.md has both budgets of benchmarks/results/fashion_mnist.json, the README the full one."""
    results = json.loads((ROOT / "benchmarks/results/fashion_mnist.json").read_text())
    floor, page = results["floor"], " ".join((ROOT / "docs/fashion_mnist.md").read_text().split())
    for budget, text in (("sprint", page), ("full", README)):
        rows = {name: row for name, row in results[budget].items() if "nfe" in row}
        mean = {name: sum(row["fd"]) / len(row["fd"]) for name, row in rows.items()}
        assert len(rows) == 5
        for name, found in rows.items():
            kind = {"teacher": "teacher, Heun", "scd": "sCD", "sct": "sCT"}[name.split("_")[0]]
            ratio, rate = f"{mean[name]:.3f} | {mean[name] / mean['teacher']:.2f}", f"{found['images_per_second']:,.0f}"
            each = " ".join(f"{fd:.3f}" for fd in found["fd"])
            seconds, start = f"{found['train_seconds']:.0f}", f"{found['startup_seconds']:.0f}"
            more = f"{mean[name] / floor:.2f} | {seconds} | {start} | {rate} | {each}"
            assert f"| {kind} | {found['nfe']} | {ratio} | {more} |" in page
            if text is README:
                assert f"| {kind} | {found['nfe']} | {ratio} | {seconds} | {rate} |" in text
        minutes = sum(run["train_seconds"] + run["startup_seconds"] for run in results[budget]["runs"]) / 60
        models = {3: "three", 9: "nine"}[len(results[budget]["runs"])]
        assert f"Training and start of the {models} models took {minutes:.0f} GPU minutes" in " ".join(text.split())
    assert f"| test images | - | {floor:.3f} | {floor / mean['teacher']:.2f} |" in README
    assert found["seeds"] == [2] and "a model, seed 2:" in README


def test_grain_is_the_recorded_run():
    """What docs/fashion_mnist.md says of grain is what benchmarks/results/fashion_mnist_grain.json says."""
    rows = json.loads((ROOT / "benchmarks/results/fashion_mnist_grain.json").read_text())["rows"]
    two, one, *sct, teacher = (
        rows[name]["fd_black"] for name in ("scd_2step", "scd_1step", "sct_2step", "sct_1step", "teacher")
    )
    said = f"{two:.3f} (sCD, 2 steps), {one:.3f} (1 step) and {teacher:.3f} (teacher), {two / teacher:.2f} and"
    said += f" {one / teacher:.2f} times, those of sCT at {' and '.join(f'{x / teacher:.2f}' for x in sct)} times"
    assert said in " ".join((ROOT / "docs/fashion_mnist.md").read_text().split())


def test_search_table_is_the_recorded_runs():
    """Every setting of benchmarks/results/search.json has its row in docs/fashion_mnist.md."""
    page = (ROOT / "docs/fashion_mnist.md").read_text()
    for found in json.loads((ROOT / "benchmarks/results/search.json").read_text()).values():
        distances = [
            found["fd_teacher"],
            found["fd_1step"],
            *(found["fd_2step"][time] for time in ("1.3", "1.1", "0.9", "0.7")),
        ]
        assert f"| {' | '.join(f'{fd:.3f}' for fd in distances)} |" in page


def test_high_noise_table_is_the_recorded_run():
    """docs/fashion_mnist.md has what benchmarks/results/fashion_mnist_high_noise.json says of the teacher."""
    rows = json.loads((ROOT / "benchmarks/results/fashion_mnist_high_noise.json").read_text())["rows"]
    page = (ROOT / "docs/fashion_mnist.md").read_text()
    assert "| noise level | " + " | ".join(f"{row['sigma']:g}" for row in rows) + " |" in page
    labels = {"images": "training images that count", "slope": "slope of", "error": "mean square of the teacher's"}
    for key, label in (labels | {"spread": "mean square of what the exact"}).items():
        values = " | ".join(f"{row[key]:.0f}" if key == "images" else f"{row[key]:.2f}" for row in rows)
        assert re.search(rf"^\| {label}[^|]* \| {re.escape(values)} \|$", page, flags=re.MULTILINE), key
