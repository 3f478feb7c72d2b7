"""EDM2's gradient sanitising as an option."""

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from sclightning.callbacks import FiniteGradients, GradientNorm


class Exploding(L.LightningModule):
    """Two weights; the gradient of the second is not finite in the second batch."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.weight = nn.Parameter(torch.ones(2))

    def training_step(self, batch, batch_idx):
        return (self.weight * batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, fused=self.fused)


def run(*callbacks, fused=False, **options):
    model = Exploding(fused)
    batches = torch.tensor([[1.0, 1.0], [1.0, torch.inf], [1.0, torch.nan]])
    logged = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=list(callbacks), enable_model_summary=False, **logged, **options
    )
    trainer.fit(model, DataLoader(batches))
    return model.weight.tolist(), trainer.callback_metrics


def test_gradients_that_are_not_finite_become_zero_and_are_counted():
    weight, metrics = run(FiniteGradients())
    torch.testing.assert_close(torch.tensor(weight), torch.tensor([0.7, 0.9]))
    assert metrics["nonfinite_gradients"] == 1  # of the last step


@pytest.mark.parametrize("callbacks", [[FiniteGradients()], [GradientNorm(), FiniteGradients()]])
@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaler_skips_such_steps_all_the_same(fused, callbacks):
    """That of 16-mixed looks before the callback does; neither bad batch takes a step, each halves the scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weight, _ = run(*callbacks, fused=fused, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    torch.testing.assert_close(torch.tensor(weight), torch.tensor([0.9, 0.9]))
    assert scaler.get_scale() == 2


def test_without_the_callback_they_spoil_the_weights():
    assert not all(torch.tensor(run()[0]).isfinite())
