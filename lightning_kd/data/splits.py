"""Loaders over three splits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_kd.numbers import is_number


class SplitDataModule(LightningDataModule):
    """Loaders over the splits ``train``, ``val`` and ``test``, which a subclass puts into ``splits`` in ``setup``.

    Args:
        batch_size: Samples in a batch.
        num_workers: Processes that load.
        collate: Makes a batch of samples.

    Raises:
        ValueError: If the training split is smaller than a batch.
    """

    num_classes: int

    def __init__(self, batch_size: int, num_workers: int, collate: Callable[[Any], Any]) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.splits: dict[str, Dataset[Any]] = {}
        self._collate = collate

    def _loader(self, split: str) -> DataLoader[Any]:
        training = split == "train"
        images = len(self.splits[split])  # type: ignore[arg-type]  # ours have a length
        if training and images < self.batch_size:
            raise ValueError(
                f"the training data gives no batch: {images} images, and incomplete batches of "
                f"batch_size={self.batch_size} are dropped. Lower batch_size"
            )
        return DataLoader(
            self.splits[split],
            batch_size=self.batch_size,
            shuffle=training,
            drop_last=training,
            num_workers=self.num_workers,
            collate_fn=self._collate,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training split; an incomplete last one is dropped."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the validation split, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, in order."""
        return self._loader("test")


def checked_fraction(labelled: float) -> float:
    """Returns the fraction of the training data that has labels.

    Raises:
        ValueError: If it is not in (0, 1].
    """
    if not (is_number(labelled) and 0.0 < labelled <= 1.0):
        raise ValueError(f"labelled: expected a fraction of the training images in (0, 1], received {labelled}")
    return labelled


def labelled_count(labelled: float, count: int) -> int:
    """Returns how many of that many have labels: at least one."""
    return max(1, round(labelled * count))
