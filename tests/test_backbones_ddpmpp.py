"""DDPM++: the paper's CIFAR-10 network, and a warm start from EDM's."""

import math

import pytest
import torch
import torch.nn.functional as nnF

from sclightning.backbones import DDPMpp

SMALL = {"resolution": 16, "in_channels": 3, "channels": 16, "channel_mult": (1, 2), "num_blocks": 1}
SMALL |= {"attention_resolutions": (8,), "num_classes": 4, "augment_dim": 9}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_parameter_counts():
    with torch.device("meta"):
        double, stock = DDPMpp(), DDPMpp(double_norm=False)
    assert sum(p.numel() for p in double.parameters()) == 60_066_563  # every affine doubled
    assert sum(p.numel() for p in stock.parameters()) == 55_732_739  # 55.73 M of EDM's (and the paper's) table


def test_attention_is_where_the_paper_has_it():
    with torch.device("meta"):
        network = DDPMpp()
    attending = {n: b.heads for part in (network.encoder, network.decoder) for n, b in part.items() if _attends(b)}
    assert attending.pop("8x8_in0") == 1
    assert set(attending) == {*(f"16x16_block{i}" for i in range(4)), "16x16_block4"}
    assert set(attending.values()) == {1}
    assert network.encoder["16x16_block0"].qkv.weight.shape == (768, 256, 1, 1)  # one head of 256


def _attends(block):
    return getattr(block, "qkv", None) is not None


def test_modulation_is_the_double_norm_of_the_paper():
    """norm(x) * pnorm(s) + pnorm(b), from the captured input of the second convolution."""
    block = DDPMpp(**SMALL).decoder["8x8_in1"]
    seen = {}
    block.conv0.register_forward_hook(lambda m, i, o: seen.update(h=o))
    block.conv1.register_forward_hook(lambda m, i, o: seen.update(y=i[0]))
    emb = torch.randn(2, 64)
    block(torch.randn(2, 32, 8, 8), emb)
    s, b = block.modulation(emb).chunk(2, 1)
    s, b = (a / a.square().mean(1, keepdim=True).sqrt() for a in (s, b))
    expected = nnF.silu(nnF.group_norm(seen["h"], 8, eps=1e-6) * s[..., None, None] + b[..., None, None])
    torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-4)


def test_stock_modulation_is_additive():
    block = DDPMpp(**SMALL, double_norm=False).decoder["8x8_in1"]
    seen = {}
    block.conv0.register_forward_hook(lambda m, i, o: seen.update(h=o))
    block.conv1.register_forward_hook(lambda m, i, o: seen.update(y=i[0]))
    emb = torch.randn(2, 64)
    block(torch.randn(2, 32, 8, 8), emb)
    expected = nnF.silu(nnF.group_norm(seen["h"] + block.modulation(emb)[..., None, None], 8, eps=1e-6))
    torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-4)


def test_augmentation_condition():
    network = DDPMpp(**SMALL).eval()
    for p in network.parameters():
        if p.ndim > 1:  # some are nearly zero at initialisation
            torch.nn.init.xavier_uniform_(p)
    x, t = torch.randn(2, 3, 16, 16), torch.rand(2)
    none = network(x, t)
    torch.testing.assert_close(network(x, t, augment=torch.zeros(2, 9)), none)
    assert (network(x, t, augment=torch.ones(2, 9)) - none).abs().max() > 1e-3
    none.sum().backward()
    assert network.augment_embedding.weight.grad is not None  # or DDP would wait for it
    with pytest.raises(ValueError, match="augment_dim=0, but augment was given"):
        DDPMpp(**SMALL | {"augment_dim": 0})(x, t, augment=torch.zeros(2, 9))


def test_input_skip_adds_the_noisy_image():
    """Nothing at initialisation, then gain(t) x, whose derivative is part of the tangent."""
    torch.manual_seed(0)
    stock = DDPMpp(**SMALL).eval().double()
    torch.manual_seed(0)
    network = DDPMpp(**SMALL, input_skip=True).eval().double()
    (x, dx), (t, dt) = torch.randn(2, 2, 3, 16, 16).double(), torch.tensor([[0.1, 1.4], [0.5, -0.3]]).double()
    torch.testing.assert_close(network(x, t), stock(x, t), rtol=0, atol=0)
    torch.nn.init.normal_(network.input_gain.weight, std=0.1)
    torch.nn.init.constant_(network.input_gain.bias, 0.7)
    gain = (network(x, t) - stock(x, t)) / x
    torch.testing.assert_close(gain, gain[:, :1, :1, :1].expand_as(gain))
    assert (gain[0] - gain[1]).abs().min() > 1e-3  # it depends on the time
    _, J = torch.func.jvp(network, (x, t), (dx, dt))
    h = 1e-5
    central = (network(x + h * dx, t + h * dt) - network(x - h * dx, t - h * dt)) / (2 * h)
    torch.testing.assert_close(J, central, rtol=1e-6, atol=1e-8)


def published(network, prefix="model."):
    """A state dict in the layout of EDM's published DDPM++ networks."""
    names = {"encoder": "enc", "decoder": "dec", "label_embedding": "map_label", "augment_embedding": "map_augment"}
    aux = f"dec.{network.resolution}x{network.resolution}_aux"
    names |= {"modulation": "affine", "out_norm": f"{aux}_norm", "out_conv": f"{aux}_conv"}
    state = {}
    for name, p in network.named_parameters():
        name = prefix + ".".join(names.get(part, part) for part in name.split("."))
        state[name] = torch.randn(p.t().shape if "map_label" in name else p.shape) * 0.2
    if network.num_classes:
        state[f"{prefix}map_label.bias"] = torch.randn(network.map_layer0.weight.shape[1])
    state[f"{prefix}enc.8x8_down.conv0.resample_filter"] = torch.ones(1, 1, 2, 2) / 4
    return state


def test_names_of_the_published_networks():
    """Names as they stand in the published files, written out."""
    with torch.device("meta"):
        state = published(DDPMpp(double_norm=False, augment_dim=9), "model.")
    for name, shape in {
        "model.map_augment.weight": (128, 9),
        "model.map_layer0.weight": (512, 128),
        "model.map_layer1.bias": (512,),
        "model.enc.32x32_conv.weight": (128, 3, 3, 3),
        "model.enc.32x32_block0.norm0.weight": (128,),
        "model.enc.32x32_block0.affine.weight": (256, 512),
        "model.enc.16x16_down.skip.weight": (256, 256, 1, 1),
        "model.enc.16x16_block0.qkv.weight": (768, 256, 1, 1),
        "model.dec.8x8_in0.proj.bias": (256,),
        "model.dec.8x8_in1.conv1.weight": (256, 256, 3, 3),
        "model.dec.16x16_up.conv0.weight": (256, 256, 3, 3),
        "model.dec.16x16_block4.norm2.bias": (256,),
        "model.dec.32x32_block4.skip.weight": (256, 384, 1, 1),
        "model.dec.32x32_aux_norm.weight": (256,),
        "model.dec.32x32_aux_conv.weight": (3, 256, 3, 3),
    }.items():
        assert tuple(state[name].shape) == shape, name


@pytest.mark.parametrize("prefix", ["", "model."])
def test_load_edm(prefix):
    network = DDPMpp(**SMALL, double_norm=False)
    state = published(network, prefix)
    assert network.load_edm(state) == []
    edm = {name.removeprefix("model."): value for name, value in state.items()}
    x, emb = torch.randn(2, 32, 8, 8), torch.randn(2, 64)

    # One block with attention, computed in EDM's layout: qkv channels are (head, component, q/k/v).
    block = {n.removeprefix("dec.8x8_in0."): v for n, v in edm.items() if n.startswith("dec.8x8_in0.")}
    h = nnF.conv2d(nnF.silu(_norm(x, block, "norm0")), block["conv0.weight"], block["conv0.bias"], padding=1)
    h = h + nnF.linear(emb, block["affine.weight"], block["affine.bias"])[..., None, None]
    h = nnF.conv2d(nnF.silu(_norm(h, block, "norm1")), block["conv1.weight"], block["conv1.bias"], padding=1)
    y = (x + h) * math.sqrt(0.5)
    q, k, v = nnF.conv2d(_norm(y, block, "norm2"), block["qkv.weight"], block["qkv.bias"]).view(2, 32, 3, 64).unbind(2)
    p = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(32)).softmax(2)
    a = torch.einsum("bqk,bck->bcq", p, v).view(2, 32, 8, 8)
    y = (y + nnF.conv2d(a, block["proj.weight"], block["proj.bias"])) * math.sqrt(0.5)
    torch.testing.assert_close(network.decoder["8x8_in0"](x, emb), y, rtol=1e-4, atol=1e-4)

    # The embedding: sines first, one-hot labels times the root of their number, as the first layer sees their sum.
    t, label, augment = torch.rand(2), torch.tensor([3, 0]), torch.randn(2, 9)
    features = network.time_embedding(t)
    theirs = torch.cat([features[:, 8:], features[:, :8]], 1)
    theirs = theirs + nnF.linear(nnF.one_hot(label, 4) * math.sqrt(4), edm["map_label.weight"], edm["map_label.bias"])
    theirs = theirs + nnF.linear(augment, edm["map_augment.weight"])
    ours = features + network.label_embedding(label) + network.augment_embedding(augment)
    theirs = nnF.linear(theirs, edm["map_layer0.weight"], edm["map_layer0.bias"])
    torch.testing.assert_close(network.map_layer0(ours), theirs)

    # The velocity has the other sign.
    x = torch.randn(2, 16, 8, 8)
    theirs = nnF.conv2d(x, edm["dec.16x16_aux_conv.weight"], edm["dec.16x16_aux_conv.bias"], padding=1)
    torch.testing.assert_close(network.out_conv(x), -theirs)
    assert torch.equal(network.out_norm.weight, edm["dec.16x16_aux_norm.weight"])


def _norm(x, block, name):
    return nnF.group_norm(x, 8, block[f"{name}.weight"], block[f"{name}.bias"], eps=1e-6)


def test_load_edm_leaves_the_input_skip_at_zero():
    network, stock = (DDPMpp(**SMALL, double_norm=False, input_skip=skip).eval() for skip in (True, False))
    state = published(stock)
    assert stock.load_edm(state) == [] and network.load_edm(state) == ["input_gain.weight", "input_gain.bias"]
    x, t = torch.randn(2, 3, 16, 16), torch.rand(2)
    torch.testing.assert_close(network(x, t), stock(x, t), rtol=0, atol=0)


def test_load_edm_into_the_papers_variant_keeps_the_modulation():
    network = DDPMpp(**SMALL, guidance=True)
    kept = network.load_edm(published(DDPMpp(**SMALL, double_norm=False)))
    assert all("modulation" in name or name == "guidance_embedding.weight" for name in kept) and len(kept) == 21
    assert not network.guidance_embedding.weight.any()
