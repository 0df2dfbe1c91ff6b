"""Progress that shows every term: a bar in a terminal, a line per epoch in a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


def progress() -> Callback:
    """What suits where standard error goes."""
    return TermsProgressBar() if sys.stderr.isatty() else EpochLines()


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's banner of each run; warnings are shown."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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
        return {k: v for k, v in shown.items() if not k.startswith("train/")} | _losses(trainer)


class EpochLines(Callback):
    """Prints the training losses, term by term, and Lightning's metrics, some ten times in a fit when an epoch ends."""

    def __init__(self) -> None:
        self._validated = -1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember that what is measured is of this epoch."""
        self._validated = trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print one line."""
        epoch, last = trainer.current_epoch + 1, trainer.max_epochs or -1
        if epoch % max(1, last // 10) and epoch != last:
            return
        old = ("train/",) if self._validated == trainer.current_epoch else ("train/", "val/")
        measured = {k: f"{v:.3g}" for k, v in trainer.progress_bar_metrics.items() if not k.startswith(old)}
        if trainer.is_global_zero:
            said = ", ".join(f"{k} {v}" for k, v in (_losses(trainer) | measured).items())
            print(f"epoch {epoch}: {said}", flush=True)


def _losses(trainer: Trainer) -> dict[str, str]:
    losses = {k.removeprefix("train/"): v for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
    return {k: f"{float(v):.3g}" for k, v in losses.items() if not k.endswith(("_step", "_epoch"))}
