"""Two samples of the training data, as a batch, before the training loop exists."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset


def first_samples(trainer: Trainer, pl_module: LightningModule) -> Any:
    """Returns a small training batch on the student's device, in the format of the module's own batches.

    No worker is started and no sampler is asked where the data has indices; other data gives its first batch.
    """
    # The one place where Lightning keeps the loader before the loop makes it, whichever way it was given.
    loader = trainer.fit_loop._data_source.dataloader()
    batch = trainer.precision_plugin.convert_input(_small_batch(loader))
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _small_batch(loader: Any) -> Any:
    if isinstance(loader, CombinedLoader):
        return _small_batch(loader.iterables)
    if isinstance(loader, Mapping):
        return {key: _small_batch(value) for key, value in loader.items()}
    if isinstance(loader, (list, tuple)):
        return [_small_batch(value) for value in loader]
    indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if indexed and hasattr(loader.dataset, "__len__") and loader._auto_collation:
        indices = list(islice(range(len(loader.dataset)), 2))
        many = getattr(loader.dataset, "__getitems__", None)
        return loader.collate_fn(many(indices) if many else [loader.dataset[i] for i in indices])
    return next(iter(loader))
