"""QFL: the scores of every anchor, the more the further they are from the teacher's."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import upcast
from lightning_kd.numbers import is_number


def qfl(student: Tensor, teacher: Tensor, beta: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Return ``|p_s - p_t|^beta * BCE(p_s, p_t)``, the sum over a sample, the mean over samples; see :class:`QFL`."""
    _check.logits(student, teacher, classes=1)
    student, teacher, _ = _mask.blanked(student, teacher.detach(), mask)  # two equal scores are 0 apart
    logits, wanted = upcast(student), upcast(teacher).sigmoid()
    apart = (logits.sigmoid() - wanted).abs()
    error = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return (apart.pow(beta) * error).sum() / len(logits)


class QFL(nn.Module):
    """Quality focal loss between two detectors' scores: match each of them, the more the further they are apart.

    With ``p = sigmoid(logits)``, for each class of each anchor or point::

        loss = |p_s - p_t|^beta * BCE(p_s, p_t),    the sum over the scores of a sample, the mean over samples

    What makes it fit for detectors: nearly all of their scores are of background on which both agree, and a mean over
    all of them would be next to nothing. The sum weighs every score alike, whatever level of the pyramid it is from.

    The authors' code divides by the number of anchors that are assigned to things, which a tensor does not tell: where
    an image has n boxes and each some 5 to 10 such anchors, their weight 1 is about ``1 / (7 n)`` here.

    Args:
        beta: At least 1. The authors of CrossKD take 1; the loss of GFL, which has boxes in the teacher's place, 2.

    Returns:
        ``forward(student, teacher, mask=None)``, logits of one shape, (B, anchors, classes) or (B, anchors * classes,
        H, W), returns a scalar, zero at equality. A mask (B, H, W), for the latter, is True where a position counts.

    Raises:
        ValueError: If the shapes differ, or ``beta`` is below 1, where gradients at equality are infinite.

    Source:
        Li et al., Generalized Focal Loss, arXiv 2006.04388, equation 2; between student and teacher: Wang et al.,
        CrossKD, arXiv 2306.11369.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher = torch.randn(2, 100, 10)
        >>> losses.QFL()(teacher, teacher), losses.QFL()(-teacher, teacher) > 0
        (tensor(0.), tensor(True))
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        if not (is_number(beta) and beta >= 1):
            raise ValueError(f"beta must be finite and at least 1 (else infinite gradients at equality), got {beta!r}.")
        self.beta = beta

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return how far the scores of two models are apart."""
        return qfl(student, teacher, self.beta, mask)
