"""Models that diffusers saved: the same denoiser, the same sampler, and the ways in which a folder can be wrong."""

import json

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from sclightning.adapters import Guided, check_forward_ad, enable_forward_ad, load_diffusers
from sclightning.modules import ConsistencyDistillation, TrigFlowDiffusion
from sclightning.provenance import notice
from sclightning.sampling import ddim, heun
from sclightning.trigflow import denoise

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")
UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1}
UNET |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
UNET |= {"norm_num_groups": 4, "attention_head_dim": 8}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 2, "out_channels": 4, "num_layers": 2}
DIT |= {"sample_size": 8, "num_embeds_ada_norm": 10}
SD3 = {"sample_size": 8, "patch_size": 2, "in_channels": 2, "out_channels": 2, "num_layers": 2, "attention_head_dim": 8}
SD3 |= {"num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16, "pos_embed_max_size": 8}
SD3 |= {"pooled_projection_dim": 6}


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def save(folder, model, scheduler, name="unet"):
    """A pipeline's folder as diffusers lays it out."""
    model.save_pretrained(folder / name)
    scheduler.save_pretrained(folder / "scheduler")
    return str(folder)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**UNET).eval()


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(1)
    return diffusers.DiTTransformer2DModel(**DIT).eval()


@pytest.fixture(scope="module")
def sd3():
    torch.manual_seed(2)
    return diffusers.SD3Transformer2DModel(**SD3).eval()


@pytest.fixture
def text():
    """Conditions of a text-to-image transformer, one row per sample."""
    return {"encoder_hidden_states": noise(2, 5, 12, seed=3), "pooled_projections": noise(2, 6, seed=4)}


def levels(scheduler, steps):
    """Alpha and sigma of trained steps in float64, from the scheduler's own table, and their times at sigma_data."""
    kept = scheduler.alphas_cumprod.double()[steps]
    return kept.sqrt(), (1 - kept).sqrt()


# --- The denoiser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_unet_denoiser(unet, tmp_path, kind, schedule):
    """At trained steps from first to last, Eq. 5 through the adapter is the scheduler's pred_original_sample."""
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=schedule, prediction_type=kind, clip_sample=False, rescale_betas_zero_snr=False
    )
    teacher = load_diffusers(save(tmp_path, unet, scheduler), sigma_data=0.5).double()
    scheduler.set_timesteps(1000)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    for step in (0, 1, 30, 500, 960, 990):
        alpha, sigma = levels(scheduler, [step])
        t, x = (sigma / (0.5 * alpha)).atan(), noise(1, 1, 8, 8, seed=step)
        x_source = x * (0.25 * alpha**2 + sigma**2).sqrt()
        with torch.no_grad():
            output = unet.double()(x_source, torch.tensor([float(step)], dtype=torch.float64), return_dict=False)[0]
            expected = scheduler.step(output, step, x_source).pred_original_sample
            ours = denoise(teacher(x, t), 0.5 * x, t, 0.5)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    unet.float()


def test_dit_denoiser_and_labels(dit, tmp_path):
    """Half of the output is the prediction; -1 and None are the class after the last; no label drops by itself."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    teacher = load_diffusers(save(tmp_path, dit, scheduler, "transformer"), sigma_data=1.0, student=True).double()
    assert teacher.training
    alpha, sigma = levels(scheduler, [700, 20, 3])
    t, x, label = (sigma / alpha).atan(), noise(3, 2, 8, 8), torch.tensor([4, -1, 9])
    with torch.no_grad():
        model = dit.double()
        time, classes = torch.tensor([700.0, 20, 3], dtype=torch.float64), torch.tensor([4, 10, 9])
        eps = model(x, timestep=time, class_labels=classes, return_dict=False)[0][:, :2]
        none = model(x, timestep=time, class_labels=torch.full((3,), 10), return_dict=False)[0][:, :2]
        a, s = alpha.view(3, 1, 1, 1), sigma.view(3, 1, 1, 1)
        for _ in range(5):  # LabelEmbedding of diffusers drops one in ten in training mode
            torch.testing.assert_close(
                denoise(teacher(x, t, label), x, t, 1.0), (x - s * eps) / a, rtol=1e-9, atol=1e-9
            )
        torch.testing.assert_close(denoise(teacher(x, t), x, t, 1.0), (x - s * none) / a, rtol=1e-9, atol=1e-9)
    assert (eps[1] - none[1]).abs().max() == 0 and (eps[0] - none[0]).abs().max() > 0.01
    dit.float()


def test_flow_transformer_with_a_time_of_its_own_is_refused(tmp_path):
    """Flux multiplies the time by 1000 itself, so the scheduler's steps would be a thousand times too large."""
    flux = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    folder = save(tmp_path, flux, diffusers.FlowMatchEulerDiscreteScheduler(), "transformer")
    with pytest.raises(ValueError, match=r"FluxTransformer2DModel.*FlowMatching\(time_scale"):
        load_diffusers(folder, sigma_data=1.0)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_flow_transformer_denoiser(sd3, tmp_path, text, sigma_data):
    """x_0 = x - s u with the text's embeddings passed through, at a shifted scheduler's own times 1000 s."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    teacher = load_diffusers(save(tmp_path, sd3, scheduler, "transformer"), sigma_data=sigma_data).double()
    s = torch.tensor([0.3, 0.95], dtype=torch.float64)
    t, x, column = (s / (1 - s) / sigma_data).atan(), noise(2, 2, 8, 8), s.view(2, 1, 1, 1)
    x_source = x * ((1 - column) ** 2 * sigma_data**2 + column**2).sqrt()
    with torch.no_grad():
        u = sd3.double()(x_source, timestep=1000 * s, **text, return_dict=False)[0]
        ours = denoise(teacher(x, t, text), sigma_data * x, t, sigma_data)
    torch.testing.assert_close(ours, x_source - column * u, rtol=1e-6, atol=1e-6)  # diffusers embeds time in float32
    sd3.float()


# --- The sampler ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_ddim_sampler(unet, tmp_path, kind):
    """Our DDIM through the adapter ends where diffusers' DDIM ends."""
    scheduler = diffusers.DDIMScheduler(prediction_type=kind, clip_sample=False)
    teacher = load_diffusers(save(tmp_path, unet, scheduler), sigma_data=0.5).double()
    scheduler.set_timesteps(10)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    alpha, sigma = levels(scheduler, scheduler.timesteps)
    times = [*(sigma / (0.5 * alpha)).atan().tolist(), 0.0]
    start = noise(2, 1, 8, 8)
    x = start * (0.25 * alpha[0] ** 2 + sigma[0] ** 2).sqrt()
    with torch.no_grad():
        for step in scheduler.timesteps:
            x = scheduler.step(unet.double()(x, step.double(), return_dict=False)[0], step, x).prev_sample
        ours = ddim(teacher, start, times, 0.5)
    torch.testing.assert_close(ours, x, rtol=1e-8, atol=1e-8)
    unet.float()


def test_heun_sampler_between_trained_steps(unet, tmp_path):
    """Heun at Karras' noise levels, whose steps are fractions: diffusers interpolates them in log SNR as we do."""
    scheduler = diffusers.HeunDiscreteScheduler(use_karras_sigmas=True, timestep_spacing="linspace")
    teacher = load_diffusers(save(tmp_path, unet, scheduler), sigma_data=0.5)
    scheduler.set_timesteps(6)
    sigmas = scheduler.sigmas[[0, *range(1, len(scheduler.sigmas), 2)]].double()
    times = (sigmas / 0.5).atan().tolist()
    assert times[-1] == 0 and len(times) == 7 and (scheduler.timesteps % 1 != 0).any()
    start = noise(2, 1, 8, 8, dtype=torch.float32)
    x = start * (0.25 + sigmas[0] ** 2).sqrt().float()
    with torch.no_grad():
        for step in scheduler.timesteps:
            x = scheduler.step(
                unet(scheduler.scale_model_input(x, step), step, return_dict=False)[0], step, x
            ).prev_sample
        ours = heun(teacher, start, times, 0.5).float()
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)
    assert x.std() > 0.1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edm_euler_sampler(unet, tmp_path, kind):
    """Euler in sigma is DDIM; both of diffusers' signs of EDM's network."""
    scheduler = diffusers.EDMEulerScheduler(prediction_type=kind)
    teacher = load_diffusers(save(tmp_path, unet, scheduler), sigma_data=0.5)
    scheduler.set_timesteps(6)
    times = (scheduler.sigmas.double() / 0.5).atan().tolist()
    start = noise(2, 1, 8, 8, dtype=torch.float32)
    x = start * (0.25 + scheduler.sigmas[0] ** 2).sqrt()
    with torch.no_grad():
        for step in scheduler.timesteps:
            x = scheduler.step(
                unet(scheduler.scale_model_input(x, step), step, return_dict=False)[0], step, x
            ).prev_sample
        ours = ddim(teacher, start, times, 0.5).float()
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_flow_match_euler_sampler(sd3, tmp_path, text, sigma_data):
    """Euler in s is DDIM, from pure noise to the data."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    teacher = load_diffusers(save(tmp_path, sd3, scheduler, "transformer"), sigma_data=sigma_data)
    text = {name: value.float() for name, value in text.items()}
    scheduler.set_timesteps(6)
    s = scheduler.sigmas.double()
    times = torch.atan2(s, (1 - s) * sigma_data).tolist()
    start = noise(2, 2, 8, 8, dtype=torch.float32)
    x = start.clone()  # s = 1: no data
    with torch.no_grad():
        for step in scheduler.timesteps:
            u = sd3(x, timestep=step.expand(2), **text, return_dict=False)[0]
            x = scheduler.step(u, step, x).prev_sample
        ours = ddim(lambda x, t: teacher(x, t, text), start, times, sigma_data).float()
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


# --- As teacher and student -------------------------------------------------------------------------------------------


def test_distillation_from_a_folder(unet, tmp_path, quiet):
    """One Python call each; the student starts as the teacher, trains, saves itself only, and loads again."""
    folder = save(tmp_path / "ddpm", unet, diffusers.DDPMScheduler())
    make = lambda **options: load_diffusers(folder, sigma_data=0.5, **options)  # noqa: E731
    module = ConsistencyDistillation(
        make(student=True), teacher=make(), sigma_data=0.5, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3)
    )
    x, t = noise(4, 1, 8, 8).float(), torch.tensor([0.2, 0.8, 1.2, 1.5])
    torch.testing.assert_close(module.backbone(x, t), module.teacher(x, t), rtol=1e-4, atol=1e-5)
    assert list(module.backbone.state_dict()) == list(module.teacher.state_dict())
    before = {name: p.clone() for name, p in module.named_parameters()}
    trainer = L.Trainer(**quiet, max_steps=2, default_root_dir=tmp_path)
    trainer.fit(module, DataLoader(0.5 * noise(8, 1, 8, 8).float(), batch_size=4))
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("backbone.network.model.") for name in moved)
    assert not any(name.startswith("teacher.") for name in moved)
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    saved = torch.load(tmp_path / "student.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("teacher.") for name in saved)
    loaded = ConsistencyDistillation.load_from_checkpoint(tmp_path / "student.ckpt", backbone=make(student=True))
    ask = {"index": [0, 1], "shape": (1, 8, 8)}
    assert torch.equal(loaded.sample(**ask), module.sample(**ask))


def test_guided_distillation_of_a_text_model(sd3, tmp_path, text, quiet):
    """A batch is (latents, dictionary of embeddings); without them, the empty prompt's."""
    folder = save(tmp_path / "sd3", sd3, diffusers.FlowMatchEulerDiscreteScheduler(), "transformer")
    null = {name: value[:1].float().contiguous() for name, value in text.items()}
    import safetensors.torch

    safetensors.torch.save_file(null, tmp_path / "null.safetensors")
    make = lambda **options: load_diffusers(  # noqa: E731
        folder, sigma_data=1.0, null_conditions=str(tmp_path / "null.safetensors"), **options
    )
    adapter = make()
    text = {name: value.float() for name, value in text.items()}
    x, t = noise(2, 2, 8, 8).float(), torch.tensor([0.4, 1.0])
    F_c, F_0 = adapter(x, t, text), adapter(x, t)
    torch.testing.assert_close(
        F_0, adapter(x, t, {name: value.expand(2, *value.shape[1:]) for name, value in null.items()})
    )
    torch.testing.assert_close(Guided(adapter, scale=3.0)(x, t, text), F_0 + 3 * (F_c - F_0))
    module = ConsistencyDistillation(make(student=True), teacher=Guided(make(), scale=3.0), sigma_data=1.0)
    data = [(row, {name: value[0] for name, value in text.items()}) for row in noise(4, 2, 8, 8).float()]
    L.Trainer(**quiet, max_steps=1, default_root_dir=tmp_path).fit(module, DataLoader(data, batch_size=2))
    assert module.sample([0, 1], (2, 8, 8), label=text).shape == (2, 2, 8, 8)
    half = make().bfloat16()(x, t, text)  # embeddings in the network's precision
    assert half.dtype == torch.float32 and (half - F_c).norm() / F_c.norm() < 0.03
    with pytest.raises(ValueError, match="SD3Transformer2DModel takes no prompt"):
        adapter(x, t, {"prompt": x})
    with pytest.raises(ValueError, match="takes no guidance"):
        adapter(x, t, text, guidance=torch.ones(2))


def test_pretrained_teacher_is_sampled_by_the_module(unet, tmp_path):
    """TrigFlowDiffusion around an adapter is a sampler of it, without training."""
    teacher = load_diffusers(save(tmp_path, unet, diffusers.DDPMScheduler()), sigma_data=0.5)
    samples = TrigFlowDiffusion(teacher, sigma_data=0.5, steps=3).sample([0, 1], (1, 8, 8))
    assert samples.isfinite().all() and samples.std() > 0.1


def test_every_model_passes_forward_mode_once_patched(unet, dit, sd3, tmp_path, text):
    """Before, the check names the attention; after, the same function has the right tangent in every module."""
    x, t = noise(2, 2, 8, 8), torch.tensor([0.4, 1.0], dtype=torch.float64)
    for model, scheduler, label in (
        (unet, diffusers.DDPMScheduler(), None),
        (dit, diffusers.DDPMScheduler(), torch.tensor([1, 2])),
        (sd3, diffusers.FlowMatchEulerDiscreteScheduler(), text),
    ):
        images = x[:, : model.config.in_channels]
        # The check compares with differences, for which diffusers' float32 embedding of times to 1000 is too coarse.
        folder = save(tmp_path / type(model).__name__, model, scheduler, "unet" if model is unet else "transformer")
        adapter = load_diffusers(folder, sigma_data=0.5, time_scale=0.001).double()
        with pytest.raises(
            RuntimeError, match=r"fails in network\.model\..*(attn|attentions).*enable_forward_ad"
        ) as error:
            check_forward_ad(adapter, images, t, label)
        assert "\n" not in str(error.value)
        before, names = adapter(images, t, label), list(adapter.state_dict())
        enable_forward_ad(adapter)
        torch.testing.assert_close(adapter(images, t, label), before, rtol=1e-12, atol=1e-12)
        assert list(adapter.state_dict()) == names
        check_forward_ad(adapter, images, t, label, compiled=True)


def test_labels_of_a_unet(unet, tmp_path):
    """-1 and None are the class that stands for none; a model without labels refuses them."""
    labelled = diffusers.UNet2DModel(**UNET, num_class_embeds=11)
    folder = save(tmp_path / "labelled", labelled, diffusers.DDPMScheduler())
    adapter = load_diffusers(folder, 0.5, null_label=10)
    x, t = noise(2, 1, 8, 8).float(), torch.tensor([0.4, 1.0])
    none = adapter(x, t, torch.tensor([10, 10]))
    assert torch.equal(adapter(x, t, torch.tensor([-1, -1])), none) and torch.equal(adapter(x, t), none)
    assert not torch.equal(adapter(x, t, torch.tensor([3, 3])), none)
    with pytest.raises(ValueError, match="UNet2DModel was made without labels"):
        load_diffusers(save(tmp_path / "ddpm", unet, diffusers.DDPMScheduler()), 0.5)(x, t, torch.tensor([3, 3]))


def test_command_line_distils_a_folder(tmp_path, write_config):
    """A config with teacher and student from a folder fits; its checkpoint loads by itself, and without the teacher."""
    from sclightning.cli import main

    folder = save(tmp_path / "ddpm", diffusers.UNet2DModel(**UNET, num_class_embeds=10), diffusers.DDPMScheduler())
    loader = {"class_path": "sclightning.adapters.load_diffusers"}
    path = write_config(
        tmp_path / "run",
        "ConsistencyDistillation",
        backbone=loader | {"init_args": {"folder": folder, "sigma_data": 0.5, "student": True}},
        teacher=loader | {"init_args": {"folder": folder, "sigma_data": 0.5}},
    )
    main(["fit", "--config", str(path)])
    checkpoint = tmp_path / "run/last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert saved and not any(name.startswith("teacher.") for name in saved)
    module = ConsistencyDistillation.load_from_checkpoint(checkpoint)
    assert module.teacher.provenance["source"] == folder
    alone = ConsistencyDistillation.load_from_checkpoint(checkpoint, teacher=None)
    assert alone.teacher is None
    ask = {"index": [0, 1], "shape": (1, 8, 8), "label": torch.tensor([3, 4])}
    assert torch.equal(alone.sample(**ask), module.sample(**ask))


# --- The folder -------------------------------------------------------------------------------------------------------


def test_provenance(unet, tmp_path):
    """Name and source of the folder, the model card's licence, the hash of the weights."""
    import hashlib

    folder = save(tmp_path / "ddpm-digits", unet, diffusers.DDPMScheduler())
    (tmp_path / "ddpm-digits" / "README.md").write_text("---\ntags: [ddpm]\nlicense: apache-2.0\n---\n# DDPM\n")
    (weights,) = (tmp_path / "ddpm-digits" / "unet").glob("*.safetensors")
    expected = {"name": "ddpm-digits", "licence": "apache-2.0", "source": folder}
    expected["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert load_diffusers(folder, sigma_data=0.5).provenance == expected
    assert load_diffusers(folder, sigma_data=0.5, licence="mit").provenance["licence"] == "mit"
    inside = load_diffusers(f"{folder}/unet", sigma_data=0.5, scheduler=f"{folder}/scheduler")
    assert inside.provenance == expected
    card = "---\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\n---\n"  # how the Hub says it
    (tmp_path / "ddpm-digits" / "README.md").write_text(card)
    assert notice([load_diffusers(folder, sigma_data=0.5).provenance])


def test_model_and_scheduler_in_their_own_folders(unet, tmp_path):
    """As from two calls of save_pretrained."""
    unet.save_pretrained(tmp_path / "model")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "schedule")
    adapter = load_diffusers(str(tmp_path / "model"), 0.5, scheduler=str(tmp_path / "schedule"))
    assert adapter.prediction == "noise" and adapter.provenance["licence"] is None


def test_rescaled_time(unet, tmp_path):
    """time_scale multiplies what the network is shown."""
    folder = save(tmp_path, unet, diffusers.DDPMScheduler())
    t = torch.tensor([0.9])
    times = [load_diffusers(folder, 0.5, time_scale=s).process(t, 0.5).time for s in (1.0, 0.001)]
    torch.testing.assert_close(times[1], times[0] * 0.001)
    with pytest.warns(UserWarning, match=r"times that span \d{3}, with which sCM's tangent explodes.*time_scale=0.001"):
        check_forward_ad(load_diffusers(folder, 0.5, student=True), noise(1, 1, 8, 8).float(), t, every_module=False)


def test_folders_that_cannot_be_used_are_refused(unet, tmp_path):
    """Each in one sentence."""
    with pytest.raises(FileNotFoundError, match="no model of diffusers at"):
        load_diffusers(str(tmp_path), 0.5)
    unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(FileNotFoundError, match=r"no scheduler_config\.json in"):
        load_diffusers(str(tmp_path), 0.5)
    diffusers.EDMEulerScheduler(sigma_data=0.7).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=r"sigma_data=0\.7, and sigma_data=0\.5 was given"):
        load_diffusers(str(tmp_path), 0.5)
    continuous = diffusers.EulerDiscreteScheduler(timestep_type="continuous")
    with pytest.raises(ValueError, match=r"EulerDiscreteScheduler.*no adapter knows"):
        load_diffusers(save(tmp_path / "continuous", unet, continuous), 0.5)
    diffusers.ScoreSdeVeScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=r"ScoreSdeVeScheduler.*no adapter knows"):
        load_diffusers(str(tmp_path), 0.5)
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    learned = diffusers.UNet2DModel(**UNET, time_embedding_type="learned", num_train_timesteps=1000)
    learned.save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="looks its time up in a table"):
        load_diffusers(str(tmp_path), 0.5)


def test_without_diffusers(tmp_path, monkeypatch):
    """One sentence with the command that installs it."""
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(
        ImportError, match=r"needs diffusers, which is not installed: pip install 'sclightning\[diffusers\]'"
    ):
        load_diffusers(str(tmp_path), 0.5)


def test_configs_are_those_of_diffusers(unet, tmp_path):
    """What the loader reads is what diffusers writes."""
    folder = save(tmp_path, unet, diffusers.DDPMScheduler())
    assert json.loads((tmp_path / "unet/config.json").read_text())["_class_name"] == "UNet2DModel"
    assert json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())["_class_name"] == "DDPMScheduler"
    assert load_diffusers(folder, 0.5).network.model.config.block_out_channels == [8, 16]
