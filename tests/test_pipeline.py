"""The diffusers pipeline: bit for bit our samples, however it was loaded."""

import pytest
import torch

pytest.importorskip("diffusers")

from conftest import TINY, randomize
from diffusers import DiffusionPipeline, SCMScheduler

from sclightning.modules import ConsistencyDistillation, ConsistencyTraining
from sclightning.pipeline import SCMNetwork, SCMPipeline
from sclightning.sampling import T_MAX, consistency, sample_noise

pytestmark = pytest.mark.filterwarnings("ignore")
DDPMPP = "sclightning.backbones.DDPMpp"


def make_pipeline(
    class_path=DDPMPP, sigma_data=0.752, times=(T_MAX, 1.1), guidance_scale=None, shape=(1, 8, 8), **init
):
    init = TINY | init if class_path == DDPMPP else init
    config = {"backbone": {"class_path": class_path, "init_args": init}, "sigma_data": sigma_data}
    network = SCMNetwork(**config, shape=shape, times=list(times), guidance_scale=guidance_scale).eval()
    randomize(network.net)
    pipeline = SCMPipeline(network, SCMScheduler(sigma_data=sigma_data))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("sigma_data", [0.5, 0.752, 0.3])
@pytest.mark.parametrize("times", [[T_MAX], [T_MAX, 1.1], [1.5, 1.2, 0.7, 0.3]])
@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_scheduler_and_our_sampler_agree_bit_for_bit(make_net, sigma_data, times, batch_size):
    """Diffusers' arithmetic by itself, driven as its documentation says, with noise from the same generator."""
    net, scheduler = make_net(num_classes=0).eval(), SCMScheduler(sigma_data=sigma_data)
    draw = torch.Generator().manual_seed(1)
    noise = torch.stack([torch.randn(batch_size, 1, 8, 8, generator=draw) for _ in times])
    generator = torch.Generator().manual_seed(1)
    x = sigma_data * torch.randn(batch_size, 1, 8, 8, generator=generator)
    options = {"max_timesteps": None, "intermediate_timesteps": None}
    scheduler.set_timesteps(len(times), timesteps=[*times, 0.0], **options)
    with torch.no_grad():
        for t in scheduler.timesteps[:-1]:
            F = net(x / sigma_data, t.expand(batch_size))
            x = scheduler.step(sigma_data * F, t, x, generator=generator).prev_sample
    expected = consistency(net, noise, times, sigma_data)
    assert torch.equal(x, expected) and expected.std() > 0.1


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_given_noise_makes_the_modules_samples(steps):
    """The samples of ``predict``: the same indices, labels and guidance, from the noise itself."""
    times = [T_MAX, 1.1, 0.4][:steps]
    pipeline = make_pipeline(times=times, guidance_scale=1.5, guidance=True)
    module = ConsistencyDistillation(
        pipeline.network.net, teacher=torch.nn.Identity(), sigma_data=0.752, times=times, guidance_scale=1.5
    )
    expected, label = module.sample(range(7), (1, 8, 8), torch.arange(7)), list(range(7))
    noise = sample_noise(range(7), (1, 8, 8), steps)
    assert torch.equal(pipeline(noise=noise, class_labels=label, output_type="latent").images, expected)
    for change in ({"guidance_scale": 1.0}, {"class_labels": label[::-1]}, {"times": [1.2, 0.8, 0.3][:steps]}):
        options = {"noise": noise, "class_labels": label, "output_type": "latent"} | change
        assert not torch.equal(pipeline(**options).images, expected)
    one = pipeline(noise=noise[:1], class_labels=label, num_inference_steps=1, output_type="latent").images
    module.times = times[:1]
    assert torch.equal(one, module.sample(range(7), (1, 8, 8), torch.arange(7)))


def test_generator_makes_the_noise():
    """One generator for all samples, or one for each: the start first, then the noise of each further step."""
    pipeline = make_pipeline()
    module = ConsistencyTraining(pipeline.network.net, sigma_data=0.752)
    draw = torch.Generator().manual_seed(3)
    noise = torch.stack([torch.randn(4, 1, 8, 8, generator=draw) for _ in range(2)])
    label = torch.tensor([3, -1, 5, 9])
    images = pipeline(class_labels=label.tolist(), generator=torch.Generator().manual_seed(3), output_type="latent")[0]
    assert torch.equal(images, module.eval().sampler(noise, label))
    generators = [torch.Generator().manual_seed(i) for i in (7, 8)]
    both = pipeline(class_labels=[1, 2], generator=generators, output_type="latent").images
    alone = pipeline(class_labels=[2], generator=[torch.Generator().manual_seed(8)], output_type="latent").images
    torch.testing.assert_close(both[1:], alone, rtol=1e-5, atol=1e-6)


def test_saved_by_diffusers_and_loaded_again(tmp_path):
    """``save_pretrained`` and ``from_pretrained`` are diffusers' own; config, scheduler and samples survive."""
    pipeline = make_pipeline(guidance_scale=2.0, guidance=True)
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "pipeline.py").write_text("from sclightning.pipeline import SCMPipeline  # noqa: F401\n")
    noise = sample_noise(range(3), (1, 8, 8), 2)
    expected = pipeline(noise=noise, class_labels=[0, 1, 2], output_type="latent").images
    loaded = [
        SCMPipeline.from_pretrained(tmp_path),
        DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline="pipeline", trust_remote_code=True),
    ]
    for other in loaded:
        assert type(other) is SCMPipeline and other.scheduler.config.sigma_data == 0.752
        assert list(other.network.config.times) == [T_MAX, 1.1] and not other.network.training
        assert torch.equal(other(noise=noise, class_labels=[0, 1, 2], output_type="latent").images, expected)


def test_images():
    """PIL, NumPy and torch images are the samples, mapped from [-1, 1]; a tuple if asked for."""
    pipeline, noise = make_pipeline(), sample_noise(range(2), (1, 8, 8), 2)
    (x,) = pipeline(noise=noise, output_type="latent", return_dict=False)
    (image, _), array = pipeline(noise=noise).images, pipeline(noise=noise, output_type="np").images
    assert image.size == (8, 8) and image.mode == "L"
    expected = (x / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.1
    torch.testing.assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), expected)
    torch.testing.assert_close(pipeline(noise=noise, output_type="pt").images, expected)
    grey = torch.tensor(list(image.getdata())).view(8, 8) / 255
    torch.testing.assert_close(grey, expected[0, 0], rtol=0, atol=0.5 / 255 + 1e-6)
    assert len(pipeline(batch_size=3).images) == 3


def test_latents_are_no_images():
    pipeline = make_pipeline(shape=(4, 8, 8), in_channels=4, num_classes=0)
    with pytest.raises(ValueError, match=r"latents of shape \(4, 8, 8\).*output_type='latent'") as error:
        pipeline()
    assert "\n" not in str(error.value)
    assert pipeline(batch_size=2, output_type="latent").images.shape == (2, 4, 8, 8)


def test_half_precision_network():
    """``to(bfloat16)`` is the network's; the sampler stays in float32."""
    pipeline, noise = make_pipeline(num_classes=0), sample_noise(range(2), (1, 8, 8), 2)
    x = pipeline(noise=noise, output_type="latent").images
    half = pipeline.to(torch.bfloat16)(noise=noise, output_type="latent").images
    assert half.dtype == torch.float32 and 0 < (half - x).abs().max() < 0.1 * x.abs().max()
