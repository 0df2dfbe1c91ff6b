"""Images with boxes, as batches of lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_kd.boxes import IGNORE
from lightning_kd.data.splits import SplitDataModule
from lightning_kd.extras import late_import

Sample = tuple[Tensor, dict[str, Tensor]]
"""An image ``(3, H, W)``, floats in [0, 1], and its target; see :class:`lightning_kd.tasks.Detection`."""


class Record(NamedTuple):
    """What is known of an image before it is read.

    Attributes:
        path: Of the image.
        boxes: ``(n, 4)``, x1 y1 x2 y2 in pixels.
        labels: ``(n,)``, classes from 0.
        ignore: ``(n,)``, True for boxes that neither teach nor count.
        name: By which the annotations know the image.
    """

    path: Path
    boxes: Tensor
    labels: Tensor
    ignore: Tensor
    name: int | str

    @classmethod
    def of(cls, path: Path, boxes: list[list[float]], labels: list[int], ignore: list[bool], name: int | str) -> Record:
        """Makes one of lists, which may be empty."""
        return cls(
            path,
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor(ignore, dtype=torch.bool),
            name,
        )


class ImageBoxes(Dataset[Sample]):
    """Images from files, with boxes that follow their transforms.

    Args:
        records: Of each image.
        transforms: Of ``torchvision.transforms.v2``, applied to image and boxes one after the other.
        category_ids: By which the annotations know the classes, in the order of the labels; None where they have none.

    Raises:
        ValueError: If a file is no image, or is cut short; the message names it.
    """

    def __init__(
        self,
        records: Sequence[Record],
        transforms: Sequence[Callable[..., Any]] = (),
        category_ids: Sequence[int] | None = None,
    ) -> None:
        self.records = list(records)
        self.transforms = list(transforms)
        self.category_ids = category_ids

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """The image and its target; boxes that a transform moved out of the image are gone."""
        tv_tensors = late_import("torchvision.tv_tensors", "torchvision", "detection")
        v2 = late_import("torchvision.transforms.v2.functional", "torchvision", "detection")
        record = self.records[index]
        image = tv_tensors.Image(_read(record.path))
        boxes = tv_tensors.BoundingBoxes(record.boxes, format="XYXY", canvas_size=image.shape[-2:])
        target = {"boxes": boxes, "labels": record.labels, IGNORE: record.ignore}
        for transform in self.transforms:
            image, target = transform(image, target)
        found = v2.clamp_bounding_boxes(target["boxes"]).as_subclass(Tensor)
        keep = (found[:, 2:] > found[:, :2]).all(dim=1)
        target = {"boxes": found[keep], "labels": target["labels"][keep], IGNORE: target[IGNORE][keep]}
        return v2.to_dtype(image, torch.float32, scale=True).as_subclass(Tensor), target

    @property
    def image_ids(self) -> list[int | str]:
        """By which the annotations know the images."""
        return [record.name for record in self.records]

    def restored(self, boxes: Tensor, index: int, size: tuple[int, int]) -> Tensor:
        """Boxes ``(n, 4)`` in pixels of the file, of an image that was resized to this (height, width)."""
        width, height = _opened(self.records[index].path).size
        x, y = width / size[1], height / size[0]
        return boxes * boxes.new_tensor([x, y, x, y])


def _opened(path: Path) -> Any:
    """Reads no more than the beginning of the file."""
    with late_import("PIL.Image", "Pillow", "detection").open(path) as image:
        return image


def _read(path: Path) -> Tensor:
    pillow = late_import("PIL.Image", "Pillow", "detection")
    v2 = late_import("torchvision.transforms.v2.functional", "torchvision", "detection")
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}, which the annotations name")
    try:
        with pillow.open(path) as image:
            pixels: Tensor = v2.pil_to_tensor(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises of a damaged file
        raise ValueError(f"{path} cannot be read as an image: {error}. Replace the file or leave it out") from error
    return pixels


class BoxDataModule(SplitDataModule):
    """Loaders over three sets of images with boxes; a batch is a list of images and a list of targets.

    A subclass fills ``splits`` (``train``, ``val``, ``test``) in ``setup`` and has ``num_classes``.

    Args:
        batch_size: Images in a batch.
        num_workers: Processes that load.
    """

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__(batch_size, num_workers, collate)


def collate(samples: Sequence[Sample]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A batch of samples: images may differ in size, and targets in how many boxes they have.

    Example:
        >>> images, targets = collate([(torch.zeros(3, 8, 8), {}), (torch.zeros(3, 9, 8), {})])
        >>> [tuple(image.shape) for image in images]
        [(3, 8, 8), (3, 9, 8)]
    """
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
