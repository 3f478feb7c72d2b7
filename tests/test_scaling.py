"""benchmarks/scaling.py: the plan of a run against sums by hand, and the table of the docs against the script."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import allreduce  # noqa: E402
from scaling import NETWORKS, Cluster, Run, largest_block, step, table  # noqa: E402

XXL = json.loads(NETWORKS.read_text())["networks"]["edm2_xxl"]
P = XXL["parameters"]
IDEAL = Cluster(half_batch=0, eager=1, hbm=1e9, intra=1e9, inter=1e9, memory=1e9)


def test_ideal_machine_takes_the_flops_of_the_run():
    """Without overheads the GPU-hours are FLOPs over speed, on any number of devices; the batch is never split."""
    run = Run()
    hours = run.iterations * run.batch * 6 * XXL["forward_gflop"] / 452e3 / 3600
    for devices in (1, 8, 1024):
        for strategy in ("ddp", "fsdp"):
            found = step(strategy, devices, run, IDEAL)
            assert found.gpu_hours == pytest.approx(hours, rel=1e-3) and found.efficiency == pytest.approx(1, abs=1e-3)
            assert found.micro_batch * found.accumulate * devices == 2048


def test_ddp_by_hand():
    """Sixteen devices of two nodes: state, one all-reduce over the slower of two links, the update from memory."""
    cluster = Cluster(intra=300, inter=20, half_batch=2, tflops=400, hbm=4, memory=141, node=8)
    found = step("ddp", 16, Run(limit=32), cluster)
    assert (found.micro_batch, found.accumulate) == (32, 4)
    assert found.memory_gb == pytest.approx(26 * P / 1e9 + 32 * XXL["activations_mb"] / 1e3)
    assert found.sent_gb == pytest.approx(8 * P * 15 / 16 / 1e9)
    assert found.communication_s == pytest.approx(found.sent_gb / 160)
    assert found.compute_s == pytest.approx(128 * 6 * XXL["forward_gflop"] / 400e3 * (1 + 2 / 32))
    assert found.update_s == pytest.approx(48 * P / 4e12)
    assert found.step_s == pytest.approx(found.compute_s + found.communication_s + found.update_s)


def test_fsdp_by_hand():
    """The state is shared out, the collectives come at each micro-batch and hide behind the computation."""
    found = step("fsdp", 8, Run(limit=16), Cluster())
    assert found.accumulate == 16
    assert found.memory_gb == pytest.approx((24 * P / 8 + 8 * largest_block("edm2_xxl")) / 1e9 + 16 * 0.599, rel=1e-3)
    assert found.sent_gb == pytest.approx(16 * 20 * P * 7 / 8 / 1e9)
    assert found.step_s == pytest.approx(found.compute_s + found.update_s)
    slow = step("fsdp", 8, Run(limit=16), Cluster(intra=1))
    assert slow.step_s == pytest.approx(slow.communication_s + slow.update_s)


def test_what_does_not_fit_is_said():
    """37 GB of state need more than 30 GB; FSDP2 on eight devices does not."""
    small = Cluster(memory=30)
    assert step("ddp", 8, Run(), small) is None and step("fsdp", 8, Run(), small).memory_gb <= 30
    assert "does not fit" in table(Run(), small, [8])
    assert step("ddp", 8, replace(Run(), teachers=0), Cluster(memory=80)).memory_gb < 80


def test_defaults_are_the_recorded_runs():
    """Speeds of the compiled and the eager sCD step of EDM2-S, and of copies in memory, are those in results/."""
    names = ("training_step", "training_step_h100", "jvp_attention")
    step_times, eager, attention = (json.loads((NETWORKS.parent / f"{name}.json").read_text()) for name in names)
    assert Cluster().tflops == round(step_times["networks"]["edm2_s"]["tflop_s"]["scd"])
    found = eager["networks"]["edm2_s"]
    assert Cluster().eager == round(found["eager"]["scd"]["ms"] / found["scd_ms"], 2)
    assert Cluster().intra == round(json.loads((NETWORKS.parent / "allreduce.json").read_text())["bus_gb_s"])
    assert Cluster().hbm == round(attention["limits"]["copy_tb_s"], 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo")
def test_allreduce_is_measured(tmp_path, monkeypatch):
    """Two processes on the CPU: bytes over time, by NCCL's rule; too few repeats are refused."""
    out = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["allreduce.py", "--out", str(out), "--megabytes", "1", "--repeats", "4"])
    allreduce.main()
    found = json.loads(out.read_text())
    assert (found["devices"], found["backend"], found["megabytes"]) == (2, "gloo", 1) and found["bus_gb_s"] > 0
    monkeypatch.setattr("sys.argv", ["allreduce.py", "--repeats", "2"])
    with pytest.raises(SystemExit):
        allreduce.main()


def test_the_docs_have_the_table_that_the_script_prints():
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert table(Run(), Cluster(), [8, 16, 32, 64, 128, 256, 512, 1024]) in page
