"""Anomalies that are drawn into normal images: blobs of noise, of another brightness, or of something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_kd.extras import late_import

Kind = Literal["shade", "noise", "foreign", "scratch", "perlin"]

DRAWN: tuple[Kind, ...] = ("shade", "noise")
"""What is drawn into images of the training, unless something else is asked for."""


def checked_kinds(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """Returns kinds that can be drawn without another image.

    Raises:
        ValueError: If there is none, or another.
    """
    known = [kind for kind in get_args(Kind) if kind != "foreign"]
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(known):
        raise ValueError(f"kinds: expected a list of some of {', '.join(known)}, received {kinds!r}")
    return tuple(kinds)


def blob(size: tuple[int, int], generator: torch.Generator, area: tuple[float, float] = (0.01, 0.08)) -> Tensor:
    """Returns a connected-looking patch, bool ``(H, W)``: smooth noise around a place, above a level of its own.

    Args:
        size: Height and width.
        generator: Of the random numbers.
        area: Smallest and largest fraction of the image.

    Example:
        >>> mask = blob((64, 64), torch.Generator().manual_seed(0))
        >>> bool(0.005 < mask.float().mean() < 0.1)
        True
    """
    height, width = size
    noise = torch.rand(1, 1, 6, 6, generator=generator)
    smooth = F.interpolate(noise, size, mode="bicubic", align_corners=False)[0, 0]
    centre = 0.15 + 0.7 * torch.rand(2, generator=generator)
    y = torch.arange(height)[:, None] / height - centre[0]
    x = torch.arange(width)[None, :] / width - centre[1]
    height_of = smooth - 6.0 * (y.square() + x.square()).sqrt()
    low, high = area
    share = low + (high - low) * float(torch.rand((), generator=generator))
    return height_of >= height_of.flatten().kthvalue(max(1, int((1 - share) * height * width))).values


def scratch(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Returns a thin line across a part of the image, bool ``(H, W)``."""
    height, width = size
    start = torch.rand(2, generator=generator) * 0.7
    angle = float(torch.rand((), generator=generator)) * torch.pi / 2
    length = 0.25 + 0.25 * float(torch.rand((), generator=generator))
    steps = torch.linspace(0, length, 4 * max(size))
    rows = ((start[0] + steps * torch.sin(torch.tensor(angle))) * height).long().clamp(0, height - 1)
    columns = ((start[1] + steps * torch.cos(torch.tensor(angle))) * width).long().clamp(0, width - 1)
    mask = torch.zeros(size)
    mask[rows, columns] = 1.0
    return F.max_pool2d(mask[None, None], 3, stride=1, padding=1)[0, 0].bool()


def spoiled(
    image: Tensor, kind: Kind, generator: torch.Generator, foreign: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns an image with an anomaly, and where it is.

    Args:
        image: ``(C, H, W)``, uint8.
        kind: ``"shade"`` is another brightness, ``"noise"`` hides what is there, ``"foreign"`` is a patch of another
            image, ``"scratch"`` a thin line, and ``"perlin"`` what anomalib draws: Perlin's noise, in colours.
        generator: Of the random numbers.
        foreign: The other image, ``(C, H, W)`` uint8.

    Returns:
        The image, uint8, and its mask ``(H, W)``, bool.

    Example:
        >>> image = torch.full((3, 32, 32), 100, dtype=torch.uint8)
        >>> other, mask = spoiled(image, "shade", torch.Generator().manual_seed(0))
        >>> bool((other != image).any(0)[mask].all()), bool((other == image).all(0)[~mask].all())
        (True, True)
    """
    if kind == "perlin":
        return _perlin(image, generator)
    size = (image.shape[-2], image.shape[-1])
    mask = scratch(size, generator) if kind == "scratch" else blob(size, generator)
    pixels = image.float()
    if kind == "foreign":
        assert foreign is not None
        patch = foreign.float()
    elif kind == "noise":
        patch = 255 * torch.rand(size, generator=generator).expand_as(pixels)
    else:
        sign = 1.0 if float(torch.rand((), generator=generator)) < 0.5 else -1.0
        patch = pixels + sign * (35.0 + 45.0 * float(torch.rand((), generator=generator)))
    changed = torch.where(mask, patch, pixels).round().clamp(0, 255).to(torch.uint8)
    return changed, mask


def _perlin(image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lets anomalib draw, which takes its random numbers from torch's global generator."""
    made = late_import("anomalib.data.utils.generators.perlin", "anomalib", "anomaly").PerlinAnomalyGenerator
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changed, mask = made(probability=1.0)(image.float() / 255)
    where = mask[0].bool()
    return torch.where(where, (255 * changed).round().clamp(0, 255).to(torch.uint8), image), where
