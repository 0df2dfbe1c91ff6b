"""Images with boxes: COCO's JSON files, Pascal VOC's folders, and scenes of digits, as batches of lists."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_kd.boxes import IGNORE
from lightning_kd.extras import late_import
from lightning_kd.paths import expand_path
from lightning_kd.scenes import Scenes, compose

Sample = tuple[Tensor, dict[str, Tensor]]
"""An image ``(3, H, W)``, floats in [0, 1], and its target; see :class:`lightning_kd.tasks.Detection`."""

_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".JPG", ".JPEG", ".PNG")


class Record(NamedTuple):
    """What is known of an image before it is read.

    Attributes:
        path: Of the image.
        boxes: ``(n, 4)``, x1 y1 x2 y2 in pixels.
        labels: ``(n,)``, classes from 0.
        ignore: ``(n,)``, True for boxes that neither teach nor count.
    """

    path: Path
    boxes: Tensor
    labels: Tensor
    ignore: Tensor


class ImageBoxes(Dataset[Sample]):
    """Images from files, with boxes that follow their transforms.

    Args:
        records: Of each image.
        transforms: Of ``torchvision.transforms.v2``, applied to image and boxes one after the other.

    Raises:
        ValueError: If a file is no image, or is cut short; the message names it.
    """

    def __init__(self, records: Sequence[Record], transforms: Sequence[Callable[..., Any]] = ()) -> None:
        self.records = list(records)
        self.transforms = list(transforms)

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


class BoxDataModule(LightningDataModule):
    """Loaders over three sets of images with boxes; a batch is a list of images and a list of targets.

    A subclass fills ``splits`` (``train``, ``val``, ``test``) in ``setup`` and has ``num_classes``.

    Args:
        batch_size: Images in a batch.
        num_workers: Processes that load.
    """

    num_classes: int

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.splits: dict[str, Dataset[Sample]] = {}

    def _loader(self, split: str) -> DataLoader[Sample]:
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
            collate_fn=collate,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled batches of the training split; an incomplete last one is dropped."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Sample]:
        """Batches of the validation split, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Batches of the test split, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Batches of the test split, in order."""
        return self._loader("test")


def collate(samples: Sequence[Sample]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A batch of samples: images may differ in size, and targets in how many boxes they have.

    Example:
        >>> images, targets = collate([(torch.zeros(3, 8, 8), {}), (torch.zeros(3, 9, 8), {})])
        >>> [tuple(image.shape) for image in images]
        [(3, 8, 8), (3, 9, 8)]
    """
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


class DigitScenes(BoxDataModule):
    """Scenes of handwritten digits with exact boxes: nothing to download. See :func:`lightning_kd.scenes.compose`.

    Args:
        train_size: Scenes to train on.
        val_size: Scenes to validate on.
        test_size: Scenes to test on.
        size: Height and width of a scene, in pixels.
        batch_size: Images in a batch.
        num_workers: Processes that load; 0 is fastest for what is in memory.

    Raises:
        ModuleNotFoundError: Without scikit-learn.
    """

    num_classes = 10

    def __init__(
        self,
        train_size: int = 400,
        val_size: int = 50,
        test_size: int = 200,
        size: int = 64,
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.counts = {"train": train_size, "val": val_size, "test": test_size}
        self.size = size

    def setup(self, stage: str) -> None:
        """Compose the scenes, equal ones in every run."""
        wanted = {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",))
        for seed, (split, count) in enumerate(self.counts.items()):
            if split in wanted and split not in self.splits:
                self.splits[split] = _SceneBoxes(compose(count, seed, split, self.size))


class _SceneBoxes(Dataset[Sample]):
    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes.images)

    def __getitem__(self, index: int) -> Sample:
        target = {"boxes": self.scenes.boxes[index], "labels": self.scenes.labels[index]}
        return self.scenes.images[index].float() / 255, target


class BoxFiles(BoxDataModule):
    """Images in files; a subclass reads the annotations. Boxes without an area are left out, and it says how many.

    Args:
        classes: Names, in the order of the labels; unless given, those that are found.
        resize: Resize every image to this (height, width), or this shorter side.
        transforms: Of ``torchvision.transforms.v2``, for training images, after the resizing.
        batch_size: Images in a batch.
        num_workers: Processes that load.
    """

    def __init__(
        self,
        classes: list[str] | None,
        resize: tuple[int, int] | int | None,
        transforms: list[nn.Module] | None,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__(batch_size, num_workers)
        if classes is not None and len({*classes}) != len(classes):
            raise ValueError(f"classes: expected different names, received {classes}")
        self._classes = classes
        self.resize = resize
        self.transforms = transforms or []
        self._records: dict[str, list[Record]] = {}

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the labels."""
        if self._classes is None:
            self._classes = self.find_classes()
        return self._classes

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # of a class that knows it only when it has looked
        """How many classes there are."""
        return len(self.classes)

    def find_classes(self) -> list[str]:
        """Looks the names up in the annotations."""
        raise NotImplementedError

    def read(self, split: str) -> list[Record]:
        """Reads the annotations of ``train``, ``val`` or ``test``."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Read the annotations."""
        v2 = late_import("torchvision.transforms.v2", "torchvision", "detection")
        first = [] if self.resize is None else [v2.Resize(self.resize, antialias=True)]
        for split in ("train", "val", "test"):
            if split not in self._records:
                self._records[split] = _with_area(self.read(split), split)
            self.splits[split] = ImageBoxes(
                self._records[split], [*first, *(self.transforms if split == "train" else [])]
            )

    def label(self, name: str, where: str) -> int:
        """Returns the label of a class's name.

        Raises:
            ValueError: If it is no class; the message says where it was found.
        """
        if name not in self.classes:
            raise ValueError(
                f"{where}: the class {name!r} is none of classes: {', '.join(self.classes)}. Add it, or take it out of "
                "the annotations"
            )
        return self.classes.index(name)


def _with_area(records: list[Record], split: str) -> list[Record]:
    kept, dropped = [], []
    for record in records:
        keep = (record.boxes[:, 2:] > record.boxes[:, :2]).all(dim=1)
        dropped += [record.path.name] * int((~keep).sum())
        kept.append(Record(record.path, record.boxes[keep], record.labels[keep], record.ignore[keep]))
    if dropped:
        names = ", ".join(dict.fromkeys(dropped[:3]))
        rank_zero_info(f"{split}: boxes without an area are left out: {len(dropped)} ({names})")
    return kept


class VocFolder(BoxFiles):
    """A folder as Pascal VOC has it: ``Annotations/*.xml``, ``JPEGImages/`` and ``ImageSets/Main/<split>.txt``.

    Corners are taken as they stand. Objects that are marked ``difficult`` neither teach nor count.

    Args:
        root: The folder; ``$LIGHTNING_KD_DATA`` in it is expanded.
        classes: Names, in the order of the labels; default: those in the annotations, sorted.
        resize: Resize every image to this (height, width), or this shorter side.
        transforms: Of ``torchvision.transforms.v2``, for training images, after the resizing.
        batch_size: Images in a batch.
        num_workers: Processes that load.
        splits: Names of the lists of images to train, validate and test with.

    Raises:
        FileNotFoundError: If a list, an annotation or an image is missing.
        ValueError: If an annotation cannot be read, or has a class that is not in ``classes``.
    """

    def __init__(
        self,
        root: str,
        classes: list[str] | None = None,
        resize: tuple[int, int] | int | None = None,
        transforms: list[nn.Module] | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        splits: tuple[str, str, str] = ("train", "val", "test"),
    ) -> None:
        super().__init__(classes, resize, transforms, batch_size, num_workers)
        self.root = Path(expand_path(root))
        self.lists = dict(zip(("train", "val", "test"), splits, strict=True))

    def names(self, split: str) -> list[str]:
        """Returns the names of a split's images, without their ending."""
        path = self.root / "ImageSets" / "Main" / f"{self.lists[split]}.txt"
        if not path.is_file():
            raise FileNotFoundError(
                f"no list of images at {path}: give the folder that holds ImageSets/Main/*.txt, Annotations and "
                "JPEGImages as root, and the lists' names as splits"
            )
        return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    def find_classes(self) -> list[str]:
        """Looks the names up in the annotations of all splits."""
        objects = (each for split in self.lists for name in self.names(split) for each in _objects(self._xml(name)))
        return sorted({_text(each, "name", where) for each, where in objects})

    def read(self, split: str) -> list[Record]:
        """Reads the annotations of ``train``, ``val`` or ``test``."""
        return [self._record(name) for name in self.names(split)]

    def _xml(self, name: str) -> Path:
        return self.root / "Annotations" / f"{name}.xml"

    def _record(self, name: str) -> Record:
        boxes, labels, ignore = [], [], []
        for each, where in _objects(self._xml(name)):
            labels.append(self.label(_text(each, "name", where), where))
            try:
                boxes.append([float(_text(each, f"bndbox/{side}", where)) for side in ("xmin", "ymin", "xmax", "ymax")])
            except ValueError as error:
                raise ValueError(f"{where}: expected numbers in bndbox: {error}") from error
            ignore.append((each.findtext("difficult") or "0").strip() == "1")
        images = self.root / "JPEGImages"
        there = [path for ending in _ENDINGS if (path := images / f"{name}{ending}").is_file()]
        return _record(there[0] if there else images / f"{name}.jpg", boxes, labels, ignore)


def _objects(path: Path) -> list[tuple[ElementTree.Element, str]]:
    """Returns the objects of an annotation, and what to call each in a message."""
    if not path.is_file():
        raise FileNotFoundError(f"no annotation at {path}, of an image in ImageSets/Main")
    try:
        found = ElementTree.parse(path).getroot().findall("object")
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is not XML: {error}") from error
    return [(each, f"{path}, object {i}") for i, each in enumerate(found)]


def _text(each: ElementTree.Element, key: str, where: str) -> str:
    text = each.findtext(key)
    if text is None or not text.strip():
        raise ValueError(f"{where}: there is no {key}")
    return text.strip()


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
        folder = self.root / self.images[split]
        return [_record(folder / files[number], *lists) for number, lists in found.items()]


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


def _record(path: Path, boxes: list[list[float]], labels: list[int], ignore: list[bool]) -> Record:
    return Record(
        path,
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(ignore, dtype=torch.bool),
    )
