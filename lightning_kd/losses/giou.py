"""GIoU: where the boxes of two detectors overlap."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._boxes import check_bins, weighted_mean
from lightning_kd.losses._numerics import upcast

_EPSILON = 1e-7  # of an area in cells; two boxes without any are equal


def giou(
    student: Tensor,
    teacher: Tensor,
    boxes: Sequence[Tensor] | None = None,
    regions: Tensor | None = None,
    bins: int = 17,
) -> Tensor:
    """Return ``1 - GIoU`` of the boxes that two maps of distributions expect, averaged; see :class:`GIoU`."""
    _check.maps(student, teacher)
    check_bins(student, bins)
    s, t = (_distances(x, bins) for x in (student, teacher.detach()))
    inner, outer = _area(torch.minimum(s, t)), _area(torch.maximum(s, t))
    union = _area(s) + _area(t) - inner
    overlap = (inner + _EPSILON) / (union + _EPSILON) - (outer - union) / (outer + _EPSILON)
    return weighted_mean((1.0 - overlap).mean(1), boxes, regions)


def _distances(logits: Tensor, bins: int) -> Tensor:
    """Return (B, A, 4, H, W), of each anchor's box how far left, top, right and bottom are, in cells."""
    batch, channels, height, width = logits.shape
    chances = upcast(logits).reshape(batch, channels // (4 * bins), 4, bins, height, width).softmax(3)
    values = torch.arange(bins, device=chances.device, dtype=chances.dtype).view(-1, 1, 1)
    return (chances * values).sum(3)  # and no matrix product, which autocast would do in half precision


def _area(distances: Tensor) -> Tensor:
    left, top, right, bottom = distances.unbind(2)
    return (left + right) * (top + bottom)


class GIoU(nn.Module):
    """Overlap of the boxes that student and teacher expect at a position, for heads of GFL's kind.

    Such a head answers, for each of the four edges ``e`` of a position's box, with logits over ``bins`` distances. With
    the expected distance ``d[e] = sum_k k * softmax(logits[e])[k]`` the box is decoded, and of the boxes A of the
    student and B of the teacher::

        loss = 1 - (|A & B| / |A | B| - (|C| - |A | B|) / |C|),    C the smallest box around both,

    averaged over the positions that count, as in :class:`~lightning_kd.losses.LD`: in the ``regions``, else in the
    ``boxes``, else all. Both boxes are around one point, so neither it nor the stride matters. It is the third term of
    CrossKD's code for GFL, there of weight 2, and its positions weigh by the teacher's highest score. It wants logits
    behind the learned scale of a level, ``reg`` of ``tasks.MMDetection``: before it the distances are others.

    Args:
        bins: Distances per edge: ``reg_max + 1``.

    Returns:
        ``forward(student, teacher, boxes=None, regions=None)`` takes maps (B, 4 * bins, H, W), of each sample boxes
        (n, 4), x1 y1 x2 y2 in fractions of the input, and weights (B, H, W) of the level's positions; returns a scalar
        in [0, 2], zero at equality, and zero where no position counts.

    Raises:
        ValueError: If the shapes differ, those of the regions too, or the channels are no multiple of 4 * bins.

    Source:
        Wang et al., CrossKD: Cross-Head Knowledge Distillation for Dense Object Detection, arXiv 2306.11369;
        https://github.com/jbwang1997/CrossKD. GIoU: Rezatofighi et al., arXiv 1902.09630.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher = torch.randn(1, 68, 8, 8)
        >>> losses.GIoU()(teacher, teacher) < 1e-6, losses.GIoU()(-teacher, teacher) > 0
        (tensor(True), tensor(True))
    """

    align: ClassVar[Literal["none", "map", "size", "shape"]] = "none"

    def __init__(self, bins: int = 17) -> None:
        super().__init__()
        self.bins = _check.whole("bins", bins)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        boxes: Sequence[Tensor] | None = None,
        regions: Tensor | None = None,
    ) -> Tensor:
        """Return one minus the overlap of the boxes of two maps."""
        return giou(student, teacher, boxes, regions, self.bins)
