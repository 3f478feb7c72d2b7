"""The norm that the optimizer would see without clipping."""

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from sclightning.callbacks import FiniteGradients, GradientNorm

pytestmark = pytest.mark.filterwarnings("ignore")


class Linear(L.LightningModule):
    """Two weights in two tensors whose gradient is the batch; one that has none."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.first, self.second, self.unused = (nn.Parameter(torch.ones(n)) for n in (1, 1, 3))
        self.seen = []

    def training_step(self, batch, batch_idx):
        return (self.first * batch[0, 0] + self.second * batch[0, 1]).sum()

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.seen.append(torch.cat([self.first.grad, self.second.grad]).norm().item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, fused=self.fused)


def run(batches, *callbacks, fused=False, **options):
    logged = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {"max_epochs": 1, "enable_model_summary": False} | options
    trainer, model = L.Trainer(accelerator="cpu", callbacks=list(callbacks), **logged, **options), Linear(fused)
    trainer.fit(model, DataLoader(torch.tensor(batches)))
    return trainer.callback_metrics["gradient_norm"].item(), model.seen[-1]


def test_norm_before_clipping():
    """3 and 4 make 5 whatever they are clipped to."""
    assert run([[3.0, 4.0]], GradientNorm()) == (5.0, 5.0)
    norm, clipped = run([[3.0, 4.0]], GradientNorm(), gradient_clip_val=0.5)
    assert norm == 5.0 and clipped == pytest.approx(0.5)


def test_norm_of_accumulated_gradients():
    """Once a step, of the sum that the optimizer gets."""
    assert run([[3.0, 0.0], [3.0, 8.0]], GradientNorm(), accumulate_grad_batches=2)[0] == 5.0


def test_gradients_that_are_not_finite_show():
    """Listed before the callback that replaces them."""
    norm, after = run([[3.0, float("nan")]], GradientNorm(), FiniteGradients())
    assert norm != norm and after == 3.0


@pytest.mark.parametrize("fused", [False, True])
def test_norm_after_unscaling(fused):
    """The loss scale of float16 training is no part of it, also where the optimizer takes it out itself."""
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert run([[3.0, 4.0]], GradientNorm(), fused=fused, plugins=[precision]) == (5.0, 5.0)
