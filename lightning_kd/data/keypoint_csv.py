"""Images with keypoints, listed in one CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_kd.data.splits import SplitDataModule
from lightning_kd.extras import late_import
from lightning_kd.paths import expand_path
from lightning_kd.task import UNLABELLED

Sample = tuple[Tensor, Tensor]
"""An image ``(3, H, W)``, and its keypoints ``(K, 3)``: x, y in its pixels, and visibility."""


class ImagesAndKeypoints(Dataset[Sample]):
    """Image files with the places of K joints each.

    Args:
        files: The images.
        points: ``(N, K, 3)``: x, y in pixels of the files, and visibility.
        image_size: Resize every image to this (height, width).
        transforms: Of ``torchvision.transforms.v2``, applied to image and points one after the other. They keep the
            size.
        flip_pairs: Joints that change places in the mirror: left and right eye.
        flip: Probability of a mirror image.

    Raises:
        FileNotFoundError: If an image is missing.
        ValueError: If a file is no image, or a transform changed an image's size.
    """

    def __init__(
        self,
        files: Sequence[Path],
        points: Tensor,
        image_size: tuple[int, int],
        transforms: Sequence[Callable[..., Any]] = (),
        flip_pairs: Sequence[tuple[int, int]] = (),
        flip: float = 0.0,
    ) -> None:
        self.files = list(files)
        self.points = points
        self.image_size = tuple(image_size)
        self.transforms = list(transforms)
        self.flip = flip
        self.mirrored = torch.arange(points.shape[1])
        for one, other in flip_pairs:
            self.mirrored[one], self.mirrored[other] = other, one
        self._read: dict[int, tuple[Any, Any]] = {}  # resized, as bytes: small, and decoded once

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        """The image, uint8 unless a transform made it something else, and its keypoints."""
        v2 = late_import("torchvision.transforms.v2.functional", "torchvision", "pose")
        tv_tensors = late_import("torchvision.tv_tensors", "torchvision", "pose")
        if index not in self._read:
            self._read[index] = self._resized(index)
        pixels, places = self._read[index]
        image, points = tv_tensors.Image(pixels), tv_tensors.KeyPoints(places, canvas_size=pixels.shape[-2:])
        visible = self.points[index, :, 2]
        for transform in self.transforms:
            image, points = transform(image, points)
        if self.flip and float(torch.rand(())) < self.flip:
            # torchvision would mirror points by width - 1 - x, as if a place were a pixel's number.
            width = image.shape[-1]
            image, mirrored = v2.horizontal_flip(image), points.as_subclass(Tensor)[self.mirrored]
            points = torch.stack((width - mirrored[:, 0], mirrored[:, 1]), dim=-1)
            visible = visible[self.mirrored]
        if tuple(image.shape[-2:]) != self.image_size:
            raise ValueError(
                f"{self.files[index]} has {image.shape[-2]} x {image.shape[-1]} pixels after the transforms: expected "
                f"the image_size of {self.image_size[0]} x {self.image_size[1]}. Crop or resize to that."
            )
        both = torch.cat((points.as_subclass(Tensor).float(), visible.unsqueeze(-1)), dim=-1)
        return image.as_subclass(Tensor), both

    def _resized(self, index: int) -> tuple[Tensor, Tensor]:
        pillow = late_import("PIL.Image", "Pillow", "pose")
        v2 = late_import("torchvision.transforms.v2.functional", "torchvision", "pose")
        file = self.files[index]
        if not file.is_file():
            raise FileNotFoundError(f"no image at {file}, which the list of keypoints names")
        try:
            with pillow.open(file) as opened:
                width, height = opened.size
                pixels = v2.pil_to_tensor(opened.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises of a damaged file
            raise ValueError(f"{file} cannot be read as an image: {error}") from error
        factor = torch.tensor([self.image_size[1] / width, self.image_size[0] / height])
        return v2.resize(pixels, list(self.image_size), antialias=True), self.points[index, :, :2] * factor


class KeypointCsv(SplitDataModule):
    """Images and a CSV file with one row for each: ``file``, ``split``, ``x0``, ``y0``, ``x1``, ... and others.

    An empty place means that the joint has no label; columns ``v0``, ``v1``, ... hold visibilities as COCO has them,
    where there are any, and -100 of a joint that was not looked for, whose place may be empty, too. A joint outside of
    its image has no part in losses and metrics: see :class:`lightning_kd.tasks.Pose`. Batches are images
    ``(N, 3, H, W)`` float32 and keypoints ``(N, K, 3)`` float32. The resized images are kept in memory.

    Args:
        root: Folder of the CSV file; ``$LIGHTNING_KD_DATA`` and ``~`` in it are filled in.
        image_size: Height and width that images are resized to. Linked to student and teacher.
        csv_file: The CSV file, in ``root``.
        images: Folder of the images, in ``root``.
        transforms: Of ``torchvision.transforms.v2``, for training images and their points; they keep the size.
        flip: Probability of a mirror image in training.
        flip_pairs: Joints that change places in the mirror; ``"face68"`` for the 68 points of a face.
        batch_size: Images in a batch.
        num_workers: Processes that load.
        mean: Subtracted from the pixels in [0, 1], per channel.
        std: The pixels are then divided by it.

    Raises:
        FileNotFoundError: If the CSV file or an image is missing.
        ValueError: If a row cannot be read, or what is asked for does not fit it.
    """

    def __init__(
        self,
        root: str,
        image_size: tuple[int, int],
        csv_file: str = "keypoints.csv",
        images: str = "images",
        transforms: list[Callable[..., Any]] | None = None,
        flip: float = 0.0,
        flip_pairs: list[tuple[int, int]] | str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__(batch_size, num_workers, _stacked)
        self.root = Path(expand_path(root))
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.images = self.root / images
        self.transforms = transforms or []
        self.flip = flip
        self.rows = read(self.root / csv_file)
        self.num_keypoints = len(next(iter(self.rows.values()))[1][0])
        pairs = FACE68_PAIRS if flip_pairs == "face68" else flip_pairs
        if isinstance(pairs, str) or any(not 0 <= j < self.num_keypoints for pair in pairs or () for j in pair):
            raise ValueError(
                f"flip_pairs: expected pairs of the joints 0 to {self.num_keypoints - 1}, or 'face68', received "
                f"{flip_pairs!r}"
            )
        if flip and pairs is None:
            raise ValueError("flip mirrors images: expected flip_pairs, the joints that change places; [] if none do")
        self.flip_pairs = list(pairs or ())
        self.mean = torch.tensor(mean).view(-1, 1, 1) * 255
        self.std = torch.tensor(std).view(-1, 1, 1) * 255

    def setup(self, stage: str) -> None:
        """Makes the splits that the stage needs."""
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",)):
            if split not in self.rows:
                raise ValueError(f"no row of {self.root} has the split {split!r}; there are {', '.join(self.rows)}")
            files, points = self.rows[split]
            changes = {"transforms": self.transforms, "flip_pairs": self.flip_pairs, "flip": self.flip}
            self.splits.setdefault(
                split,
                ImagesAndKeypoints(
                    [self.images / file for file in files],
                    torch.tensor(points),
                    self.image_size,
                    **(changes if split == "train" else {}),  # type: ignore[arg-type]  # of each its own kind
                ),
            )

    def on_after_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Normalise images of bytes; those that a transform made floats are left alone."""
        images, points = batch
        if images.is_floating_point():
            return images, points
        return (images - self.mean.to(images.device)) / self.std.to(images.device), points


Rows = dict[str, tuple[list[str], list[list[list[float]]]]]
"""Of each split, the files, and of each of them x, y and visibility of its joints."""


def read(path: Path) -> Rows:
    """Reads the CSV file.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If a column is missing, or a place is no number; the message names the row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no list of keypoints at {path}: give root, and the name of the file as csv_file")
    rows: Rows = {}
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        columns = table.fieldnames or []
        joints = sum(column.startswith("x") and column[1:].isdigit() for column in columns)
        needed = ["file", "split", *(f"{axis}{k}" for k in range(joints) for axis in "xy")]
        if missing := [column for column in needed if column not in columns] or (["x0"] if not joints else []):
            raise ValueError(
                f"{path} has no column {missing[0]!r}: expected a head of file, split, x0, y0, x1, y1, ... and a row "
                "for each image"
            )
        for row in table:
            files, points = rows.setdefault(row["split"], ([], []))
            files.append(row["file"])
            try:
                points.append([_joint(row, k) for k in range(joints)])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {table.line_num}: expected numbers as places: {error}") from error
    if not rows:
        raise ValueError(f"{path} lists no image")
    return rows


def _joint(row: dict[str, str | None], k: int) -> list[float]:
    x, y = row[f"x{k}"], row[f"y{k}"]
    if x is None or y is None:
        raise ValueError(f"the row ends before joint {k}; of a joint without a label both are empty")
    visible = float(row.get(f"v{k}") or 2)
    if not x.strip() or not y.strip():
        return [0.0, 0.0, float(UNLABELLED) if visible == UNLABELLED else 0.0]
    place = [float(x), float(y)]
    if not all(map(math.isfinite, place)):
        raise ValueError(f"joint {k} is at {x!r}, {y!r}; of a joint without a label both are empty")
    return [*place, visible]


def _stacked(samples: list[Sample]) -> Sample:
    images, points = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(points)


FACE68_PAIRS = [
    *((i, 16 - i) for i in range(8)),  # the jaw
    *((17 + i, 26 - i) for i in range(5)),  # brows
    *((31 + i, 35 - i) for i in range(2)),  # nostrils
    *((36 + i, 45 - i) for i in range(4)), (40, 47), (41, 46),  # eyes
    *((48 + i, 54 - i) for i in range(3)), (55, 59), (56, 58),  # the lips' outside
    (60, 64), (61, 63), (65, 67),  # and their inside
]  # fmt: skip
"""Left and right of the 68 points of a face (300-W): what is not in a pair is on the middle line."""
