"""Augmentation that is replayed: a function of the sample's number, in any process."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from lightning_kd.data import Replayed


class Images(Dataset[Any]):
    """Images that torchvision augments, and Python and NumPy too."""

    transform = v2.Compose([v2.RandomResizedCrop(8), v2.RandomHorizontalFlip(), v2.ColorJitter(0.5)])

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        image = torch.arange(3 * 12 * 12).view(3, 12, 12) / 432 + index
        return self.transform(image) + random.random() + float(np.random.rand())


def test_a_view_is_the_same_in_any_process() -> None:
    data = Replayed(Images(), views=2, seed=3)
    assert len(data) == 12
    alone = torch.stack([data[i] for i in range(12)])
    assert torch.equal(torch.cat([*DataLoader(data, batch_size=5, num_workers=2)]), alone)
    assert torch.equal(torch.stack([data[i] for i in reversed(range(12))]).flip(0), alone)
    flat = alone.flatten(1)
    assert len(flat.unique(dim=0)) == 12  # no two are alike, of one image neither
    assert not torch.equal(Replayed(Images(), views=2, seed=4)[0], alone[0])


def test_random_numbers_around_it_go_on() -> None:
    data, states = Replayed(Images()), (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())
    data[0]
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_refuses() -> None:
    with pytest.raises(ValueError, match="views is a whole number"):
        Replayed(Images(), views=0)
    with pytest.raises(TypeError, match="a data set with a length"):
        Replayed(iter([]))
    with pytest.raises(IndexError, match="6 of 6"):
        Replayed(Images())[6]
