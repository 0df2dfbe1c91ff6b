"""Textures that scikit-image brings along: what is normal is cut out of one of them, what is not is drawn into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_kd.data.splits import SplitDataModule
from lightning_kd.data.synthetic_anomalies import DRAWN, Kind, checked_kinds, spoiled
from lightning_kd.data.tensor_images import normalized
from lightning_kd.extras import late_import

Texture = Literal["brick", "grass", "gravel"]
Target = dict[str, Tensor]
Batch = tuple[Tensor, Target]

ROWS = {"train": (0, 256), "val": (256, 352), "test": (352, 512)}
"""Of the 512 rows of a texture, those that a split is cut out of: no pixel is in two splits."""

TESTED: tuple[Kind, ...] = ("foreign", "scratch")
"""What is drawn into test images: kinds that no training image has, unless it is asked for."""


class AnomalyImages(Dataset[Batch]):
    """Images and masks in memory, read a whole batch at a time.

    Args:
        images: ``(N, 3, H, W)``, uint8.
        masks: ``(N, H, W)``, bool, True where an anomaly is.
        labels: ``(N,)``, bool, True where an image is anomalous.
    """

    def __init__(self, images: Tensor, masks: Tensor, labels: Tensor) -> None:
        self.images = images
        self.masks = masks
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        """One image and its target."""
        return self.images[index], {"mask": self.masks[index], "label": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> Batch:
        """A batch: what the loader calls when a dataset offers it."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen], {"mask": self.masks[chosen], "label": self.labels[chosen]}


class Textures(SplitDataModule):
    """Pieces of a texture, and anomalies that are drawn into some of them; nothing to download.

    Training, validation and test are cut out of different parts of a texture of scikit-image, 512 x 512 pixels. Half of
    the test images have an anomaly: a patch of another texture, or a scratch. A part of the training images has one of
    another kind (a shade, or noise), with its mask: the head of a network learns from it, terms leave its pixels out.
    Validation is of these kinds, too. Batches are images ``(B, 3, S, S)`` float32 and a dict of ``mask``, bool
    ``(B, S, S)``, and ``label``, bool ``(B,)``.

    Args:
        texture: What is normal.
        size: Side of the pieces, at most 96.
        train_size: Number of training images.
        val_size: Number of validation images.
        test_size: Number of test images.
        synthetic: Fraction of the training images that have an anomaly; 0 for normal ones alone.
        batch_size: Images in a batch.
        num_workers: Processes that load; 0 is fastest for tensors in memory.
        seed: Of the pieces and of what is drawn.
        kinds: What is drawn into images of training and validation, in turns: ``shade``, ``noise``, ``scratch``,
            ``perlin``, which is anomalib's.

    Raises:
        ModuleNotFoundError: Without scikit-image.
        ValueError: If there is no such texture or kind, or size or fraction are out of range.
    """

    mean = (0.45, 0.45, 0.45)
    std = (0.15, 0.15, 0.15)

    def __init__(
        self,
        texture: Texture = "brick",
        size: int = 64,
        train_size: int = 256,
        val_size: int = 64,
        test_size: int = 128,
        synthetic: float = 0.5,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        kinds: Sequence[Kind] = DRAWN,
    ) -> None:
        super().__init__(batch_size, num_workers, _whole_batch)
        if texture not in get_args(Texture):
            raise ValueError(f"texture: expected one of {', '.join(get_args(Texture))}, received {texture!r}")
        if not 16 <= size <= 96:
            raise ValueError(f"size: expected 16 to 96 pixels, received {size}")
        if not 0.0 <= synthetic <= 1.0:
            raise ValueError(f"synthetic: expected a fraction of the training images in [0, 1], received {synthetic}")
        self.texture = texture
        self.size = size
        self.image_size = (size, size)
        self.synthetic = synthetic
        self.seed = seed
        self.kinds = checked_kinds(kinds)
        self.counts = {"train": train_size, "val": val_size, "test": test_size}

    def setup(self, stage: str) -> None:
        """Makes the splits that the stage needs."""
        library = late_import("skimage.data", "scikit-image", "anomaly")
        whole = {name: torch.from_numpy(getattr(library, name)()) for name in get_args(Texture)}
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",)):
            if split not in self.splits:
                self.splits[split] = self._made(whole, split)

    def _made(self, whole: dict[str, Tensor], split: str) -> AnomalyImages:
        generator = torch.Generator().manual_seed(3 * self.seed + list(ROWS).index(split))
        others = [texture for name, texture in whole.items() if name != self.texture]
        kinds = TESTED if split == "test" else self.kinds
        fraction = self.synthetic if split == "train" else 0.5
        images, masks = [], []
        count = self.counts[split]
        chosen = torch.randperm(count, generator=generator)[: int(fraction * count)].tolist()
        for i in range(count):
            image = self._piece(whole[self.texture], split, generator)
            mask = torch.zeros(self.size, self.size, dtype=torch.bool)
            if i in chosen:
                rank = chosen.index(i)
                foreign = self._piece(others[rank // 2 % 2], split, generator)
                image, mask = spoiled(image, kinds[rank % len(kinds)], generator, foreign)
            images.append(image)
            masks.append(mask)
        stacked = torch.stack(masks)
        return AnomalyImages(torch.stack(images), stacked, stacked.flatten(1).any(1))

    def _piece(self, texture: Tensor, split: str, generator: torch.Generator) -> Tensor:
        first, last = ROWS[split]
        y = int(torch.randint(first, last - self.size + 1, (), generator=generator))
        x = int(torch.randint(0, texture.shape[1] - self.size + 1, (), generator=generator))
        return texture[y : y + self.size, x : x + self.size].expand(3, -1, -1)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalise the images."""
        images, target = batch
        return normalized(images, self.mean, self.std), target


def _whole_batch(batch: Any) -> Any:
    return batch
