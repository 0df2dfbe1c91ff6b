"""Boxes in the folders of Pascal VOC."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from torch import nn

from lightning_kd.data.box_files import BoxFiles
from lightning_kd.data.box_images import Record
from lightning_kd.paths import expand_path

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".JPG", ".JPEG", ".PNG")
"""Of images, as the folder may hold them: the lists name no ending."""


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
        there = [path for ending in ENDINGS if (path := images / f"{name}{ending}").is_file()]
        return Record.of(there[0] if there else images / f"{name}.jpg", boxes, labels, ignore, name)


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
