"""Scenes of handwritten digits as data of a detection, with nothing to download."""

from __future__ import annotations

from torch.utils.data import Dataset

from lightning_kd.data.box_images import BoxDataModule, Sample
from lightning_kd.data.scenes import Scenes, compose


class BoxScenes(BoxDataModule):
    """Scenes of handwritten digits with exact boxes: nothing to download. See :func:`lightning_kd.data.scenes.compose`.

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
    class_names = tuple(map(str, range(10)))

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
