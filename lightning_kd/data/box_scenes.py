"""Scenes of handwritten digits as data of a detection, with nothing to download."""

from __future__ import annotations

from torch.utils.data import Dataset

from lightning_kd.data.box_images import BoxDataModule, Sample
from lightning_kd.data.scenes import Scenes, compose
from lightning_kd.data.splits import checked_fraction, labelled_count


class BoxScenes(BoxDataModule):
    """Scenes of handwritten digits with exact boxes: nothing to download. See :func:`lightning_kd.data.scenes.compose`.

    Args:
        train_size: Scenes to train on.
        val_size: Scenes to validate on.
        test_size: Scenes to test on.
        size: Height and width of a scene, in pixels.
        batch_size: Images in a batch.
        num_workers: Processes that load; 0 is fastest for what is in memory.
        labelled: Fraction of the training scenes whose target is known; that of the others is empty, for
            :class:`lightning_kd.tasks.PseudoBoxes`.
        kinds: The digits from 0 to ``kinds - 1`` are drawn: fewer are learned sooner.
        digits: Fewest and most digits in a scene.
        scale: Smallest and largest factor by which a digit of 8x8 pixels is enlarged.

    Raises:
        ValueError: If the fraction is not in (0, 1], or scenes cannot be composed so.
        ModuleNotFoundError: Without scikit-learn.
    """

    def __init__(
        self,
        train_size: int = 400,
        val_size: int = 50,
        test_size: int = 200,
        size: int = 64,
        batch_size: int = 16,
        num_workers: int = 0,
        labelled: float = 1.0,
        kinds: int = 10,
        digits: tuple[int, int] = (2, 4),
        scale: tuple[float, float] = (2.0, 4.0),
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.labelled = checked_fraction(labelled)
        self.counts = {"train": train_size, "val": val_size, "test": test_size}
        self.size = size
        self.kinds = kinds
        self.digits = digits
        self.scale = scale
        self.num_classes = kinds
        self.class_names = tuple(map(str, range(kinds)))

    def setup(self, stage: str) -> None:
        """Compose the scenes, equal ones in every run."""
        wanted = {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",))
        for seed, (split, count) in enumerate(self.counts.items()):
            if split in wanted and split not in self.splits:
                scenes = compose(count, seed, split, self.size, self.digits, self.scale, kinds=self.kinds)
                # They are independent of each other: the first are as good as any.
                known = labelled_count(self.labelled, count) if split == "train" else count
                self.splits[split] = _SceneBoxes(scenes, known)


class _SceneBoxes(Dataset[Sample]):
    def __init__(self, scenes: Scenes, known: int) -> None:
        self.scenes = scenes
        self.known = known

    def __len__(self) -> int:
        return len(self.scenes.images)

    def __getitem__(self, index: int) -> Sample:
        target = {"boxes": self.scenes.boxes[index], "labels": self.scenes.labels[index]} if index < self.known else {}
        return self.scenes.images[index].float() / 255, target
