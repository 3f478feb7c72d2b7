"""ImageNet 64 and the latents of ImageNet 512 from memory-mapped arrays."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sclightning.data.imagenet64 import ImageNet64DataModule
from sclightning.data.latents import ImageNetLatentDataModule, whiten


def test_images_are_mapped_not_read(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), np.uint8)
    np.save(tmp_path / "train_images.npy", images)
    np.save(tmp_path / "train_labels.npy", np.array([5, 999, 0]))
    split = ImageNet64DataModule(root=str(tmp_path)).split("train")
    assert isinstance(split.images, np.memmap)
    x, label = split.__getitems__([2, 1])
    assert torch.equal(x, torch.from_numpy(images[[2, 1]])) and label.tolist() == [0, 999]


def test_wrong_arrays_get_one_sentence(tmp_path):
    data = ImageNet64DataModule(root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no array at .*train_images.npy; set data.init_args.root"):
        data.read("train")
    np.save(tmp_path / "train_images.npy", np.zeros((3, 64, 64, 3), np.uint8))
    with pytest.raises(
        ValueError, match=r"holds uint8 of shape \(3, 64, 64, 3\); expected uint8 of shape \(N, 3, 64, 64\)"
    ):
        data.read("train")


def latents(batches=0, rank=0, seed=0, n=64):
    """A batch of posteriors with the paper's channel means and spreads, as the model sees it."""
    rng = np.random.default_rng(1)
    mean, std = (np.array(v)[:, None, None] for v in ((1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31)))
    means = mean + std * rng.standard_normal((n, 4, 64, 64))
    moments = np.concatenate([means, np.full_like(means, 0.3)], 1).astype(np.float16)
    data = ImageNetLatentDataModule(seed=seed)
    progress = SimpleNamespace(total=SimpleNamespace(ready=batches))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(fit_loop=loop, global_rank=rank)
    return data.on_after_batch_transfer((torch.from_numpy(moments), torch.arange(n)), 0), torch.from_numpy(
        means
    ).float()


def test_a_posterior_sample_whitened_to_half():
    (x, label), means = latents()
    assert x.dtype == torch.float32 and label.tolist() == list(range(64))
    assert x.mean((0, 2, 3)).abs().max() < 0.01
    assert (x.std((0, 2, 3)) - 0.5).abs().max() < 0.01
    noise = x - whiten(means, (1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31))
    expected = 0.3 * 0.5 / torch.tensor([5.27, 5.91, 4.21, 4.31])
    torch.testing.assert_close(noise.std((0, 2, 3)), expected, rtol=0.02, atol=0)


def test_the_sample_is_fresh_at_each_batch_rank_and_seed_and_repeatable():
    first = latents(n=2)[0][0]
    assert torch.equal(latents(n=2)[0][0], first)
    for other in ({"batches": 1}, {"rank": 1}, {"seed": 1}):
        assert not torch.equal(latents(n=2, **other)[0][0], first), other


def test_latents_are_no_images():
    with pytest.raises(NotImplementedError, match="has no VAE decoder"):
        ImageNetLatentDataModule().to_uint8(torch.zeros(1, 4, 64, 64))
