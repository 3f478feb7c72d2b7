"""EDM and EDM2 teachers from plain state dicts: the published function, its sign, its time, its sampler."""

import hashlib
import itertools
import math
import os
import pickle

import pytest
import torch
import torch.nn.functional as nnF

from sclightning.adapters import load_edm, load_edm2
from sclightning.backbones import EDM2, DDPMpp
from sclightning.sampling import heun, karras_times
from sclightning.trigflow import denoise

SMALL = {"resolution": 16, "in_channels": 2, "channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "num_classes": 4}
SMALL |= {"attention_resolutions": (8,)}
SIGMA_DATA = 0.5


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def edm_state():
    """A state dict in the layout of EDM's published DDPM++ networks, float64."""
    names = {"encoder": "enc", "decoder": "dec", "label_embedding": "map_label", "modulation": "affine"}
    names |= {"out_norm": "dec.16x16_aux_norm", "out_conv": "dec.16x16_aux_conv"}
    state = {}
    for i, (name, p) in enumerate(DDPMpp(**SMALL, double_norm=False).named_parameters()):
        value = noise(*(p.t() if name == "label_embedding.weight" else p).shape, seed=i)
        value = 1 + 0.3 * value if p.ndim == 1 else value * p[0].numel() ** -0.5
        state["model." + ".".join(names.get(part, part) for part in name.split("."))] = value
    return state | {"model.map_label.bias": noise(16, seed=99)}  # in their order, sines first


def edm_network(state, x, c_noise, label):
    """The network of EDM's Table 1 and App. F.2 (DDPM++), from the papers, without a class."""
    w = {name.removeprefix("model."): value for name, value in state.items()}

    def conv(x, name):
        return nnF.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=w[f"{name}.weight"].shape[-1] // 2)

    def norm(x, name):
        groups = min(32, x.shape[1] // 4)
        return nnF.group_norm(x, groups, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def block(x, name):
        def size(x):
            x = nnF.avg_pool2d(x, 2) if name.endswith("down") else x
            return nnF.interpolate(x, scale_factor=2) if name.endswith("up") else x

        h = conv(size(nnF.silu(norm(x, f"{name}.norm0"))), f"{name}.conv0")
        h = h + nnF.linear(emb, w[f"{name}.affine.weight"], w[f"{name}.affine.bias"])[..., None, None]
        h = conv(nnF.silu(norm(h, f"{name}.norm1")), f"{name}.conv1")
        x = size(x)
        x = (h + (conv(x, f"{name}.skip") if f"{name}.skip.weight" in w else x)) / math.sqrt(2)
        if f"{name}.qkv.weight" in w:
            B, C, H, W = x.shape
            q, k, v = conv(norm(x, f"{name}.norm2"), f"{name}.qkv").view(B, C, 3, H * W).unbind(2)
            weights = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(C)).softmax(2)
            x = x + conv(torch.einsum("bqk,bck->bcq", weights, v).view(x.shape), f"{name}.proj")
            x = x / math.sqrt(2)
        return x

    freqs = (1 / 10_000) ** (torch.arange(8, dtype=x.dtype) / 7)
    angles = c_noise[:, None] * freqs
    emb = torch.cat([angles.sin(), angles.cos()], 1)
    emb = emb + nnF.linear(nnF.one_hot(label, 4).to(x) * math.sqrt(4), w["map_label.weight"], w["map_label.bias"])
    for layer in ("map_layer0", "map_layer1"):
        emb = nnF.silu(nnF.linear(emb, w[f"{layer}.weight"], w[f"{layer}.bias"]))
    skips = [conv(x, "enc.16x16_conv")]
    for name in ("16x16_block0", "8x8_down", "8x8_block0"):
        skips.append(block(skips[-1], f"enc.{name}"))
    x = skips[-1]
    for name in ("8x8_in0", "8x8_in1", "8x8_block0", "8x8_block1", "16x16_up", "16x16_block0", "16x16_block1"):
        x = block(torch.cat([x, skips.pop()], 1) if "block" in name else x, f"dec.{name}")
    return conv(nnF.silu(norm(x, "dec.16x16_aux_norm")), "dec.16x16_aux_conv")


def edm_denoiser(state, x, sigma, label):
    """EDM's preconditioning (Table 1) around its network; sigma (B,)."""
    s = sigma[:, None, None, None]
    c_skip, c_out = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2), s * SIGMA_DATA / (s**2 + SIGMA_DATA**2).sqrt()
    c_in = 1 / (s**2 + SIGMA_DATA**2).sqrt()
    return c_skip * x + c_out * edm_network(state, c_in * x, sigma.log() / 4, label)


@pytest.fixture(params=["pt", "safetensors"])
def edm_file(request, edm_state, tmp_path):
    path = tmp_path / f"edm.{request.param}"
    if request.param == "pt":
        torch.save(edm_state, path)
    else:
        pytest.importorskip("safetensors.torch").save_file({k: v.contiguous() for k, v in edm_state.items()}, path)
    return str(path)


def test_edm_teacher_is_the_published_network(edm_state, edm_file):
    """F = -F_EDM, and Eq. 5 is EDM's own denoiser at every noise level from 0.002 to 80, in float64."""
    teacher = load_edm(DDPMpp(**SMALL, double_norm=False).double(), edm_file).eval()
    sigma = torch.logspace(math.log10(0.002), math.log10(80), 9, dtype=torch.float64)
    t, label, x = (sigma / SIGMA_DATA).atan(), torch.arange(9) % 4, noise(9, 2, 16, 16)
    with torch.no_grad():
        F = teacher(x, t, label)
        torch.testing.assert_close(F, -edm_network(edm_state, x, sigma.log() / 4, label), rtol=1e-12, atol=1e-12)
        x_sigma = SIGMA_DATA * x / t.cos()[:, None, None, None]
        expected = edm_denoiser(edm_state, x_sigma, sigma, label)
        torch.testing.assert_close(denoise(F, SIGMA_DATA * x, t, SIGMA_DATA), expected, rtol=1e-12, atol=1e-12)
    assert F.std() > 0.1


def test_edm_sampler(edm_state, edm_file):
    """Our Heun through the adapter is Algorithm 1 of EDM (without churn), step by step in sigma."""
    teacher = load_edm(DDPMpp(**SMALL, double_norm=False).double(), edm_file).eval()
    label, times = torch.tensor([2, 0]), karras_times(5, SIGMA_DATA)
    with torch.no_grad():
        ours = heun(lambda x, t: teacher(x, t, label), noise(2, 2, 16, 16), times, SIGMA_DATA)
        sigmas = [SIGMA_DATA * math.tan(t) for t in times]
        x = noise(2, 2, 16, 16) * SIGMA_DATA / math.cos(times[0])  # x_t / cos t
        for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
            slope = (x - edm_denoiser(edm_state, x, torch.full((2,), s, dtype=x.dtype), label)) / s
            x_next = x + (s_next - s) * slope
            if i < 4:
                D = edm_denoiser(edm_state, x_next, torch.full((2,), s_next, dtype=x.dtype), label)
                x_next = x + (s_next - s) * (slope + (x_next - D) / s_next) / 2
            x = x_next
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def edm2_state():
    """A state dict in the layout of EDM2's published networks, float32."""
    names = {"encoder": "enc", "decoder": "dec", "conv0": "conv_res0", "conv1": "conv_res1", "skip": "conv_skip"}
    names |= {"modulation": "emb_linear", "modulation_gain": "emb_gain", "qkv": "attn_qkv", "proj": "attn_proj"}
    names |= {"label_embedding": "emb_label", "time_linear": "emb_noise"}
    state = {}
    for i, (name, p) in enumerate(EDM2(**SMALL, head_channels=8, double_norm=False).named_parameters()):
        value = noise(*p.shape, seed=i).float()
        state["unet." + ".".join(names.get(part, part) for part in name.split("."))] = (
            value[0] if name.endswith("gain") else value
        )
    fourier = {
        "unet.emb_fourier.freqs": 6.28 * noise(16, seed=98),
        "unet.emb_fourier.phases": 6.28 * noise(16, seed=99),
    }
    return state | {name: value.float() for name, value in fourier.items()}


def test_edm2_teacher_shows_the_published_time(tmp_path):
    """Time enters as cos(f ln(sigma)/4 + phi) sqrt(2), through the published linear layer; the output has its sign."""
    state, path = edm2_state(), tmp_path / "edm2.pt"
    torch.save(state, path)
    teacher = load_edm2(EDM2(**SMALL, head_channels=8, double_norm=False), str(path)).eval()
    net = teacher.network
    seen = {}
    net.time_linear.register_forward_hook(lambda m, args, y: seen.update(features=args[0], emb=y))
    net.out_conv.register_forward_hook(lambda m, args, y: seen.update(y=y))
    sigma = torch.tensor([0.002, 0.3, 80.0])
    t, x, label = (sigma / SIGMA_DATA).atan(), noise(3, 2, 16, 16).float(), torch.tensor([0, 3, -1])
    with torch.no_grad():
        F = teacher(x, t, label)
    freqs, phases = state["unet.emb_fourier.freqs"], state["unet.emb_fourier.phases"]
    features = math.sqrt(2) * (sigma.log()[:, None] / 4 * freqs + phases).cos()
    torch.testing.assert_close(seen["features"], features, rtol=1e-4, atol=1e-4)
    weight = state["unet.emb_noise.weight"]
    emb = features @ (weight / weight.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(seen["emb"], emb, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(F, -state["unet.out_gain"] * seen["y"])


def test_fourier_features_survive_half_precision(tmp_path):
    """A teacher in bfloat16 has the frequencies of float32: rounded, they would be other features."""
    path = tmp_path / "edm2.pt"
    torch.save(edm2_state(), path)
    teacher = load_edm2(EDM2(**SMALL, head_channels=8, double_norm=False), str(path))
    time = torch.tensor([-1.5, 0.3])
    before = teacher.network.time_embedding(time)
    assert torch.equal(teacher.bfloat16().network.time_embedding(time), before)


def test_provenance(edm_file):
    """Name, licence, hash and source of the weights."""
    with open(edm_file, "rb") as file:
        sha256 = hashlib.sha256(file.read()).hexdigest()
    teacher = load_edm(DDPMpp(**SMALL, double_norm=False), edm_file, name="edm-cifar10")
    expected = {"name": "edm-cifar10", "licence": "CC-BY-NC-SA-4.0", "sha256": sha256, "source": edm_file}
    assert teacher.provenance == expected


class Foreign:
    """Something whose unpickling runs code: it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_what_is_not_a_published_network_is_refused(edm_state, tmp_path):
    """A missing file, code in the file, another network, an architecture with fresh layers."""
    with pytest.raises(FileNotFoundError, match="no weights at nowhere"):
        load_edm(DDPMpp(**SMALL, double_norm=False), "nowhere.pt")
    pickled, saved, harm = tmp_path / "network.pkl", tmp_path / "network.pt", tmp_path / "harm"
    pickled.write_bytes(pickle.dumps({"ema": Foreign(harm)}))
    torch.save({"ema": Foreign(harm)}, saved)
    for file in (pickled, saved):
        with pytest.raises(ValueError, match=r"more than tensors.*docs/adapters.md"):
            load_edm(DDPMpp(**SMALL, double_norm=False), str(file))
        assert not harm.exists()
    path = str(tmp_path / "edm.pt")
    torch.save(edm_state, path)
    with pytest.raises(ValueError, match="double_norm: false"):
        load_edm(DDPMpp(**SMALL), path)
    with pytest.raises(ValueError, match="size of the published one"):
        load_edm(DDPMpp(**SMALL | {"channels": 32}, double_norm=False), path)
    for change, place in (({"num_classes": 0}, "map_label"), ({"attention_resolutions": ()}, "qkv|norm2|proj")):
        with pytest.raises(ValueError, match=f"has .*({place}).*no place"):
            load_edm(DDPMpp(**SMALL | change, double_norm=False), path)
    torch.save(edm2_state(), path)
    with pytest.raises(ValueError, match=r"has emb_label.*no place"):
        load_edm2(EDM2(**SMALL | {"num_classes": 0}, head_channels=8, double_norm=False), path)
    state = edm2_state()
    del state["unet.emb_fourier.freqs"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="buffers included"):
        load_edm2(EDM2(**SMALL, head_channels=8, double_norm=False), path)
    with pytest.raises(ValueError, match="double_norm: false and guidance: false"):
        load_edm2(EDM2(**SMALL, head_channels=8, double_norm=False, guidance=True), path)
