"""Posteriors and pictures of diffusers' AutoencoderKL, in both conventions."""

import numpy as np
import pytest
import torch

from sclightning.data.arrays import to_uint8
from sclightning.data.autoencoder import CONVENTIONS, channel_statistics, decode, encode, load_vae


@pytest.fixture(scope="module")
def vae(tiny_vae):
    return load_vae(tiny_vae)


IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (18, 3, 16, 16), np.uint8))


@pytest.mark.parametrize(("convention", "scale", "shift"), [("paper", 2 / 255, -1), ("edm2", 1 / 255, 0)])
def test_encode_is_the_posterior_of_images_in_the_conventions_range(vae, convention, scale, shift):
    """Means, then standard deviations, of the autoencoder itself on images in [-1, 1] or [0, 1]."""
    moments = encode(vae, IMAGES, convention)
    posterior = vae.encode(IMAGES.double().mul(scale).add(shift).float()).latent_dist
    assert moments.dtype == torch.float16 and moments.shape == (18, 8, 8, 8)
    torch.testing.assert_close(moments[:, :4].float(), posterior.mean, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(moments[:, 4:].float(), posterior.std, rtol=2e-3, atol=2e-3)


def test_conventions_differ(vae):
    """By far more than rounding: what the mismatch error protects from."""
    difference = encode(vae, IMAGES, "paper").float() - encode(vae, IMAGES, "edm2").float()
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize("convention", ["paper", "edm2"])
def test_decode_is_the_decoder_in_the_conventions_range(vae, convention):
    latents = encode(vae, IMAGES, convention)[:, :4].float()
    pictures = vae.decode(latents).sample
    expected = to_uint8(pictures if convention == "paper" else 2 * pictures - 1)
    got = decode(vae, latents, convention)
    assert got.dtype == torch.uint8 and got.shape == IMAGES.shape
    assert (got.int() - expected.int()).abs().max() <= 1 and got.float().std() > 1


def test_statistics_of_channels_count_the_posteriors_noise():
    """Mean and standard deviation of samples drawn from the posteriors, over several blocks of the array."""
    rng = np.random.default_rng(0)
    centres, spreads = np.array([1.56, -2.15]), np.array([5.0, 0.5])
    mean = centres[:, None, None] + spreads[:, None, None] * rng.standard_normal((3000, 2, 2, 2))
    std = np.full_like(mean, 1.5)
    measured = channel_statistics(np.concatenate([mean, std], 1).astype(np.float16))
    samples = mean + std * rng.standard_normal(mean.shape)
    np.testing.assert_allclose(measured["mean"], samples.mean((0, 2, 3)), atol=0.15)
    np.testing.assert_allclose(measured["std"], samples.std((0, 2, 3)), rtol=0.02)
    exact = np.sqrt(mean.var((0, 2, 3)) + 1.5**2)
    np.testing.assert_allclose(measured["std"], exact, rtol=1e-3)


def test_statistics_of_the_conventions():
    """The paper's numbers (App. G) and EDM2's."""
    assert CONVENTIONS["paper"] == (-1, (1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31))
    assert CONVENTIONS["edm2"] == (0, (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28))


def test_no_autoencoder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no AutoencoderKL at .*; give a folder") as error:
        load_vae(str(tmp_path))
    assert "\n" not in str(error.value)
