"""What the callbacks about the tangent share."""

import lightning as L

from sclightning.modules.consistency import ConsistencyModel


class TangentCallback(L.Callback):
    """Refuses a module without tangent."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look at the module's class.

        Raises:
            ValueError: If the module is no consistency model.
        """
        if not isinstance(pl_module, ConsistencyModel):
            raise ValueError(
                f"{type(self).__name__} needs the tangent of a consistency model, which {type(pl_module).__name__} has "
                "not; leave the callback out."
            )
