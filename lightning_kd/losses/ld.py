"""LD: where the edges of a box may be."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._boxes import check_bins, weighted_mean
from lightning_kd.losses._numerics import upcast


def ld(
    student: Tensor,
    teacher: Tensor,
    boxes: Sequence[Tensor] | None = None,
    regions: Tensor | None = None,
    bins: int = 17,
    temperature: float = 10.0,
) -> Tensor:
    """Return ``T^2 * KL`` of the edges' distributions, averaged over edges and positions; see :class:`LD`."""
    _check.temperature(temperature)
    _check.maps(student, teacher)
    check_bins(student, bins)
    log_s, log_t = (
        (upcast(x) / temperature).reshape(len(x), x.shape[1] // bins, bins, *x.shape[2:]).log_softmax(2)
        for x in (student, teacher.detach())
    )
    divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(2).mean(1)
    return temperature**2 * weighted_mean(divergence, boxes, regions)


class LD(nn.Module):
    """Localisation distillation: match the distributions of where each edge of a box is (Zheng et al.).

    For heads that answer, for each of the four edges ``e`` of a position's box, with logits over ``bins`` distances:
    GFL and its descendants. With ``p = softmax(logits / T)``::

        loss = T^2 * sum_e KL(p_t[e] || p_s[e]) / 4,    averaged over the positions that count

    The paper distils where an anchor is assigned to a thing, the main region, and in a valuable region around it.
    Those are the ``regions``, by weights of a level's positions; ``tasks.MMDetection`` computes them with anchors and
    assigner of a student like GFL. Without them, positions count whose centre is in one of the ``boxes``, **which are
    not the paper's regions**, and without boxes all of them.

    The divergence is the paper's, with T^2 as in the authors' code. That sums over positions and divides by the number
    of bins; this is the mean, weighted by the regions (whose weights count as 1 in sum if they are less), so that 0.25
    of theirs is about ``0.25 / 17`` for each position that counts in a level and a sample.

    Args:
        bins: Distances per edge: ``reg_max + 1``.
        temperature: T > 0. May be changed between steps.

    Returns:
        ``forward(student, teacher, boxes=None, regions=None)`` takes maps (B, 4 * bins, H, W), one level of GFL's
        ``bbox_head[1][:]``, of each sample boxes (n, 4), x1 y1 x2 y2 in fractions of the input, and weights (B, H, W)
        of the level's positions; returns a scalar, zero at equality, and zero where no position counts.

    Raises:
        ValueError: If the shapes differ, those of the regions too, or the channels are no multiple of 4 * bins.

    Source:
        Zheng et al., Localization Distillation for Dense Object Detection, arXiv 2102.12252;
        https://github.com/HikariTJU/LD.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher, boxes = torch.randn(1, 68, 8, 8), [torch.tensor([[0.1, 0.1, 0.6, 0.9]])]
        >>> losses.LD()(teacher, teacher, boxes) < 1e-6, losses.LD()(-teacher, teacher, boxes) > 0
        (tensor(True), tensor(True))
    """

    align: ClassVar[Literal["none", "map", "size", "shape"]] = "none"

    def __init__(self, bins: int = 17, temperature: float = 10.0) -> None:
        super().__init__()
        self.bins = _check.whole("bins", bins)
        self.temperature = _check.positive("temperature", temperature)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        boxes: Sequence[Tensor] | None = None,
        regions: Tensor | None = None,
    ) -> Tensor:
        """Return the divergence of two maps of box distributions."""
        return ld(student, teacher, boxes, regions, self.bins, self.temperature)
