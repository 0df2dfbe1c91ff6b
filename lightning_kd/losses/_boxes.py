"""Boxes in fractions of the input, on the cells of a map."""

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
