"""SKD: which places of an image are alike."""

from typing import ClassVar, Literal

from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._nodes import Pool, nodes
from lightning_kd.losses._numerics import full_precision


def skd(student: Tensor, teacher: Tensor, patch: int = 2, pool: Pool = "average", mask: Tensor | None = None) -> Tensor:
    """Return ``mean((a_s - a_t)^2)`` of the similarities of places; see :class:`SKD`."""
    _check.maps(student, teacher, channels=False)
    _check.direction(student)
    s, t, counts = nodes(student, teacher, patch, pool, mask)
    with full_precision(s):
        difference = s @ s.transpose(1, 2) - t @ t.transpose(1, 2)
    pairs = counts.unsqueeze(1) & counts.unsqueeze(2)
    # what does not count is a vector of zeros on both sides
    return difference.square().sum() / _mask.total(pairs)


class SKD(nn.Module):
    """Structured pair-wise distillation: match which places of an image are alike (Liu et al.).

    The map is cut into patches, the nodes; f_i is the mean of the features in node i, and
    ``a_ij = cos(f_i, f_j)``::

        loss = mean((a_s - a_t)^2)     over images and all pairs of nodes

    The authors' code takes the maximum instead of the mean, ``pool="max"``, and cuts the map into 2 x 2 nodes: a
    ``patch`` of half the map. The number of pairs is the square of the number of nodes; keep that below some
    thousands. The paper's adversarial (holistic) part is another method and not here; its pixel-wise part is ``KD``.

    Args:
        patch: Side of a node in pixels of the map.
        pool: How the features of a node become one.

    Returns:
        ``forward(student, teacher, mask=None)`` takes maps (B, C, H, W) with channels of their own and returns a
        scalar, zero at equality. With a mask (B, H', W') nodes are of the pixels where it is True, and those without
        one are in no pair.

    Raises:
        ValueError: If batch or resolution differ, or there is one node or channel only.

    Source:
        Liu et al., Structured Knowledge Distillation for Dense Prediction, arXiv 1903.04197.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher = torch.randn(2, 8, 16, 16)
        >>> bool(losses.SKD()(3 * teacher, teacher) < 1e-6)
        True
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "size"

    def __init__(self, patch: int = 2, pool: Pool = "average") -> None:
        super().__init__()
        if pool not in ("average", "max"):
            raise ValueError(f"pool must be 'average' or 'max', got {pool!r}.")
        self.patch = _check.whole("patch", patch)
        self.pool: Pool = pool

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return how differently alike the places of two maps are."""
        return skd(student, teacher, self.patch, self.pool, mask)
