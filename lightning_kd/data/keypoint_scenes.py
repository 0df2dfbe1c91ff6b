"""Cards with handwritten digits as data of a pose, with nothing to download."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_kd.data.scenes import backgrounds, contrasting, handwritten
from lightning_kd.data.tensor_images import TensorDataModule, TensorImages

JOINTS = (
    "left top",
    "right top",
    "right bottom",
    "left bottom",
    "centre",
    "ink top",
    "ink right",
    "ink bottom",
    "ink left",
)
"""The corners and the centre of the card, and the outermost ink on it: as one reads the digit, not as the image
lies."""


class KeypointScenes(TensorDataModule):
    """One card with a digit in each scene, turned by up to 40 degrees, of several sizes, and cut off here and there.

    Batches are images ``(N, 3, size, size)`` float32 and keypoints ``(N, 9, 3)`` float32: x, y in pixels, and 2, or 0
    for what is outside of the image. Only who reads the digit knows which corner is the left upper one. The scenes of a
    split are always the same, and no drawn digit is in two splits.

    Args:
        batch_size: Scenes in a batch.
        train_size: Scenes to train on.
        val_size: Scenes to validate on.
        test_size: Scenes for the test.
        size: Height and width, in pixels.
        num_workers: Processes that load; 0 is fastest for tensors in memory.

    Raises:
        ModuleNotFoundError: Without scikit-learn.
    """

    num_keypoints = len(JOINTS)
    keypoint_names = JOINTS

    def __init__(
        self,
        batch_size: int = 32,
        train_size: int = 1000,
        val_size: int = 100,
        test_size: int = 400,
        size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, mean=(0.5,) * 3, std=(0.25,) * 3)
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        self.size = size
        self.image_size = (size, size)

    def setup(self, stage: str) -> None:
        """Compose the scenes."""
        if not self.splits:
            for seed, (split, count) in enumerate(self.sizes.items()):
                self.splits[split] = TensorImages(*cards(count, seed, split, self.size))


def cards(count: int, seed: int, split: str = "train", size: int = 64, noise: float = 0.05) -> tuple[Tensor, Tensor]:
    """Composes scenes of a card with a digit. Equal arguments give equal scenes.

    Args:
        count: Number of scenes N.
        seed: Of everything that is random.
        split: Whose digits to draw: ``train``, ``val`` or ``test``.
        size: Height and width of a scene, in pixels.
        noise: Standard deviation of the pixels' noise; the range of a pixel is 1.

    Returns:
        Images ``(N, 3, size, size)``, uint8, and keypoints ``(N, 9, 3)``, float32.

    Example:
        >>> images, points = cards(count=2, seed=0)
        >>> images.shape, points.shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 9, 3]))
    """
    ink, _ = handwritten(split)
    rng = torch.Generator().manual_seed(seed)
    images = backgrounds(count, size, rng)
    ink = F.pad(ink[torch.randint(len(ink), (count,), generator=rng)], (1, 1, 1, 1))  # 10 x 10: the card and its edge
    angle, side, *centre = torch.rand(4, count, generator=rng).unbind()
    angle, side = (angle - 0.5) * math.radians(80), (0.4 + 0.3 * side) * size / 2
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), dim=-1).view(-1, 2, 2)
    middle = (0.3 + 0.4 * torch.stack(centre, dim=-1)) * size
    # From pixels of the scene to places on the card, whose corners are at -1 and 1.
    axis = torch.arange(size) + 0.5
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).view(1, -1, 2)
    on_card = ((pixels - middle[:, None]) @ turn / side[:, None, None]).view(count, size, size, 2)
    card = (on_card.abs() <= 1).all(-1).unsqueeze(1)
    shown = F.grid_sample(ink.unsqueeze(1), on_card, align_corners=False) * card
    for n, (here, drawn) in enumerate(zip(card, shown, strict=True)):
        paper = contrasting(images[n].mean((1, 2)), rng)
        images[n] += here * 0.5 * (paper.view(3, 1, 1) - images[n])
        images[n] += drawn * (contrasting(paper, rng).view(3, 1, 1) - images[n])
    images += noise * torch.randn(images.shape, generator=rng)
    points = _joints(ink) * side[:, None, None] @ turn.mT + middle[:, None]
    inside = ((points >= 0) & (points < size)).all(-1, keepdim=True)
    return images.clamp(0, 1).mul(255).round().to(torch.uint8), torch.cat((points, 2.0 * inside), dim=-1)


def _joints(ink: Tensor) -> Tensor:
    """Returns the joints ``(N, 9, 2)`` on the card, from -1 to 1, of digits ``(N, 10, 10)``."""
    frame = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]])
    place = (torch.arange(10) + 0.5) / 5 - 1
    there = ink > 0.5
    found = []
    for axis, last in ((0, False), (1, True), (0, True), (1, False)):
        rows = there if axis == 0 else there.mT
        order = place.flip(0) if last else place
        ranked = rows.flip(1) if last else rows
        first = ranked.any(2).int().argmax(1)  # the outermost row with ink
        weight = ranked[torch.arange(len(ink)), first].float()
        along, across = order[first], (weight * place).sum(1) / weight.sum(1)
        found.append(torch.stack((across, along) if axis == 0 else (along, across), dim=-1))
    return torch.cat((frame.expand(len(ink), -1, -1), torch.stack(found, dim=1)), dim=1)
