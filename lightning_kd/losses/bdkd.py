"""BDKD: forward and reverse divergence, balanced sample by sample."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import rows, upcast


def bdkd(student: Tensor, teacher: Tensor, temperature: float = 4.0, emphasis: float = 2.0) -> Tensor:
    """Return ``T^2 * (a KL(p_t || p_s) + b KL(p_s || p_t))``; see :class:`BDKD`."""
    _check.temperature(temperature)
    _check.logits(student, teacher)
    log_s = (rows(upcast(student)) / temperature).log_softmax(1)
    log_t = (rows(upcast(teacher.detach())) / temperature).log_softmax(1)
    # kl_div(log q, log p) is KL(p || q)
    forward = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)
    reverse = F.kl_div(log_t, log_s, reduction="none", log_target=True).sum(1)
    student_unsure = _entropy(log_s) > _entropy(log_t)
    balanced = torch.where(student_unsure, forward + emphasis * reverse, emphasis * forward + reverse)
    return temperature**2 * balanced.mean()


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(1)


class BDKD(nn.Module):
    """Balanced divergences: forward and reverse KL, weighted by who is more certain of the sample (Amara et al.).

    With ``p = softmax(logits / T)`` and the entropy ``H`` of each sample and position::

        loss = T^2 * (a * KL(p_t || p_s) + b * KL(p_s || p_t)), averaged over samples and positions
        a, b = 1, emphasis   where H(p_s) > H(p_t): the reverse KL sharpens a student that is less certain
        a, b = emphasis, 1   elsewhere: the forward KL widens one that is more certain

    The paper weighs both divergences per sample by the gap of the entropies. Which of the two gets the larger weight,
    that ``H`` is of the tempered probabilities, the factor T^2 and the defaults are a reading of its abstract and of
    summaries, **not checked against its equations**. The paper trains the teacher along, with a loss of its own; this
    is the student's part.

    Args:
        temperature: T > 0; the factor T^2 keeps the gradient's scale. May be changed between steps.
        emphasis: Weight of the divergence that corrects the student's certainty, beside 1 of the other; 1 is the plain
            sum.

    Returns:
        ``forward(student, teacher)``, both logits (B, C) or (B, C, ...), returns a scalar, zero at equality.

    Raises:
        ValueError: If the shapes differ, or with fewer than two classes.

    Source:
        Amara et al., BD-KD: Balancing the Divergences for Online Knowledge Distillation, arXiv 2212.12965.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher = 3 * torch.eye(10)[:2]
        >>> losses.BDKD()(torch.zeros(2, 10), teacher) > losses.BDKD(emphasis=1.0)(torch.zeros(2, 10), teacher)
        tensor(True)
    """

    def __init__(self, temperature: float = 4.0, emphasis: float = 2.0) -> None:
        super().__init__()
        self.temperature = _check.positive("temperature", temperature)
        self.emphasis = _check.positive("emphasis", emphasis)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the balanced divergence of two logits of one shape."""
        return bdkd(student, teacher, self.temperature, self.emphasis)
