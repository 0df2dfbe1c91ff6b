"""Predictions as files: of what a task predicts for images, in the images' own pixels and by their own names."""

from __future__ import annotations

import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_kd.drawing import palette
from lightning_kd.extras import late_import


class PredictionFile(ABC):
    """What ``lightning-kd predict`` writes.

    A data set may help, where it knows how: ``names`` are its images' names, ``restored(prediction, index, size)`` is a
    prediction for an image that was given with that (height, width) in pixels of the image's file. For ``CocoResults``
    ``image_ids`` are those of the annotations, and ``category_ids`` those of the labels from 0.
    """

    ending = ""
    """Of the file; that of a folder is empty."""

    sized = True
    """Whether it is told the images' sizes, which takes ``inputs`` of the task."""

    @abstractmethod
    def add(self, prediction: Any, indices: Sequence[int], sizes: Sequence[tuple[int, int]], dataset: Any) -> None:
        """Takes what was predicted for a batch.

        Args:
            prediction: What ``TaskAdapter.predict_batch`` returned.
            indices: Of the batch's samples in the data set.
            sizes: Of each image, (height, width); empty, if the inputs are no images, or it is not ``sized``.
            dataset: The data set.
        """

    def open(self, path: Path) -> None:
        """Is told where to write, before the first batch."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # what cannot be written is told before anything is predicted
            pass

    @abstractmethod
    def close(self) -> None:
        """Writes what is not written yet."""


class TorchFile(PredictionFile):
    """All predictions in a file that ``torch.load`` reads, in the order of the data.

    One tensor, if every batch gave one; else the list of what the batches gave.
    """

    ending = ".pt"
    sized = False

    def __init__(self) -> None:
        self.all: list[Any] = []

    def add(self, prediction: Any, indices: Sequence[int], sizes: Sequence[tuple[int, int]], dataset: Any) -> None:
        """Keeps it, on the CPU."""
        self.all.append(torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, prediction))

    def close(self) -> None:
        """Writes the file."""
        tensors = self.all and all(isinstance(each, Tensor) for each in self.all)
        torch.save(torch.cat(self.all) if tensors else self.all, self.path)


class LabelMaps(PredictionFile):
    """A folder of PNG files, one for each image: pixels are class numbers, and shown in colours.

    Of several labels (``(B, C, H, W)``) each has a file of its own, of zeros and ones.

    Args:
        class_names: By which the files of several labels are told apart.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = class_names

    def open(self, path: Path) -> None:
        """Makes the folder."""
        super().open(path)
        path.mkdir(exist_ok=True)

    def add(self, prediction: Any, indices: Sequence[int], sizes: Sequence[tuple[int, int]], dataset: Any) -> None:
        """Writes a file for each image."""
        names, restored = getattr(dataset, "names", None), getattr(dataset, "restored", None)
        for said, index, size in zip(prediction.cpu(), indices, sizes, strict=True):
            labels = said if restored is None else restored(said, index, size)
            name = names[index] if names is not None else f"{index:06}"
            if labels.ndim == 2:
                self._write(labels, self.path / f"{name}.png")
            else:
                for kind, each in zip(self.class_names, labels, strict=True):
                    self._write(each, self.path / f"{name}_{kind}.png")

    def _write(self, labels: Tensor, path: Path) -> None:
        pillow = late_import("PIL.Image", "Pillow", "segmentation")
        path.parent.mkdir(parents=True, exist_ok=True)
        if labels.dtype != torch.uint8:
            pillow.fromarray(labels.to(torch.uint16).numpy()).save(path)
            return
        image = pillow.fromarray(labels.numpy())
        image.putpalette([part for colour in palette(256) for part in colour])
        image.save(path)

    def close(self) -> None:
        """Everything is written already."""


class CocoResults(PredictionFile):
    """A JSON file of boxes as COCO's tools read them (``COCO.loadRes``): a list of what was found.

    Each has ``image_id``, ``category_id``, ``bbox`` (x y width height, in pixels of the image's file) and ``score``.
    Where the data have no such ids, an image has its name or its number, and a class its label from 0.
    """

    ending = ".json"

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def add(self, prediction: Any, indices: Sequence[int], sizes: Sequence[tuple[int, int]], dataset: Any) -> None:
        """Keeps the boxes."""
        ids = getattr(dataset, "image_ids", getattr(dataset, "names", None))
        kinds, restored = getattr(dataset, "category_ids", None), getattr(dataset, "restored", None)
        for found, index, size in zip(prediction, indices, sizes, strict=True):
            boxes = found["boxes"].detach().float().cpu()
            boxes = boxes if restored is None else restored(boxes, index, size)
            corners = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
            for box, label, score in zip(corners, found["labels"].tolist(), found["scores"].tolist(), strict=True):
                self.all.append(
                    {
                        "image_id": ids[index] if ids is not None else index,
                        "category_id": kinds[label] if kinds is not None else label,
                        "bbox": [round(number, 3) for number in box],
                        "score": round(score, 6),
                    }
                )

    def close(self) -> None:
        """Writes the file."""
        self.path.write_text(json.dumps(self.all), encoding="utf-8")
