"""Masks of the pixels that count: brought to a map's resolution, and what does not count is taken out of it."""

import torch
from torch import Tensor

from lightning_kd.losses import _check


def resized(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a mask or labels (B, H, W) as (B, h, w): of each cell the nearest to its centre."""
    if tuple(labels.shape[1:]) == tuple(size):
        return labels
    rows, columns = (
        # the pixel under the centre (i + 1/2) * old / new, in whole numbers
        (2 * torch.arange(new, device=labels.device) + 1) * old // (2 * new)
        for old, new in zip(labels.shape[1:], size, strict=True)
    )
    return labels[:, rows[:, None], columns]


def counted(mask: Tensor | None, x: Tensor, dim: int = 1) -> Tensor | None:
    """Return a mask (B, H, W) at the resolution of a map (B, C, h, w); vectors (B, C) have no pixels, so None."""
    if mask is None or x.ndim == 2:
        return None
    if x.ndim != 4:
        raise ValueError(
            f"a mask is for maps (B, C, H, W), and this is {tuple(x.shape)}. Lay tokens of images out as a map first, "
            "projectors.TokensToMap; of texts leave the padding out by a loss of your own, which may ask for any label."
        )
    if mask.dtype != torch.bool or mask.ndim != 3 or len(mask) != len(x):
        raise ValueError(
            f"a mask is a bool tensor (B, H, W), True where a pixel counts; got {mask.dtype} of shape "
            f"{tuple(mask.shape)} for a map {tuple(x.shape)}. For labels with an ignored index: target != 255."
        )
    _, _, height, width = x.movedim(dim, 1).shape
    return resized(mask, (height, width))


def blanked(
    student: Tensor, teacher: Tensor, mask: Tensor | None, dim: int = 1
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return both maps with 0 where the mask is False, and the mask at their resolution; as they are without one.

    What is replaced cannot reach the value nor the gradient, not even where it is no number.
    """
    here = counted(mask, student, dim)
    if here is None:
        return student, teacher, None
    everywhere = here.unsqueeze(dim)
    return torch.where(everywhere, student, 0.0), torch.where(everywhere, teacher, 0.0), here


def total(here: Tensor) -> Tensor:
    """Return how many pixels count, at least 1, so that a mean over none of them is 0."""
    return here.sum().clamp_min(1)


def class_target(target: Tensor | None, x: Tensor) -> Tensor:
    """Return class indices (B, H, W) as int64 at the resolution of a map (B, C, h, w), or raise ``ValueError``."""
    given: object = target  # what the batch has in that place
    if isinstance(given, Tensor) and given.ndim == 3 and x.ndim == 4:
        target = resized(given, (x.shape[2], x.shape[3]))
    return _check.class_target(target, x, bounded=False)
