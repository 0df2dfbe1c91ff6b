"""Maps as vectors of length 1, one for each patch of pixels: what relations between places are made of."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.losses import _mask
from lightning_kd.losses._numerics import unit, upcast

Pool = Literal["average", "max"]


def nodes(
    student: Tensor, teacher: Tensor, patch: int, pool: Pool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both maps as unit vectors (B, nodes, C), and which of the nodes (B, nodes) have a pixel that counts."""
    student, teacher, here = _mask.blanked(student, teacher.detach(), mask)
    if here is None:
        here = torch.ones_like(student[:, 0], dtype=torch.bool)
    counts = _pool(here.unsqueeze(1).float(), patch, "max").flatten(1) > 0
    s, t = (_unit_vectors(x, here, patch, pool) for x in (student, teacher))
    if s.shape[1] < 2:
        raise ValueError(
            f"patches of {patch} x {patch} make one node of a map {tuple(student.shape)}, and one node has no "
            "relations: the term would be silently zero. Use a smaller patch, or tap a layer of a higher resolution."
        )
    return s, t, counts


def _unit_vectors(x: Tensor, here: Tensor, patch: int, pool: Pool) -> Tensor:
    x = upcast(x)
    # directions do not change with the image's scale; without it, squares overflow
    x = x / x.detach().abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    if pool == "max":
        x = _pool(x.masked_fill(~here.unsqueeze(1), -2.0), patch, pool)  # below all others, which are in [-1, 1]
        x = torch.where(x == -2.0, 0.0, x)
    else:
        x = _pool(x, patch, pool)  # a sum would do: of what does not count it is 0, and the length is 1
    return unit(x.flatten(2).transpose(1, 2))


def _pool(x: Tensor, patch: int, pool: Pool) -> Tensor:
    if patch == 1:
        return x
    # at the lower and right edge a patch may be cut off
    return (F.max_pool2d if pool == "max" else F.avg_pool2d)(x, patch, ceil_mode=True)
