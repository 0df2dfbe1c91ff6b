"""LD: where the edges of a box may be."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._boxes import inside
from lightning_kd.losses._numerics import upcast


def ld(
    student: Tensor,
    teacher: Tensor,
    boxes: Sequence[Tensor] | None = None,
    bins: int = 17,
    temperature: float = 10.0,
) -> Tensor:
    """Return ``T^2 * KL`` of the edges' distributions, averaged over edges and positions; see :class:`LD`."""
    _check.maps(student, teacher)
    channels = student.shape[1]
    if channels % (4 * bins):
        raise ValueError(
            f"a map of box distributions has 4 * bins channels for each anchor of a position; got {channels} channels "
            f"and bins={bins}. GFL's head has reg_max + 1 bins (17 unless configured); heads that regress four numbers "
            "have no distributions: compare those with FitNet()."
        )
    log_s, log_t = (
        (upcast(x) / temperature).reshape(len(x), channels // bins, bins, *x.shape[2:]).log_softmax(2)
        for x in (student, teacher.detach())
    )
    divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(2).mean(1)
    if boxes is None:
        return temperature**2 * divergence.mean()
    here = inside(boxes, student)
    return temperature**2 * torch.where(here, divergence, 0.0).sum() / here.sum().clamp_min(1)


class LD(nn.Module):
    """Localisation distillation: match the distributions of where each edge of a box is (Zheng et al.).

    For heads that answer, for each of the four edges ``e`` of a position's box, with logits over ``bins`` distances:
    GFL and its descendants. With ``p = softmax(logits / T)``::

        loss = T^2 * sum_e KL(p_t[e] || p_s[e]) / 4,    averaged over the positions that count

    The paper distils where an anchor is assigned to a thing, the main region, and in a valuable region around it, both
    as the detector's own assigner has them. Here those positions count whose centre is in a box; all of them where the
    batch has no ``boxes``. **So the regions are not the paper's**; the divergence is, with T^2 as in the authors' code,
    which also divides by the number of bins and weighs positions by the teacher's confidence: its weight 0.25 is
    0.25 / 17 here.

    Args:
        bins: Distances per edge: ``reg_max + 1``.
        temperature: T > 0. May be changed between steps.

    Returns:
        ``forward(student, teacher, boxes=None)`` takes maps (B, 4 * bins, H, W), one level of GFL's
        ``bbox_head[1][:]``, and of each sample boxes (n, 4), x1 y1 x2 y2 in fractions of the input; returns a scalar,
        zero at equality, and zero where no position counts.

    Raises:
        ValueError: If the shapes differ, or the channels are no multiple of 4 * bins.

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
        self.bins = int(_check.positive("bins", bins))
        self.temperature = _check.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor] | None = None) -> Tensor:
        """Return the divergence of two maps of box distributions."""
        return ld(student, teacher, boxes, self.bins, self.temperature)
