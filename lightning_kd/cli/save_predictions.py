"""The callback that writes what ``lightning-kd predict`` predicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_kd.cli.errors import UsageError
from lightning_kd.predictions import PredictionFile, TorchFile
from lightning_kd.task import TaskAdapter


class SavePredictions(BasePredictionWriter):
    """Writes all predictions as the task has them saved, or to a file that ``torch.load`` reads.

    Args:
        output: Where to. Without an ending it gets the task's own; one in ``.pt`` is for ``torch.load``, whatever the
            task. Each of several processes writes a file of its own, with its number before the ending.
    """

    def __init__(self, output: Path) -> None:
        super().__init__("batch")
        self.output = output
        self.file: PredictionFile = TorchFile()
        self._seen = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide what to write, before anything is predicted."""
        task, output = pl_module.task, self.output
        assert isinstance(task, TaskAdapter)
        own = task.prediction_file()
        if own is not None and output.suffix != TorchFile.ending:
            self.file = own
        if output.suffix not in ("", self.file.ending):
            kind = f"a file that ends in {self.file.ending}" if self.file.ending else "a folder"
            other = "" if self.file.ending == TorchFile.ending else ", or a file that ends in .pt"
            raise UsageError(f"--output: expected {kind}{other}, received {output}")
        if not output.suffix:
            output = output.with_suffix(self.file.ending)
        if self.file.ending and output.is_dir():
            raise UsageError(f"--output: expected a file for the predictions, received the folder {output}")
        if not self.file.ending and output.is_file():
            raise UsageError(f"--output: expected a folder for the predictions, received the file {output}")
        if trainer.world_size > 1 and self.file.ending:
            output = output.with_stem(f"{output.stem}-{trainer.global_rank}")
        self.file.open(output)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Hand it on."""
        task: Any = pl_module.task
        images: Any = task.inputs(batch) if self.file.sized else None
        several = isinstance(images, (Tensor, list, tuple)) and all(
            isinstance(i, Tensor) and i.ndim > 1 for i in images
        )
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images] if several else []
        loaders: Any = trainer.predict_dataloaders
        loader = loaders[dataloader_idx] if isinstance(loaders, (list, tuple)) else loaders
        # Lightning does not know the indices of a sampler of batches that is someone's own.
        indices = list(batch_indices or range(self._seen, self._seen + len(sizes)))
        self._seen += len(sizes)
        self.file.add(prediction, indices, sizes, getattr(loader, "dataset", None))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish."""
        self.file.close()
        if trainer.is_global_zero or self.file.ending:
            print(f"predictions saved: {self.file.path}")
