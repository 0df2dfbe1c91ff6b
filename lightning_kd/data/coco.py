"""Boxes in the JSON files of COCO."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightning_kd.data.box_files import BoxFiles
from lightning_kd.data.box_images import Record
from lightning_kd.paths import expand_path


class CocoJson(BoxFiles):
    """Images with annotations as COCO has them: a JSON file of ``images``, ``annotations`` and ``categories`` each.

    Crowds (``iscrowd``) neither teach nor count.

    Args:
        root: The folder; ``$LIGHTNING_KD_DATA`` in it is expanded. The paths below are relative to it.
        train: Annotations to train with.
        val: Annotations to validate with.
        test: Annotations to test with; default: those of ``val``.
        images: Folders of the images: one for all, or of ``train``, ``val`` and ``test``.
        classes: Names, in the order of the labels; default: the categories of ``train``, by their ids.
        resize: Resize every image to this (height, width), or this shorter side.
        transforms: Of ``torchvision.transforms.v2``, for training images, after the resizing.
        batch_size: Images in a batch.
        num_workers: Processes that load.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If annotations cannot be read, or have a class that is not in ``classes``.
    """

    def __init__(
        self,
        root: str,
        train: str,
        val: str,
        test: str | None = None,
        images: list[str] | str = "images",
        classes: list[str] | None = None,
        resize: tuple[int, int] | int | None = None,
        transforms: list[nn.Module] | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
    ) -> None:
        super().__init__(classes, resize, transforms, batch_size, num_workers)
        self.root = Path(expand_path(root))
        self.files = {"train": train, "val": val, "test": val if test is None else test}
        folders = [images] * 3 if isinstance(images, str) else images
        if len(folders) != 3:
            raise ValueError(f"images: expected one folder, or those of train, val and test, received {images}")
        self.images = dict(zip(self.files, folders, strict=True))

    def find_classes(self) -> list[str]:
        """Looks the names up in the training annotations."""
        path = self.root / self.files["train"]
        return [name for _, name in sorted(_categories(_json(path), path).items())]

    def read(self, split: str) -> list[Record]:
        """Reads the annotations of ``train``, ``val`` or ``test``."""
        path = self.root / self.files[split]
        content = _json(path)
        categories = _categories(content, path)
        found: dict[Any, tuple[list[list[float]], list[int], list[bool]]] = {}
        files: dict[Any, str] = {}
        for i, image in enumerate(content["images"]):
            number, file = _fields(image, ("id", "file_name"), f"{path}, images[{i}]")
            files[number], found[number] = str(file), ([], [], [])
        for i, each in enumerate(content["annotations"]):
            where = f"{path}, annotations[{i}]"
            number, category, box = _fields(each, ("image_id", "category_id", "bbox"), where)
            if number not in found:
                raise ValueError(f"{where}: there is no image with the id {number!r}")
            if category not in categories:
                raise ValueError(f"{where}: there is no category with the id {category!r}")
            if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)):
                raise ValueError(f"{where}: expected a bbox of four numbers, x y width height, received {box!r}")
            boxes, labels, ignore = found[number]
            boxes.append([box[0], box[1], box[0] + box[2], box[1] + box[3]])
            labels.append(self.label(categories[category], where))
            ignore.append(bool(each.get("iscrowd", 0)))
        numbers = {name: number for number, name in categories.items()}
        self.category_ids[split] = [numbers.get(name, label) for label, name in enumerate(self.classes)]
        folder = self.root / self.images[split]
        return [Record.of(folder / files[number], *lists, number) for number, lists in found.items()]


def _json(path: Path) -> dict[str, list[Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no annotations at {path}: paths are relative to root")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not (isinstance(content, dict) and isinstance(content.get(key), list)):
            raise ValueError(f"{path}: expected COCO's lists of images, annotations and categories; {key} is missing")
    return dict(content)


def _categories(content: Mapping[str, list[Any]], path: Path) -> dict[Any, str]:
    found = {}
    for i, each in enumerate(content["categories"]):
        number, name = _fields(each, ("id", "name"), f"{path}, categories[{i}]")
        found[number] = str(name)
    return found


def _fields(each: Any, names: Sequence[str], where: str) -> list[Any]:
    if not isinstance(each, dict) or (missing := [name for name in names if name not in each]):
        raise ValueError(f"{where}: there is no {missing[0] if isinstance(each, dict) else names[0]}")
    return [each[name] for name in names]
