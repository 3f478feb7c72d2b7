"""EDM2: the paper's sizes, magnitudes layer by layer, forced weight normalisation, warm start."""

import math

import pytest
import torch

from sclightning.backbones import EDM2
from sclightning.backbones.edm2 import Block
from sclightning.backbones.layers import MPWeight, mp_silu, pixel_norm

CHANNELS = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
# Tables 4 and 5 of the paper, in millions; XS is EDM2's.
PAPER = {"xs": 124.7, "s": 280.2, "m": 497.8, "l": 777.5, "xl": 1119.3, "xxl": 1523.2}
WITH_SHIFT = {"xs": 130.81, "s": 293.93, "m": 522.19, "l": 815.59, "xl": 1174.14, "xxl": 1597.83}
SMALL = {"resolution": 16, "in_channels": 3, "channels": 16, "channel_mult": (1, 2), "num_blocks": 1}
SMALL |= {"attention_resolutions": (8,), "head_channels": 8}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def millions(**options):
    with torch.device("meta"):
        return sum(p.numel() for p in EDM2(**options).parameters()) / 1e6


@pytest.mark.parametrize("size", CHANNELS)
def test_parameter_counts_are_the_papers(size):
    options = {"channels": CHANNELS[size], "num_classes": 1000}
    assert millions(**options) == pytest.approx(PAPER[size], abs=0.05)
    assert millions(shift=True, **options) == pytest.approx(WITH_SHIFT[size], abs=0.01)


def test_distillation_adds_one_layer_and_its_gain():
    added = millions(num_classes=1000, guidance=True) - millions(num_classes=1000)
    assert added * 1e6 == pytest.approx(192 * 768 + 1)


@pytest.mark.parametrize("options", [{}, {"shift": True}, {"double_norm": False}], ids=["scale", "shift", "stock"])
def test_every_layer_keeps_the_magnitude_at_initialisation(options):
    network = EDM2(32, 4, 64, (1, 2, 2), 2, head_channels=32, num_classes=10, guidance=True, **options)
    assert not network(torch.randn(1, 4, 32, 32), torch.rand(1), None, torch.ones(1)).any()  # out_gain = 0
    torch.nn.init.ones_(network.out_gain)
    rms = {}
    for name, module in network.named_modules():
        if isinstance(module, MPWeight | Block):

            def record(module, inputs, output, name=name):
                rms[name] = output.square().mean().sqrt().item()

            module.register_forward_hook(record)
    with torch.no_grad():
        t, label = torch.rand(8) * math.pi / 2, torch.randint(0, 10, (8,))
        network(torch.randn(8, 4, 32, 32), t, label, torch.rand(8) + 1)
    assert len(rms) == sum(isinstance(m, MPWeight | Block) for m in network.modules())
    for name, value in rms.items():
        # The proj of attention sees an average over pixels; the rest is chance at 64 channels, and zero padding.
        assert 0.5 < value < 1.35, (name, value)
    blocks = [value for name, value in rms.items() if name.count(".") == 1]
    assert len(blocks) == 22  # the first convolution among them
    assert all(0.75 < value < 1.25 for value in blocks)


def test_embedding_has_unit_magnitude_before_its_nonlinearity():
    network = EDM2(**SMALL | {"channels": 64}, num_classes=10)
    t = torch.rand(256) * math.pi / 2
    for label in (torch.randint(0, 10, (256,)), torch.full((256,), -1)):
        emb = network._embed(t, label, None)
        # silu/0.596 of N(0, 1) has unit mean square; without a label the sum holds one of its two parts.
        expected = 1 if (label >= 0).all() else mp_silu(torch.randn(10**5) * math.sqrt(0.5)).square().mean().sqrt()
        assert emb.square().mean().sqrt().item() == pytest.approx(float(expected), abs=0.1)


def test_guidance_is_shown_with_unit_magnitude():
    """The features of the guidance scale, as the linear layer behind them gets them."""
    network, seen = EDM2(**SMALL | {"channels": 64}, guidance=True), []
    network.guidance_linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network._embed(torch.rand(64), None, 1 + torch.rand(64))
    assert seen[0].square().mean().item() == pytest.approx(1, abs=1e-4)


def test_modulation_is_the_double_norm_of_the_paper():
    """norm(x) * pnorm(s) (+ pnorm(b)), by an independent computation of one block."""
    for shift in (False, True):
        block = EDM2(**SMALL, shift=shift).decoder["8x8_in1"]
        h, s = torch.randn(2, 32, 8, 8), block.modulation(torch.randn(2, 32))
        y = block._modulate(h, s)
        norm = h / h.square().mean(1, keepdim=True).sqrt()
        scale, b = s.chunk(2, 1) if shift else (s, None)
        expected = norm * (scale / scale.square().mean(1, keepdim=True).sqrt())[..., None, None]
        if shift:
            expected = (expected + (b / b.square().mean(1, keepdim=True).sqrt())[..., None, None]) / math.sqrt(2)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        # Neither the embedding's nor the activation's size matters, the point of normalising twice.
        torch.testing.assert_close(block._modulate(5 * h, 5 * s), y, rtol=1e-4, atol=1e-4)


def test_stock_modulation_starts_as_identity():
    block = EDM2(**SMALL, double_norm=False).decoder["8x8_in1"]
    h, s = torch.randn(2, 32, 8, 8), torch.randn(2, 32)
    assert torch.equal(block._modulate(h, s), h)
    torch.nn.init.constant_(block.modulation_gain, 0.5)
    torch.testing.assert_close(block._modulate(h, s), h * (1 + 0.5 * s[..., None, None]))


def test_encoder_normalises_its_main_path_and_the_decoder_does_not():
    network = EDM2(**SMALL)
    x, emb = torch.randn(2, 16, 16, 16), torch.randn(2, 32)
    encoder, decoder = network.encoder["16x16_block0"], network.decoder["16x16_block1"]
    torch.testing.assert_close(encoder(9 * x, emb), encoder(x, emb), rtol=1e-3, atol=1e-3)
    x = torch.randn(2, 32, 16, 16)
    assert (decoder(9 * x, emb) - decoder(x, emb)).abs().max() > 1
    assert decoder(1e9 * x, emb).abs().max() == 256  # EDM2's limit for half precision
    torch.testing.assert_close(pixel_norm(9 * x), pixel_norm(x))


def test_forced_normalisation_after_a_step_leaves_the_function_alone():
    network = EDM2(**SMALL, num_classes=3)
    torch.nn.init.ones_(network.out_gain)
    x, t, label = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 2])
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    before = network(x, t, label)
    before.square().mean().backward()
    optimizer.step()
    stepped = network(x, t, label)
    assert (stepped - before).abs().max() > 1e-3
    network.normalize_weights()
    torch.testing.assert_close(network(x, t, label), stepped, rtol=1e-4, atol=1e-4)
    for module in network.modules():
        if isinstance(module, MPWeight):
            mean_square = module.weight.square().flatten(1).mean(1)
            torch.testing.assert_close(mean_square, torch.ones_like(mean_square))


def test_a_forward_pass_never_writes_to_the_weights():
    network = EDM2(**SMALL).train()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(3)
    versions = [p._version for p in network.parameters()]
    network(torch.randn(1, 3, 16, 16), torch.rand(1))
    assert [p._version for p in network.parameters()] == versions


def published(network, prefix="unet."):
    """A state dict as the published networks name it, with what they have and we have not."""
    names = {"encoder": "enc", "decoder": "dec", "conv0": "conv_res0", "conv1": "conv_res1", "skip": "conv_skip"}
    names |= {"modulation": "emb_linear", "modulation_gain": "emb_gain", "qkv": "attn_qkv", "proj": "attn_proj"}
    names |= {"label_embedding": "emb_label", "time_linear": "emb_noise"}
    state = {
        prefix + ".".join(names.get(part, part) for part in name.split(".")): torch.randn_like(p)[
            0 if name.endswith("gain") else ...
        ]
        for name, p in network.named_parameters()
        if "guidance" not in name
    }
    channels = network.time_linear.weight.shape[1]
    return state | {
        f"{prefix}emb_fourier.freqs": torch.randn(channels),
        f"{prefix}emb_fourier.phases": torch.rand(channels),
        "logvar_fourier.freqs": torch.randn(128),
        "logvar_fourier.phases": torch.rand(128),
        "logvar_linear.weight": torch.randn(1, 128),
    }


def test_names_of_the_published_networks():
    """Names as they stand in the published files, written out."""
    with torch.device("meta"):
        state = published(EDM2(num_classes=1000, double_norm=False))
    for name, shape in {
        "unet.emb_noise.weight": (768, 192),
        "unet.emb_label.weight": (768, 1000),
        "unet.enc.64x64_conv.weight": (192, 5, 3, 3),
        "unet.enc.64x64_block0.emb_gain": (),
        "unet.enc.64x64_block0.conv_res0.weight": (192, 192, 3, 3),
        "unet.enc.64x64_block0.emb_linear.weight": (192, 768),
        "unet.enc.32x32_down.conv_res1.weight": (192, 192, 3, 3),
        "unet.enc.32x32_block0.conv_skip.weight": (384, 192, 1, 1),
        "unet.enc.16x16_block2.attn_qkv.weight": (1728, 576, 1, 1),
        "unet.dec.8x8_in0.attn_proj.weight": (768, 768, 1, 1),
        "unet.dec.8x8_in1.conv_res0.weight": (768, 768, 3, 3),
        "unet.dec.16x16_up.conv_res0.weight": (768, 768, 3, 3),
        "unet.dec.64x64_block3.conv_skip.weight": (192, 384, 1, 1),
        "unet.out_conv.weight": (4, 192, 3, 3),
        "unet.out_gain": (),
    }.items():
        assert tuple(state[name].shape) == shape, name


@pytest.mark.parametrize("prefix", ["", "unet."])
@pytest.mark.parametrize("double_norm", [False, True])
def test_load_edm2(double_norm, prefix):
    network = EDM2(**SMALL, num_classes=4, double_norm=double_norm, guidance=True)
    before = {name: p.clone() for name, p in network.named_parameters()}
    state = published(EDM2(**SMALL, num_classes=4, double_norm=False), prefix)
    kept = network.load_edm2(state)
    assert "time_linear.weight" in kept and "guidance_gain" in kept
    assert ("encoder.8x8_block0.modulation.weight" in kept) == double_norm
    now = dict(network.named_parameters())
    for name in kept:
        torch.testing.assert_close(now[name], before[name])
    # The velocity of EDM2 has the other sign; weights are normalised on arrival, which leaves the function alone.
    assert now["out_gain"] == -state[f"{prefix}out_gain"]
    for ours, theirs in [
        ("encoder.8x8_block0.qkv.weight", "enc.8x8_block0.attn_qkv.weight"),
        ("decoder.16x16_block1.skip.weight", "dec.16x16_block1.conv_skip.weight"),
        ("label_embedding.weight", "emb_label.weight"),
    ]:
        expected = state[prefix + theirs]
        scale = expected.square().flatten(1).mean(1).sqrt()
        torch.testing.assert_close(now[ours] * scale.view(-1, *[1] * (expected.ndim - 1)), expected)


def test_load_edm2_of_another_size_is_refused_before_anything_is_copied():
    network = EDM2(**SMALL)
    before = {name: p.clone() for name, p in network.named_parameters()}
    with pytest.raises(ValueError, match="make the network with the size of the published one"):
        network.load_edm2(published(EDM2(**SMALL | {"channels": 32})))
    state = published(EDM2(**SMALL))
    del state["unet.dec.8x8_in0.attn_qkv.weight"]
    with pytest.raises(ValueError, match=r"no dec.8x8_in0.attn_qkv.weight, the counterpart of decoder"):
        network.load_edm2(state)
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


def test_shift_without_double_norm_is_refused():
    with pytest.raises(ValueError, match="shift=True needs double_norm=True"):
        EDM2(**SMALL, double_norm=False, shift=True)
