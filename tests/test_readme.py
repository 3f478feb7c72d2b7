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
    """The attention table holds the medians of benchmarks/results/jvp_attention.json."""
    results = json.loads((ROOT / "benchmarks/results/jvp_attention.json").read_text())["results"]
    for result in (r for r in results if r["op"] == "jvp_attention"):
        shape = ", ".join(map(str, result["shape"]))
        assert f"| {shape} | {result['ours_ms']:.3g} | {result['floor_ms']:.3g} |" in README
