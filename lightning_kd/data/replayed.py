"""Replayed: augmentation that is random once, and then the same."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_kd.numbers import is_whole


class Replayed(Dataset[Any]):
    """Fixes the random augmentation of a data set: item ``i`` is the same, whenever and wherever it is read.

    Item ``i`` is item ``i % N`` of the data set of N samples, made with Python's, NumPy's and torch's random numbers
    seeded by ``(seed, i)``. So with ``views=4`` there are four views of each sample, an epoch passes over all of
    them, and a quarter of the epochs is as long as before. Whatever draws from these three is covered, all of
    torchvision's transforms for one. A generator that a transform keeps for itself, and what mixes the samples of a
    batch, are not.

    Args:
        dataset: Data with a length whose items are augmented when they are read.
        views: How many different views of each sample there are.
        seed: Seed of all of them.

    Raises:
        ValueError: If there is no view.
        TypeError: If the data set has no length.

    Example:
        >>> class Noisy(Dataset):
        ...     def __len__(self): return 3
        ...     def __getitem__(self, index): return torch.rand(())
        >>> data = Replayed(Noisy(), views=2)
        >>> len(data), bool(data[1] == data[1]), bool(data[1] == data[4])
        (6, True, False)
    """

    def __init__(self, dataset: Any, views: int = 1, seed: int = 0) -> None:
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"Replayed takes a data set with a length, and {type(dataset).__name__} has none.")
        if not is_whole(views) or views < 1:
            raise ValueError(f"views is a whole number, 1 or more; got {views!r}.")
        self.dataset = dataset
        self.views = views
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset) * self.views

    def __getitem__(self, index: int) -> Any:
        """One view of one sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)} views")
        with _seeded(self.seed, index):
            return self.dataset[index % len(self.dataset)]


@contextmanager
def _seeded(seed: int, index: int) -> Iterator[None]:
    """Seeds what draws random numbers, and puts it back."""
    # Seeds that follow each other give Mersenne twisters that are alike: they are mixed first.
    state = np.random.SeedSequence([seed, index]).generate_state(2)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(state[0]))
    np.random.seed(int(state[0]))
    torch.default_generator.manual_seed(int(state[1]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
