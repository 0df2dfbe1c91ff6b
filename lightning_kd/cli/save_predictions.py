"""The callback that writes what ``lightning-kd predict`` predicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_kd.cli.errors import UsageError


class SavePredictions(BasePredictionWriter):
    """Writes all predictions to a file that ``torch.load`` reads, in the order of the data.

    Args:
        output: The file. Each of several processes writes one of its own, with its number before the ending.
    """

    def __init__(self, output: Path) -> None:
        super().__init__("epoch")
        if output.is_dir():
            raise UsageError(f"--output: expected a file for the predictions, received the folder {output}")
        self.output = output

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write one tensor, if every batch gave one; else the list of what the batches gave."""
        output = self.output
        if trainer.world_size > 1:
            output = output.with_stem(f"{output.stem}-{trainer.global_rank}")
        tensors = predictions and all(isinstance(each, Tensor) for each in predictions)
        output.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat(list(predictions)) if tensors else list(predictions), output)
        print(f"predictions saved: {output}")
