"""Small image sets that live in memory as tensors, augmented a whole batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_kd.data.splits import SplitDataModule, checked_fraction, labelled_count
from lightning_kd.task import UNLABELLED

Batch = tuple[Tensor, Tensor]


class TensorImages(Dataset[Batch]):
    """Images and labels in memory, read a whole batch at a time.

    A loader that collates image by image spends longer on it than a small network does on the step.

    Args:
        images: ``(N, C, H, W)``, uint8.
        labels: ``(N,)``, int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        assert len(images) == len(labels), (len(images), len(labels))
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        """One image ``(C, H, W)`` and its label."""
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        """A batch ``(B, C, H, W)`` and its labels: what the loader calls when a dataset offers it."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]


def random_shift(images: Tensor, padding: int, mirror: bool) -> Tensor:
    """Every image shifted by up to ``padding`` pixels (zeros move in), and mirrored with probability 1/2.

    Args:
        images: ``(N, C, H, W)``, any dtype.
        padding: Largest shift, in pixels.
        mirror: Whether to mirror at all.

    Returns:
        ``(N, C, H, W)``, of the same dtype; the random numbers are torch's global ones.
    """
    n, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, (padding,) * 4)
    rows = torch.randint(2 * padding + 1, (n, 1), device=device) + torch.arange(height, device=device)
    columns = torch.randint(2 * padding + 1, (n, 1), device=device) + torch.arange(width, device=device)
    if mirror:
        columns = torch.where(torch.rand(n, 1, device=device) < 0.5, columns.flip(1), columns)
    pixel = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    pixel = pixel.view(n, 1, height * width).expand(n, channels, height * width)
    return padded.flatten(2).gather(2, pixel).view_as(images)


def hide_labels(labels: Tensor, labelled: float, seed: int) -> Tensor:
    """The labels of a fraction of every class; all others are ``UNLABELLED``.

    Args:
        labels: ``(N,)``, int64.
        labelled: Fraction in (0, 1] that stays; at least one of every class does.
        seed: Seed of the choice.
    """
    checked_fraction(labelled)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    hidden = torch.full_like(labels, UNLABELLED)
    for k in torch.unique(labels):
        of_class = order[labels[order] == k]
        kept = of_class[: labelled_count(labelled, len(of_class))]
        hidden[kept] = k
    return hidden


class RandomShift:
    """Shifts every image of a batch anew: a view of its own for a student or its teacher.

    Args:
        padding: Largest shift, in pixels.
        mirror: Whether to mirror half of the images, too.
    """

    def __init__(self, padding: int, mirror: bool = False) -> None:
        self.padding = padding
        self.mirror = mirror

    def __call__(self, images: Tensor) -> Tensor:
        """The images ``(N, C, H, W)``, shifted."""
        return random_shift(images, self.padding, self.mirror)


class TensorDataModule(SplitDataModule):
    """Loaders over three :class:`TensorImages`; batches become normalised floats on the device.

    A subclass fills ``splits`` (``train``, ``val``, ``test``) in ``setup`` and sets ``num_classes``.

    Args:
        batch_size: Images in a batch.
        num_workers: Processes that load; 0 is fastest for tensors in memory.
        mean: Subtracted from the pixels in [0, 1], per channel.
        std: The pixels are then divided by it, per channel.
        padding: Largest random shift of a training image, in pixels; 0: training images stay as they are.
        mirror: Whether training images that are shifted are also mirrored, half of them.
    """

    def __init__(
        self,
        batch_size: int,
        num_workers: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        padding: int = 0,
        mirror: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, _whole_batch)
        self.mean = mean
        self.std = std
        self.padding = padding
        self.mirror = mirror

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment a training batch, and normalise any: uint8 ``(N, C, H, W)`` to float32 of the same shape."""
        images, labels = batch
        if self.padding and self.trainer is not None and self.trainer.training:
            images = random_shift(images, self.padding, self.mirror)
        return normalized(images, self.mean, self.std), labels


def normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images ``(N, C, H, W)`` of bytes, as floats by the mean and deviation of pixels in [0, 1]."""
    shift, scale = (torch.tensor(each, device=images.device).view(-1, 1, 1) * 255 for each in (mean, std))
    return (images - shift) / scale


def _whole_batch(batch: Any) -> Any:
    return batch
