"""Callbacks: averages by hand, warm-up, pictures."""

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from torchvision.io import decode_png, read_image

from sclightning.callbacks import EMA, SampleGrid, SampleWriter, TangentWarmup
from sclightning.callbacks.ema import power_exponent
from sclightning.data import DigitsDataModule
from sclightning.data.arrays import to_uint8
from sclightning.modules import ConsistencyTraining, TrigFlowDiffusion

pytestmark = pytest.mark.filterwarnings("ignore")
B = 4


class Weights(L.Callback):
    """The backbone's weights after every batch, in a vector, and the number of steps by then."""

    def __init__(self):
        self.rows, self.steps = [], []

    def on_train_start(self, trainer, pl_module):
        self.start = vector(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rows.append(vector(pl_module))
        self.steps.append(trainer.global_step)


def vector(module):
    return torch.nn.utils.parameters_to_vector(module.backbone.parameters()).detach().clone()


def averages(ema):
    return torch.cat([average.flatten() for average in ema._average.values()])


class Averages(L.Callback):
    """The running average after every batch; to be listed behind the EMA."""

    def __init__(self, ema):
        self.ema, self.rows = ema, []

    def on_train_batch_end(self, *_):
        self.rows.append(averages(self.ema).clone())


def make_module(make_plain_net):
    """A module whose weights move a lot in each step."""
    return TrigFlowDiffusion(make_plain_net(), sigma_data=0.75, optimizer=lambda p: torch.optim.Adam(p, lr=0.1))


@pytest.fixture
def loader():
    """Images without labels, enough for 16 batches of 4."""
    return DataLoader(torch.from_numpy(np.random.default_rng(0).standard_normal((64, 1, 8, 8))).float(), batch_size=B)


def run(module, quiet, tmp_path, loader, *callbacks, max_steps=8, ckpt_path=None, **options):
    trainer = L.Trainer(**{**quiet, **options}, max_steps=max_steps, default_root_dir=tmp_path, callbacks=[*callbacks])
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


# --- EMA --------------------------------------------------------------------------------------------------------------


def decay(images, new):
    return 0.9


def half_life(images, new):
    return 0.5 ** (new / 20)


def ramped_half_life(images, new):
    return 0.5 ** (new / min(20, 0.5 * images))


def power(images, new):
    return (1 - new / images) ** (power_exponent(0.15) + 1)


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"decay": 0.9}, decay),
        ({"half_life": 20, "ramp_up": None}, half_life),
        ({"half_life": 20, "ramp_up": 0.5}, ramped_half_life),
        ({"sigma_rel": 0.15}, power),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_average_by_hand(make_plain_net, quiet, tmp_path, loader, options, rate, accumulate):
    """The recursion a <- beta a + (1 - beta) w, one update per optimizer step, beta from the images it covers."""
    ema, weights = EMA(**options), Weights()
    after = Averages(ema)
    steps = 5
    run(
        make_module(make_plain_net),
        quiet,
        tmp_path,
        loader,
        ema,
        weights,
        after,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
    )
    assert len(weights.rows) == steps * accumulate and ema.images == B * steps * accumulate
    expected, new = weights.start, B * accumulate
    for batch in range(steps * accumulate):
        if (batch + 1) % accumulate == 0:
            beta = rate(B * (batch + 1), new)
            expected = beta * expected + (1 - beta) * weights.rows[batch]
        torch.testing.assert_close(after.rows[batch], expected, rtol=1e-5, atol=1e-6)
    assert (after.rows[-1] - weights.rows[-1]).abs().max() > 1e-3


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_power_exponent_is_the_published_one(sigma_rel, gamma):
    """EDM2, Sec. 3.1: gamma 6.94 for a width of 0.10 and 16.97 for 0.05."""
    assert power_exponent(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10, 0.20])
def test_power_average_has_the_width_that_was_asked_for(sigma_rel):
    """Standard deviation of the weights' times in the average, measured, relative to the length of training."""
    ema, n = EMA(sigma_rel=sigma_rel), 2000
    share = np.zeros(n)
    for step in range(n):
        ema.images += B
        beta = ema.rate(B)
        share *= beta
        share[step] = 1 - beta
    time = (np.arange(n) + 0.5) / n
    mean = (share * time).sum()
    assert share.sum() == pytest.approx(1, abs=1e-9)
    assert np.sqrt((share * (time - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=0.005)


@pytest.mark.parametrize("options", [{}, {"decay": 0.9, "half_life": 100}, {"half_life": 100, "sigma_rel": 0.1}])
def test_ema_wants_exactly_one_length(options):
    """The message names what was given and what there is."""
    with pytest.raises(ValueError, match="exactly one of decay, half_life, sigma_rel") as error:
        EMA(**options)
    assert "\n" not in str(error.value) and all(name in str(error.value) for name in options)


def test_checkpoints_of_weights_only_are_refused(make_plain_net, quiet, tmp_path, loader):
    """Lightning asks no callback for them, so they would hold the weights in training."""
    save = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.raises(ValueError, match="save_weights_only"):
        run(
            make_module(make_plain_net), quiet, tmp_path, loader, EMA(decay=0.9), save,
            enable_checkpointing=True,
        )  # fmt: skip


def test_resuming_without_the_average_is_noticed(make_plain_net, quiet, tmp_path, loader, recwarn):
    """The weights are the averages then, which is said; with the callback nothing is."""
    run(make_module(make_plain_net), quiet, tmp_path, loader, EMA(decay=0.9), SaveAt(3, tmp_path))
    for callbacks, warned in (([EMA(decay=0.9)], False), ([], True)):
        recwarn.clear()
        run(make_module(make_plain_net), quiet, tmp_path, loader, *callbacks, ckpt_path=tmp_path / "step3.ckpt")
        assert any("without the callback EMA" in str(w.message) for w in recwarn) == warned


def test_a_new_average_in_a_resumed_run_is_noticed(make_plain_net, quiet, tmp_path, loader, recwarn):
    """A checkpoint that was saved after ``fit`` has the average as its weights and no average to continue."""
    module, trainer = make_module(make_plain_net), L.Trainer(**quiet, max_steps=3, callbacks=[EMA(decay=0.9)])
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    run(make_module(make_plain_net), quiet, tmp_path, loader, EMA(decay=0.9), SaveAt(3, tmp_path))
    for name, warned in (("step3", False), ("after", True)):
        recwarn.clear()
        run(make_module(make_plain_net), quiet, tmp_path, loader, EMA(decay=0.9), ckpt_path=tmp_path / f"{name}.ckpt")
        assert any("no average to continue" in str(w.message) for w in recwarn) == warned


def test_fit_without_a_step_leaves_the_weights(make_plain_net, quiet, tmp_path, loader):
    module = make_module(make_plain_net)
    before = vector(module)
    run(module, quiet, tmp_path, loader, EMA(decay=0.9), max_steps=0)
    assert torch.equal(vector(module), before)


@pytest.mark.parametrize("sigma_rel", [0.0, 0.2887, 0.5, -0.1])
def test_impossible_width_is_refused(sigma_rel):
    """No power function is as narrow as a point or wider than the plain mean."""
    with pytest.raises(ValueError, match=r"0\.2887"):
        EMA(sigma_rel=sigma_rel)


class Validated(ConsistencyTraining):
    """Remembers the weights that validation saw."""

    def validation_step(self, batch, batch_idx):
        self.seen.append(vector(self))


def test_validation_sees_the_average_and_training_goes_on_untouched(make_plain_net, quiet, tmp_path, loader):
    """Swapped in for validation, swapped out bit for bit; a checkpoint saved in between holds both."""
    finals, path = [], tmp_path / "inside.ckpt"

    class Inside(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            if trainer.global_step == 4:
                trainer.save_checkpoint(path)

    for validate in (True, False):
        module = Validated(make_plain_net(), sigma_data=0.75, optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
        module.seen = []
        ema, weights = EMA(decay=0.8), Weights()
        after = Averages(ema)
        trainer = L.Trainer(
            **{**quiet, "limit_val_batches": 1 if validate else 0},
            max_steps=6,
            val_check_interval=2,
            check_val_every_n_epoch=None,
            default_root_dir=tmp_path,
            callbacks=[ema, weights, after, Inside()],
        )
        trainer.fit(module, loader, loader)
        finals.append(torch.stack(weights.rows))
        if validate:
            assert len(module.seen) == 3
            for seen, step in zip(module.seen, (2, 4, 6), strict=True):
                assert torch.equal(seen, after.rows[step - 1]) and not torch.equal(seen, weights.rows[step - 1])
            saved = torch.load(path, weights_only=True)
            assert torch.equal(stacked(saved["state_dict"], "backbone."), after.rows[3])
            assert torch.equal(stacked(saved["ema"]["weights"]), weights.rows[3])
    assert torch.equal(*finals)


def stacked(tensors, prefix=""):
    return torch.cat([v.flatten() for k, v in tensors.items() if k.startswith(prefix)])


def test_checkpoint_has_averages_in_place_and_the_rest_beside(make_plain_net, quiet, tmp_path, loader):
    """``state_dict`` holds the averages of the backbone, ``ema`` the weights in training; both load weights-only."""
    path = tmp_path / "run.ckpt"

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                trainer.save_checkpoint(path)

    ema, weights = EMA(half_life=10), Weights()
    after = Averages(ema)
    run(make_module(make_plain_net), quiet, tmp_path, loader, ema, weights, after, Save(), max_steps=6)
    saved = torch.load(path, weights_only=True)
    assert torch.equal(stacked(saved["state_dict"], "backbone."), after.rows[4])
    assert torch.equal(stacked(saved["ema"]["weights"]), weights.rows[4])
    assert saved["ema"]["images"] == 5 * B
    assert any(name.startswith("adaptive_weight") for name in saved["state_dict"])


def test_checkpoint_has_averages_under_all_names_of_a_shared_parameter(make_plain_net, quiet, tmp_path, loader):
    """The last name is what is loaded last, so it must not bring the weights in training."""
    net = make_plain_net()
    net.twin = net.conv0
    module = TrigFlowDiffusion(net, sigma_data=0.752, optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    ema = EMA(decay=0.9)
    run(module, quiet, tmp_path, loader, ema, after := Averages(ema), SaveAt(3, tmp_path), max_steps=4)
    saved = torch.load(tmp_path / "step3.ckpt", weights_only=True)["state_dict"]
    module.load_state_dict(saved)
    assert torch.equal(vector(module), after.rows[2])
    assert torch.equal(saved["backbone.twin.weight"], saved["backbone.conv0.weight"])


@pytest.mark.parametrize("options", [{"decay": 0.9}, {"half_life": 30, "ramp_up": 0.5}, {"sigma_rel": 0.1}])
def test_average_and_weights_continue_exactly_after_a_resume(make_plain_net, quiet, tmp_path, options):
    """Three steps, a checkpoint and three more give bit for bit what six steps give."""
    results = []
    for parts in ([6], [3, 6]):
        path = None
        for end in parts:
            module, ema = make_module(make_plain_net), EMA(**options)
            weights, after = Weights(), Averages(ema)
            data = DigitsDataModule(batch_size=B)
            data.on_after_batch_transfer = lambda batch, i: batch[0].float() / 127.5 - 1
            trainer = L.Trainer(
                **quiet, max_steps=end, default_root_dir=tmp_path, callbacks=[ema, weights, after, SaveAt(3, tmp_path)]
            )
            trainer.fit(module, datamodule=data, ckpt_path=path)
            path = tmp_path / "step3.ckpt"
        results.append((weights.rows[-1], after.rows[-1], torch.tensor(ema.images)))
    for unbroken, resumed in zip(*results, strict=True):
        assert torch.equal(unbroken, resumed)


def test_weights_in_bfloat16_have_an_average_in_float32(make_net, quiet, tmp_path):
    """Its steps of a thousandth would be rounded away; from a checkpoint it goes on to the last bit."""
    results = []
    for parts in ([4], [2, 4]):
        path = None
        for end in parts:
            module = TrigFlowDiffusion(make_net(), sigma_data=0.752, optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
            ema, weights = EMA(decay=0.999), Weights()
            after = Averages(ema)
            callbacks, options = [ema, weights, after, SaveAt(2, tmp_path)], {"precision": "bf16-true"}
            trainer = L.Trainer(**quiet, **options, max_steps=end, default_root_dir=tmp_path, callbacks=callbacks)
            trainer.fit(module, datamodule=DigitsDataModule(batch_size=B), ckpt_path=path)
            path = tmp_path / "step2.ckpt"
        if len(parts) == 1:
            assert weights.start.dtype == vector(module).dtype == torch.bfloat16
            expected = weights.start.float()
            for row in weights.rows:
                expected = 0.999 * expected + 0.001 * row.float()
            torch.testing.assert_close(after.rows[-1], expected, rtol=1e-6, atol=1e-7)
            assert ((expected - weights.start).abs() > 1e-5).float().mean() > 0.9
        results.append((weights.rows[-1], after.rows[-1]))
    for unbroken, resumed in zip(*results, strict=True):
        assert torch.equal(unbroken, resumed)


class SaveAt(L.Callback):
    """Saves a checkpoint at a step."""

    def __init__(self, step, folder):
        self.step, self.folder = step, folder

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.folder / f"step{self.step}.ckpt")


def test_average_is_left_in_the_module_when_fit_ends(make_plain_net, quiet, tmp_path, loader):
    """Whoever samples after ``fit`` samples from the average."""
    module, ema, weights = make_module(make_plain_net), EMA(decay=0.8), Weights()
    after = Averages(ema)
    run(module, quiet, tmp_path, loader, ema, weights, after)
    assert torch.equal(vector(module), after.rows[-1]) and not torch.equal(vector(module), weights.rows[-1])


def test_average_does_not_change_training(make_plain_net, quiet, tmp_path, loader):
    """With and without: the same weights in training."""
    finals = []
    for callbacks in ([], [EMA(decay=0.8)]):
        weights = Weights()
        run(make_module(make_plain_net), quiet, tmp_path, loader, *callbacks, weights)
        finals.append(torch.stack(weights.rows))
    assert torch.equal(*finals)


# --- Tangent warm-up --------------------------------------------------------------------------------------------------


def test_tangent_warmup_is_step_over_h(make_plain_net, quiet, tmp_path, loader):
    """The fade is r = min(1, step/H), by optimizer step and not by batch."""
    seen = []

    class See(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.tangent_warmup.item())

    module = ConsistencyTraining(make_plain_net(), sigma_data=0.75)
    assert module.tangent_warmup.item() == 1
    run(module, quiet, tmp_path, loader, TangentWarmup(4), See(), max_steps=6, accumulate_grad_batches=2)
    assert seen == [r for r in (0, 0.25, 0.5, 0.75, 1, 1) for _ in range(2)]
    assert "tangent_warmup" not in module.state_dict()
    with pytest.raises(ValueError, match=r"TrigFlowDiffusion has not; leave the callback out"):
        run(make_module(make_plain_net), quiet, tmp_path, loader, TangentWarmup(4))


# --- Pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(make_net):
    """A consistency model whose samples are grey values, not all black or white."""
    net = make_net()
    return ConsistencyTraining(net, sigma_data=0.752, seed=3)


def test_sample_grid_is_the_samples(model, quiet, tmp_path):
    """Cell by cell the fixed-seed samples of the classes in turn, as PNG and in TensorBoard."""
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    options = {**quiet, "logger": logger, "limit_val_batches": 1}
    trainer = L.Trainer(**options, default_root_dir=tmp_path, callbacks=[SampleGrid(rows=2, columns=5)])
    trainer.validate(model, datamodule=DigitsDataModule(num_val_samples=2), verbose=False)
    picture = read_image(str(tmp_path / "run" / "samples" / "step_0000000.png"))
    assert picture.shape == (3, 1 + 2 * 9, 1 + 5 * 9)
    expected = to_uint8(model.sample(range(10), (1, 8, 8), torch.arange(10)))
    assert expected.float().std() > 10
    for k in range(10):
        top, left = 1 + k // 5 * 9, 1 + k % 5 * 9
        cell = picture[:, top : top + 8, left : left + 8]
        assert torch.equal(cell, expected[k].expand(3, -1, -1))
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    (image,) = events.Images("samples")
    assert torch.equal(decode_png(torch.frombuffer(bytearray(image.encoded_image_string), dtype=torch.uint8)), picture)


def test_sample_grid_needs_no_logger(model, quiet, tmp_path):
    """Without TensorBoard the PNG lies under the trainer's root."""
    trainer = L.Trainer(**{**quiet, "limit_val_batches": 1}, default_root_dir=tmp_path, callbacks=[SampleGrid(1, 2)])
    trainer.validate(model, datamodule=DigitsDataModule(num_val_samples=2), verbose=False)
    assert (tmp_path / "samples" / "step_0000000.png").is_file()


def test_sample_writer_names_images_by_index(model, quiet, tmp_path):
    """Every sample asked for, in a file of its own, over several batches."""
    folder = tmp_path / "made" / "here"
    trainer = L.Trainer(**quiet, default_root_dir=tmp_path, callbacks=[SampleWriter(str(folder))])
    trainer.predict(model, datamodule=DigitsDataModule(num_test_samples=7, sample_batch_size=3))
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:06d}.png" for i in range(7)]
    expected = to_uint8(model.sample(range(7), (1, 8, 8), torch.arange(7)))
    written = torch.stack([read_image(str(folder / f"{i:06d}.png")) for i in range(7)])
    assert (written.int() - expected.int()).abs().max() <= 1  # another batch size may round another way
    assert (written[0] != written[1]).any()
