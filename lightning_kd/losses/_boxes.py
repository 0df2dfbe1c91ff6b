"""Boxes on the cells of a map: in fractions of the input, and as distributions of their edges."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check(boxes: Sequence[Tensor], x: Tensor) -> None:
    """Raise ``ValueError`` if the boxes are not (n, 4) for each sample of a map."""
    if len(boxes) != len(x) or any(b.ndim != 2 or b.shape[1] != 4 for b in boxes):
        raise ValueError(
            f"boxes are a list of (n, 4) for each of the {len(x)} samples, x1 y1 x2 y2 in fractions of the input; got "
            f"{[tuple(b.shape) for b in boxes]}."
        )


def inside(boxes: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return where (B, H, W) the centre of a cell of a map (B, C, H, W) is in a box of its sample."""
    check(boxes, x)
    rows, columns = ((torch.arange(n, device=x.device) + 0.5) / n for n in x.shape[2:])
    found = []
    for of_sample in boxes:
        x1, y1, x2, y2 = of_sample.to(x.device, torch.float32)[:, :, None].unbind(1)
        tall, wide = (rows >= y1) & (rows < y2), (columns >= x1) & (columns < x2)
        found.append((tall[:, :, None] & wide[:, None, :]).any(0))
    return torch.stack(found)


def check_bins(x: Tensor, bins: int) -> None:
    """Raise ``ValueError`` if a map has not ``bins`` channels for each of the four edges of an anchor's box."""
    if x.shape[1] % (4 * bins):
        raise ValueError(
            f"a map of box distributions has 4 * bins channels for each anchor of a position; got {x.shape[1]} "
            f"channels and bins={bins}. GFL's head has reg_max + 1 bins (17 unless configured); heads that regress "
            "four numbers have no distributions: compare those with FitNet()."
        )


def weighted_mean(values: Tensor, boxes: Sequence[Tensor] | None, regions: Tensor | None) -> Tensor:
    """Return the mean over positions (B, H, W): by the weights of regions, or in boxes, or of all; of none it is 0."""
    if regions is None and boxes is None:
        return values.mean()
    if regions is None:
        weights = inside(boxes or [], values[:, None]).to(values.dtype)
    elif regions.shape == values.shape:
        weights = regions.to(values.dtype)
    else:
        raise ValueError(
            f"regions are the weights (B, H, W) of a map's positions, {tuple(values.shape)} of this level; got "
            f"{tuple(regions.shape)}."
        )
    weighted = torch.where(weights > 0, weights * values, 0.0).sum()
    return weighted / weights.sum().clamp_min(1)
