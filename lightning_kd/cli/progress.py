"""A progress bar that shows every term."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class TermsProgressBar(TQDMProgressBar):
    """Lightning's bar with the training losses, term by term.

    It is drawn every 20 steps, since reading a value makes the host wait for the device.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=20)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Lightning's metrics, and all that are named ``train/...``."""
        shown: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        shown.pop("v_num", None)
        losses = {k.removeprefix("train/"): v for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        return {k: v for k, v in shown.items() if not k.startswith("train/")} | {
            k: f"{float(v):.3g}" for k, v in losses.items() if not k.endswith(("_step", "_epoch"))
        }
