"""What readers of annotations in files share."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_kd.data.box_images import BoxDataModule, ImageBoxes, Record
from lightning_kd.extras import late_import


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
        # By which numbers the annotations of a split know the classes, where they do.
        self.category_ids: dict[str, list[int]] = {}

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

    @property
    def class_names(self) -> list[str]:
        """The same, by the name under which the task takes them."""
        return self.classes

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
            more = self.transforms if split == "train" else []
            self.splits[split] = ImageBoxes(self._records[split], [*first, *more], self.category_ids.get(split))

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
        kept.append(Record(record.path, record.boxes[keep], record.labels[keep], record.ignore[keep], record.name))
    if dropped:
        names = ", ".join(dict.fromkeys(dropped[:3]))
        rank_zero_info(f"{split}: boxes without an area are left out: {len(dropped)} ({names})")
    return kept
