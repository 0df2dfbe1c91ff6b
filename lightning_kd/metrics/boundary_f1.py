"""The F1 of the boundaries of segmented classes, which torchmetrics lacks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_kd.numbers import is_whole


def boundaries(labels: Tensor, num_classes: int, counted: Tensor) -> Tensor:
    """Where each class touches another one.

    A pixel is on the boundary of its class if one of its eight neighbours is of another class. Neither the edge of the
    image nor pixels that do not count make a boundary.

    Args:
        labels: ``(B, H, W)``, integers below C.
        num_classes: Number of classes C.
        counted: ``(B, H, W)``, bool.

    Returns:
        ``(B, C, H, W)``, bool.
    """
    of_class = F.one_hot(labels.masked_fill(~counted, 0).long(), num_classes).permute(0, 3, 1, 2).bool()
    beside_another = _grown(~of_class & counted.unsqueeze(1), 1)
    return of_class & counted.unsqueeze(1) & beside_another


def _grown(where: Tensor, by: int) -> Tensor:
    """Every True reaches ``by`` pixels further, diagonals included: a square is a row of columns."""
    wide = F.max_pool2d(where.float(), (1, 2 * by + 1), stride=1, padding=(0, by))
    return F.max_pool2d(wide, (2 * by + 1, 1), stride=1, padding=(by, 0)).bool()


class BoundaryF1(Metric):
    r"""The F1 of class boundaries that are found within a tolerance.

    .. math:: P = \frac{|\hat B \cap (B \oplus t)|}{|\hat B|}, \quad R = \frac{|B \cap (\hat B \oplus t)|}{|B|}, \quad
              F_1 = \frac{2 P R}{P + R}

    where :math:`B` and :math:`\hat B` are the true and the predicted boundary pixels of a class in all images and
    :math:`\oplus t` grows by t pixels (diagonals included). The result is the mean over the classes with a boundary in
    truth or prediction. The paper averages over images, and takes for t 0.75 % of the image's diagonal, measured in a
    straight line.

    Args:
        num_classes: Number of classes C.
        tolerance: t, in pixels; 0 wants the same pixels.
        ignore_index: Label of pixels that do not count, and make no boundary.

    Raises:
        ValueError: If the tolerance is negative.

    Example:
        >>> truth, shifted = torch.zeros(2, 1, 8, 8, dtype=torch.long)
        >>> truth[:, :, 4:], shifted[:, :, 5:] = 1, 1
        >>> metric = BoundaryF1(num_classes=2, tolerance=1)
        >>> metric.update(shifted, truth)
        >>> float(metric.compute())
        1.0

    Source: Csurka, Larlus and Perronnin, What is a good evaluation measure for semantic segmentation?, BMVC 2013,
    section 3; https://bmva-archive.org.uk/bmvc/2013/Papers/paper0032/index.html.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    counts: Tensor

    def __init__(self, num_classes: int, tolerance: int = 2, ignore_index: int | None = None) -> None:
        super().__init__()
        if not (is_whole(tolerance) and tolerance >= 0):
            raise ValueError(f"tolerance: expected pixels, 0 or more, received {tolerance!r}")
        self.num_classes = num_classes
        self.tolerance = tolerance
        self.ignore_index = ignore_index
        # Rows: predicted and right, predicted, true and found, true.
        self.add_state("counts", torch.zeros(4, num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Counts the boundary pixels of predicted and true classes, ``(B, H, W)`` integers each."""
        counted = torch.ones_like(target, dtype=torch.bool)
        if self.ignore_index is not None:
            counted = target != self.ignore_index
        said, true = (boundaries(each, self.num_classes, counted) for each in (preds, target))
        pairs = (said & _grown(true, self.tolerance), said, true & _grown(said, self.tolerance), true)
        self.counts += torch.stack([each.sum(dim=(0, 2, 3)) for each in pairs])

    def compute(self) -> Tensor:
        """The mean F1, a scalar; nan if there is no boundary at all."""
        right, said, found, true = self.counts.double()
        there = said + true > 0
        precision, recall = right / said.clamp(min=1), found / true.clamp(min=1)
        f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        mean: Tensor = f1[there].mean().float()
        return mean
