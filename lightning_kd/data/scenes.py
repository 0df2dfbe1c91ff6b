"""Scenes of handwritten digits: images whose masks and boxes are exact, with nothing to download."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_kd.extras import late_import

SPLITS = {"train": slice(0, 1200), "val": slice(1200, 1450), "test": slice(1450, 1797)}
"""Of scikit-learn's 1,797 digits, in a fixed shuffled order: no digit that is drawn is in two splits."""

_TRIES = 20


class Scenes(NamedTuple):
    """Composed scenes.

    Attributes:
        images: ``(N, 3, H, W)``, uint8.
        masks: ``(N, H, W)``, uint8: 0 is background, ``d + 1`` the ink of digit ``d`` that is visible.
        boxes: Of each scene, ``(n, 4)`` float32 in pixels, ``x1 y1 x2 y2``, tight around what is visible.
        labels: Of each scene, ``(n,)`` int64, the digits 0 to 9.
    """

    images: Tensor
    masks: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]


def compose(
    count: int,
    seed: int,
    split: str = "train",
    size: int = 64,
    digits: tuple[int, int] = (2, 4),
    scale: tuple[float, float] = (2.0, 4.0),
    overlap: float = 0.1,
    noise: float = 0.08,
    kinds: int = 10,
) -> Scenes:
    """Composes scenes: some digits, enlarged and coloured, on a textured and noisy background.

    Equal arguments give equal scenes. A digit for which no free place is found is left out.

    Args:
        count: Number of scenes N.
        seed: Of everything that is random.
        split: Whose digits to draw: ``train``, ``val`` or ``test``.
        size: Height and width of a scene, in pixels.
        digits: Fewest and most digits in a scene.
        scale: Smallest and largest factor by which a digit of 8x8 pixels is enlarged.
        overlap: Largest fraction of a digit's box that another one's box may share.
        noise: Standard deviation of the pixels' noise; the range of a pixel is 1.
        kinds: The digits from 0 to ``kinds - 1`` are drawn: fewer are learned sooner.

    Returns:
        The scenes.

    Raises:
        ValueError: For another split, if the digits do not fit into the scene, or if there are no such kinds.
        ModuleNotFoundError: Without scikit-learn.

    Example:
        >>> scenes = compose(count=2, seed=0)
        >>> scenes.images.shape, scenes.masks.shape, len(scenes.boxes)
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 64, 64]), 2)

    Source: the digits are those of Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    if not 1.0 <= scale[0] <= scale[1] or size < 8 * scale[1]:
        raise ValueError(
            f"scale={tuple(scale)} makes digits of up to {8 * scale[1]:g} pixels, which have to fit into size={size}: "
            "expected 1 <= smallest <= largest <= size / 8"
        )
    if not 0 <= digits[0] <= digits[1]:
        raise ValueError(f"digits: expected the fewest and the most of a scene, 0 <= fewest <= most, got {digits}")
    ink, labels_of_ink = handwritten(split, kinds)
    rng = torch.Generator().manual_seed(seed)
    images = backgrounds(count, size, rng)
    masks = torch.zeros(count, size, size, dtype=torch.uint8)
    boxes, labels = [], []
    for image, mask in zip(images, masks, strict=True):
        wanted = int(torch.randint(digits[0], digits[1] + 1, (), generator=rng))
        owner = _paint(image, mask, ink, labels_of_ink, wanted, scale, overlap, rng)
        drawn = [(box, mask[owner == i][0] - 1) for i in range(wanted) if (box := _box(owner == i)) is not None]
        boxes.append(torch.stack([box for box, _ in drawn]) if drawn else torch.zeros(0, 4))
        labels.append(torch.tensor([int(kind) for _, kind in drawn], dtype=torch.int64))
    images += noise * torch.randn(images.shape, generator=rng)
    return Scenes(images.clamp(0, 1).mul(255).round().to(torch.uint8), masks, boxes, labels)


def handwritten(split: str, kinds: int = 10) -> tuple[Tensor, Tensor]:
    """The digits of a split, below ``kinds``: ``(n, 8, 8)`` in [0, 1], and which they are, ``(n,)``.

    Raises:
        ValueError: For another split, or if there are no such kinds.
        ModuleNotFoundError: Without scikit-learn.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, received {split!r}")
    if not 1 <= kinds <= 10:
        raise ValueError(f"kinds: expected from 1 to 10, of the digits 0 to kinds - 1, received {kinds}")
    bunch = late_import("sklearn.datasets", "scikit-learn", "segmentation").load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))[SPLITS[split]]
    ink, labels = torch.from_numpy(bunch.images).float().div(16)[order], torch.from_numpy(bunch.target).long()[order]
    return ink[labels < kinds], labels[labels < kinds]


def backgrounds(count: int, size: int, rng: torch.Generator) -> Tensor:
    """A colour of its own for each scene, with smooth structures of three sizes."""
    canvas = 0.15 + 0.7 * torch.rand(count, 3, 1, 1, generator=rng).expand(count, 3, size, size)
    for cells, strength in ((3, 0.15), (8, 0.1), (20, 0.08)):
        light, colour = (torch.randn(count, channels, cells, cells, generator=rng) for channels in (1, 3))
        texture = light + 0.4 * colour
        canvas = canvas + strength * F.interpolate(texture, size=(size, size), mode="bilinear", align_corners=False)
    return canvas.clamp(0, 1)


def _paint(
    image: Tensor,
    mask: Tensor,
    ink: Tensor,
    kinds: Tensor,
    wanted: int,
    scale: tuple[float, float],
    overlap: float,
    rng: torch.Generator,
) -> Tensor:
    """Draws digits into image and mask; returns which of them each pixel shows, -1 where none."""
    size = image.shape[-1]
    owner = torch.full((size, size), -1)
    taken: list[tuple[int, int, int]] = []
    for i in range(wanted):
        side = round(8 * (scale[0] + (scale[1] - scale[0]) * float(torch.rand((), generator=rng))))
        place = _free_place(size, side, taken, overlap, rng)
        chosen = int(torch.randint(len(ink), (), generator=rng))
        contrast = contrasting(image.mean(dim=(1, 2)), rng)
        if place is None:
            continue
        taken.append((*place, side))
        alpha = F.interpolate(ink[chosen, None, None], size=(side, side), mode="bilinear", align_corners=False)[0, 0]
        rows, columns = slice(place[0], place[0] + side), slice(place[1], place[1] + side)
        patch = image[:, rows, columns]
        image[:, rows, columns] = patch + alpha * (contrast.view(3, 1, 1) - patch)
        shown = alpha > 0.5
        mask[rows, columns][shown] = int(kinds[chosen]) + 1
        owner[rows, columns][shown] = i
    return owner


def contrasting(background: Tensor, rng: torch.Generator) -> Tensor:
    """A random colour, away from the background's by 0.35 at least in every channel."""
    colour = torch.rand(3, generator=rng)
    away = torch.where(background < 0.5, background + 0.35, background - 0.35)
    bound = (background < 0.5).float()
    return away + colour * (bound - away)


def _free_place(
    size: int, side: int, taken: list[tuple[int, int, int]], overlap: float, rng: torch.Generator
) -> tuple[int, int] | None:
    for _ in range(_TRIES):
        row, column = torch.randint(size - side + 1, (2,), generator=rng).tolist()
        if all(_shared(row, column, side, other) <= overlap for other in taken):
            return row, column
    return None


def _shared(row: int, column: int, side: int, other: tuple[int, int, int]) -> float:
    """The fraction of the smaller of two squares that the other one covers."""
    high = min(row + side, other[0] + other[2]) - max(row, other[0])
    wide = min(column + side, other[1] + other[2]) - max(column, other[1])
    return max(high, 0) * max(wide, 0) / min(side, other[2]) ** 2


def _box(visible: Tensor) -> Tensor | None:
    rows, columns = visible.any(dim=1).nonzero(), visible.any(dim=0).nonzero()
    if not len(rows):
        return None
    return torch.stack([columns[0, 0], rows[0, 0], columns[-1, 0] + 1, rows[-1, 0] + 1]).float()
