"""Learning rates at the paper's numbers."""

import math

import pytest
import torch

from sclightning.schedules import InverseSqrtLR


def rates(steps, lr=1e-2, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr)
    schedule = InverseSqrtLR(optimizer, **options)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


def test_power_law():
    lr = rates(401, t_ref=100)
    assert lr[0] == lr[100] == 1e-2
    assert lr[400] == pytest.approx(5e-3) and lr[200] == pytest.approx(1e-2 / math.sqrt(2))


def test_constant():
    assert rates(50, lr=1e-4) == [1e-4] * 50


def test_ramp():
    lr = rates(41, t_ref=20, ramp_steps=10)
    assert lr[0] == 0 and lr[5] == pytest.approx(5e-3) and lr[10] == lr[20] == 1e-2
    assert lr[40] == pytest.approx(1e-2 / math.sqrt(2))


def test_edm2_s_on_imagenet_512():
    """α_ref 0.01, t_ref 70,000, ramp of 10 million images at batch 2048 (Table 5)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 0.01)
    schedule = InverseSqrtLR(optimizer, t_ref=70_000, ramp_steps=4_883)
    assert schedule.factor(70_000) == 1
    assert 0.01 * schedule.factor(2**20) == pytest.approx(0.01 / math.sqrt(2**20 / 70_000))


def test_resuming_continues():
    def run(optimizer, schedule, steps):
        for _ in range(steps):
            optimizer.step()
            schedule.step()
        return optimizer.param_groups[0]["lr"]

    def fresh():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 1e-2)
        return optimizer, InverseSqrtLR(optimizer, t_ref=5, ramp_steps=3)

    whole = run(*fresh(), 20)
    optimizer, schedule = fresh()
    run(optimizer, schedule, 11)
    second, resumed = fresh()
    second.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert run(second, resumed, 9) == whole


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match="t_ref must be above 0"):
        rates(1, t_ref=0)
    with pytest.raises(ValueError, match="ramp_steps=-1"):
        rates(1, ramp_steps=-1)
