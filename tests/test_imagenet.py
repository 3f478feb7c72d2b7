"""ImageNet 64 and the latents of ImageNet 512 from memory-mapped arrays."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sclightning.data.imagenet64 import ImageNet64DataModule
from sclightning.data.latents import ImageNetLatentDataModule, posterior_noise, whiten
from sclightning.data.storage import write_metadata


def store(root, kind, array, labels, num_classes=1000, convention=None):
    np.save(root / f"train_{kind}.npy", array)
    np.save(root / "train_labels.npy", np.array(labels))
    write_metadata(root, "train", kind, num_classes, convention)


def test_images_are_mapped_not_read(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), np.uint8)
    store(tmp_path, "images", images, [5, 999, 0])
    split = ImageNet64DataModule(root=str(tmp_path)).split("train")
    assert isinstance(split.images, np.memmap)
    x, label = split.__getitems__([2, 1])
    assert torch.equal(x, torch.from_numpy(images[[2, 1]])) and label.tolist() == [0, 999]


def test_images_of_another_kind(tmp_path):
    """Other sizes and classes by argument; unconditional data comes without labels."""
    store(tmp_path, "images", np.zeros((3, 3, 8, 8), np.uint8), [0, 0, 0], 0)
    data = ImageNet64DataModule(str(tmp_path), "mine", [3, 8, 8], 0)
    assert (data.name, data.image_shape, data.num_classes) == ("mine", (3, 8, 8), 0)
    x_0 = data.on_after_batch_transfer([*data.split("train").__getitems__([0, 1])], 0)  # a list, as pinning makes it
    assert torch.equal(x_0, torch.full((2, 3, 8, 8), -1.0))


def test_wrong_arrays_get_one_sentence(tmp_path):
    data = ImageNet64DataModule(root=str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"no prepared data at .*train.json; make it with 'sclightning prepare'"
    ):
        data.read("train")
    store(tmp_path, "images", np.zeros((3, 64, 64, 3), np.uint8), [0, 1, 2])
    with pytest.raises(
        ValueError, match=r"holds uint8 of shape \(3, 64, 64, 3\); expected uint8 of shape \(N, 3, 64, 64\)"
    ):
        data.read("train")


@pytest.mark.parametrize(("stored", "given"), [("paper", "edm2"), ("edm2", "paper")])
def test_latents_of_another_convention_are_refused(tmp_path, stored, given):
    store(tmp_path, "moments", np.zeros((2, 8, 64, 64), np.float16), [0, 1], convention=stored)
    assert len(ImageNetLatentDataModule(str(tmp_path), stored).split("train")) == 2
    with pytest.raises(
        ValueError, match=f"in the convention '{stored}', the data module was given '{given}'; set data"
    ):
        ImageNetLatentDataModule(str(tmp_path), given).split("train")


MEAN, STD = (1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31)


def latents(position=0, rank=0, world=1, seed=0, n=64, **options):
    """A batch of posteriors with the paper's channel means and spreads, as the model sees it."""
    rng = np.random.default_rng(1)
    mean, std = (np.array(v)[:, None, None] for v in (MEAN, STD))
    means = mean + std * rng.standard_normal((n, 4, 64, 64))
    moments = np.concatenate([means, np.full_like(means, 0.3)], 1).astype(np.float16)
    data = ImageNetLatentDataModule(seed=seed, **options)
    data.load_state_dict({"position": position, "batches": 0})
    progress = SimpleNamespace(total=SimpleNamespace(processed=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(fit_loop=loop, global_rank=rank, world_size=world)
    return data.on_after_batch_transfer((torch.from_numpy(moments), torch.arange(n)), 0), torch.from_numpy(
        means
    ).float()


def test_a_posterior_sample_whitened_to_half():
    (x, label), means = latents()
    assert x.dtype == torch.float32 and label.tolist() == list(range(64))
    assert x.mean((0, 2, 3)).abs().max() < 0.01
    assert (x.std((0, 2, 3)) - 0.5).abs().max() < 0.01
    noise = x - whiten(means, MEAN, STD)
    torch.testing.assert_close(noise.std((0, 2, 3)), 0.3 * 0.5 / torch.tensor(STD), rtol=0.02, atol=0)


def test_statistics_follow_the_convention_or_are_given():
    means = latents(n=2)[1]
    edm2 = whiten(means, (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28))
    assert (latents(n=2, convention="edm2")[0][0] - edm2).abs().max() < 0.3
    given = latents(n=2, mean=[0, 0, 0, 0], std=[1, 2, 3, 4])[0][0]
    assert (given - whiten(means, [0, 0, 0, 0], [1, 2, 3, 4])).abs().max() < 1
    with pytest.raises(
        ValueError, match="There are 4 channel means and 4 standard deviations for latents of 16 channels"
    ):
        ImageNetLatentDataModule(image_shape=(16, 64, 64))


def test_the_sample_is_fresh_at_each_visit_and_a_function_of_its_position():
    """Whatever batch and process a position falls to: two processes at position 0 draw what one draws."""
    alone = latents(n=4)[0][0] - latents(n=4, seed=9)[0][0]  # the difference of two draws, free of the means
    shares = [latents(n=2, rank=r, world=2)[0][0] - latents(n=2, rank=r, world=2, seed=9)[0][0] for r in (0, 1)]
    torch.testing.assert_close(torch.stack(shares, 1).flatten(0, 1), alone, rtol=0, atol=1e-6)
    later = latents(n=2, position=2)[0][0] - latents(n=2, position=2, seed=9)[0][0]
    torch.testing.assert_close(later, alone[2:], rtol=0, atol=1e-6)
    assert not (alone[0] == alone[1]).any()


def test_posterior_noise_is_unit_noise():
    z = posterior_noise((4, 32, 32), 0, range(16), torch.device("cpu"))
    assert z.mean().item() == pytest.approx(0, abs=0.02) and z.std().item() == pytest.approx(1, abs=0.01)
    assert np.corrcoef(z.flatten(1))[np.triu_indices(16, 1)] == pytest.approx(np.zeros(120), abs=0.08)


def test_pictures_of_latents_need_a_decoder_and_references_are_elsewhere():
    with pytest.raises(ValueError, match=r"set data.init_args.vae"):
        ImageNetLatentDataModule().to_uint8(torch.zeros(1, 4, 64, 64))
    with pytest.raises(ValueError, match="give reference statistics"):
        ImageNetLatentDataModule().reference_dataloader("train")


def test_pictures_are_decoded_at_the_encoders_scale(tiny_vae):
    """The whitening is undone before the decoder sees the latents."""
    from sclightning.data.autoencoder import decode, load_vae

    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 5
    data = ImageNetLatentDataModule(vae=tiny_vae, convention="edm2", image_shape=(4, 8, 8))
    pictures = data.to_uint8(whiten(latents, data.mean, data.std))
    assert (pictures.int() - decode(load_vae(tiny_vae), latents, "edm2").int()).abs().max() <= 1
    assert pictures.shape == (2, 3, 16, 16)
