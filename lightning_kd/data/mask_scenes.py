"""Scenes of handwritten digits as data of a segmentation, with nothing to download."""

from __future__ import annotations

from lightning_kd.data.scenes import compose
from lightning_kd.data.splits import checked_fraction, labelled_count
from lightning_kd.data.tensor_images import TensorDataModule, TensorImages
from lightning_kd.task import UNLABELLED


class MaskScenes(TensorDataModule):
    """Scenes composed of scikit-learn's handwritten digits, with a mask of the digit that each pixel shows.

    Batches are images ``(N, 3, size, size)`` float32 and masks ``(N, size, size)`` int64: 0 is background, ``d + 1``
    the digit ``d``. The scenes of a split are always the same, and no drawn digit is in two splits.

    Args:
        batch_size: Scenes in a batch.
        train_size: Scenes to train on.
        val_size: Scenes to validate on.
        test_size: Scenes for the test.
        size: Height and width, in pixels.
        num_workers: Processes that load; 0 is fastest for tensors in memory.
        labelled: Fraction of the training scenes that have a mask; all pixels of the others are labelled -100.
        kinds: The digits from 0 to ``kinds - 1`` are drawn: fewer are learned sooner.
        digits: Fewest and most digits in a scene.
        scale: Smallest and largest factor by which a digit of 8x8 pixels is enlarged.

    Raises:
        ValueError: If ``labelled`` is not in (0, 1], or scenes cannot be composed so.
        ModuleNotFoundError: Without scikit-learn.
    """

    def __init__(
        self,
        batch_size: int = 16,
        train_size: int = 600,
        val_size: int = 100,
        test_size: int = 300,
        size: int = 64,
        num_workers: int = 0,
        labelled: float = 1.0,
        kinds: int = 10,
        digits: tuple[int, int] = (2, 4),
        scale: tuple[float, float] = (2.0, 4.0),
    ) -> None:
        super().__init__(batch_size, num_workers, mean=(0.5,) * 3, std=(0.25,) * 3)
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        self.size = size
        self.labelled = checked_fraction(labelled)
        self.kinds = kinds
        self.digits = digits
        self.scale = scale
        self.num_classes = 1 + kinds
        self.class_names = ("background", *map(str, range(kinds)))

    def setup(self, stage: str) -> None:
        """Compose the scenes."""
        if self.splits:
            return
        for seed, (split, count) in enumerate(self.sizes.items()):
            scenes = compose(count, seed, split, self.size, self.digits, self.scale, kinds=self.kinds)
            masks = scenes.masks.long()
            if split == "train":
                # They are independent of each other: the first are as good as any.
                masks[labelled_count(self.labelled, count) :] = UNLABELLED
            self.splits[split] = TensorImages(scenes.images, masks)
