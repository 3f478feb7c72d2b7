"""Guidance: its formula, per sample, in an interval, by a second network, in teachers and in their own sampling."""

import pytest
import torch

from sclightning.adapters import Guided, guided_velocity
from sclightning.modules import ConsistencyDistillation, TrigFlowDiffusion
from sclightning.modules.consistency import load_backbone
from sclightning.provenance import recorded
from sclightning.sampling import heun, karras_times, sample_noise

SD = 0.75
T = torch.linspace(0.1, 1.5, 8)


def expand(s):
    return s[:, None, None, None]


def test_interval_is_guided_inside_and_conditional_outside(make_net, batch):
    """Per sample, with the lower end excluded and the upper included."""
    net, (x, label) = make_net(), batch
    F_c, F_0 = net(x, T, label), net(x, T)
    F = guided_velocity(net, x, T, label, 3.0, interval=(T[2].item(), T[5].item()))
    inside = torch.tensor([False, False, False, True, True, True, False, False])
    torch.testing.assert_close(F[inside], (F_0 + 3 * (F_c - F_0))[inside])
    assert torch.equal(F[~inside], (F_0 + (F_c - F_0))[~inside])


def test_autoguidance_by_hand(make_net, batch):
    """F_guide + s (F - F_guide), the guide with the same label, or with none, and without labels at all."""
    net, guide, (x, label), s = make_net(), make_net(seed=3), batch, torch.linspace(0, 3, 8)
    F, F_c, F_0 = net(x, T, label), guide(x, T, label), guide(x, T)
    torch.testing.assert_close(guided_velocity(net, x, T, label, s, guide=guide), F_c + expand(s) * (F - F_c))
    torch.testing.assert_close(
        guided_velocity(net, x, T, label, s, guide=guide, guide_label=False), F_0 + expand(s) * (F - F_0)
    )
    torch.testing.assert_close(guided_velocity(net, x, T, None, 2.0, guide=guide), F_0 + 2 * (net(x, T) - F_0))
    with pytest.raises(ValueError, match="needs labels to leave out"):
        guided_velocity(net, x, T, None, 2.0)


def test_guided_network(make_net, batch):
    """The scale of the call, else its own; the guide is frozen and both provenances are kept."""
    net, guide, (x, label), s = make_net(), make_net(seed=3), batch, torch.linspace(0, 3, 8)
    net.provenance, guide.provenance = {"name": "net"}, {"name": "guide"}
    guided = Guided(net, scale=1.5, interval=(0.4, 1.2), guide=guide.train())
    expected = guided_velocity(net, x, T, label, 1.5, (0.4, 1.2), guide)
    assert torch.equal(guided(x, T, label), expected)
    assert torch.equal(guided(x, T, label, s), guided_velocity(net, x, T, label, s, (0.4, 1.2), guide))
    assert not guide.training and not any(p.requires_grad for p in guide.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert recorded(guided) == [{"name": "net"}, {"name": "guide"}]
    del net.provenance
    assert recorded(guided) == [{"name": "guide"}]
    with pytest.raises(ValueError, match="no scale"):
        Guided(net)(x, T, label)
    with pytest.raises(ValueError, match=r"interval .* is empty"):
        Guided(net, interval=(1.2, 0.4))


@pytest.mark.parametrize("labelled", [True, False])
def test_teacher_samples_with_its_own_guidance(make_net, labelled):
    """The diffusion module's scale goes to a guided backbone, interval and guide included; without, its own scale."""
    net, guide, label = make_net(), make_net(seed=3), torch.tensor([3, 1, 4]) if labelled else None
    noise = sample_noise([0, 1, 2], (1, 8, 8), 1)[0]
    guided = Guided(net, scale=2.5, interval=(0.3, 1.3), guide=guide)
    for scale in (None, 1.5):
        module = TrigFlowDiffusion(guided, sigma_data=SD, steps=4, guidance_scale=scale)

        def F(x, t, s=scale or 2.5):
            return guided_velocity(net, x, t, label, s, (0.3, 1.3), guide)

        expected = heun(F, noise, karras_times(4, SD), SD).float()
        torch.testing.assert_close(module.sample([0, 1, 2], (1, 8, 8), label), expected, rtol=1e-4, atol=1e-4)


def test_distillation_of_a_guided_teacher(make_net, batch):
    """One scale per sample where the student is told it, the teacher's fixed one where it is not."""
    net, guide, (x_0, label) = make_net(seed=5), make_net(seed=6), batch
    s = torch.linspace(1, 2, 8)
    teacher = Guided(net, scale=1.7, interval=(0.3, 1.3), guide=guide)
    fixed = ConsistencyDistillation(make_net(), teacher=teacher, sigma_data=SD)
    told = ConsistencyDistillation(make_net(guidance=True), teacher=teacher, guidance_range=(1, 2), sigma_data=SD)
    for module, scale, guidance in ((fixed, 1.7, None), (told, s, s)):
        expected = SD * guided_velocity(net, x_0 / SD, T, label, scale, (0.3, 1.3), guide)
        found = module.velocity(x_0, x_0, x_0, T, label, guidance)
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad


def test_checkpoint_fills_the_network_inside_the_guidance(make_net, tmp_path):
    """``teacher_checkpoint`` means the guided network; ``load_backbone`` makes a guide of another run's."""
    source = make_net(seed=9)
    path = str(tmp_path / "teacher.ckpt")
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in source.state_dict().items()}}, path)
    guide = load_backbone(make_net(seed=2), path)
    module = ConsistencyDistillation(make_net(), path, teacher=Guided(make_net(seed=1), scale=2.0, guide=guide))
    module._trainer = type("Trainer", (), {"datamodule": None})()
    module.setup("fit")
    for network in (module.backbone, module.teacher.network, module.teacher.guide):
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in network.state_dict().items())
