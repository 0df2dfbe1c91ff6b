"""DKD: the KD loss taken apart into target and non-target knowledge."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import per_position, rows, upcast


def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
) -> Tensor:
    """Return ``T^2 * (alpha * TCKD + beta * NCKD)``; see :class:`DKD`."""
    _check.temperature(temperature)
    _check.logits(student, teacher, classes=3, why=_check.TWO_CLASSES)
    label = _check.class_target(target, student).reshape(-1, 1)
    mask = torch.zeros_like(rows(student), dtype=torch.bool).scatter(1, label, True)
    scale = per_position(temperature, student)
    s_binary, s_rest = _decouple(rows(upcast(student) / scale), mask, label)
    t_binary, t_rest = _decouple(rows(upcast(teacher.detach()) / scale), mask, label)
    if isinstance(scale, Tensor) and scale.ndim:  # each row by its own
        squares = rows(scale.expand_as(student[:, :1]) ** 2)
        tckd = (squares * F.kl_div(s_binary, t_binary, reduction="none", log_target=True)).sum() / len(mask)
        nckd = (squares * F.kl_div(s_rest, t_rest, reduction="none", log_target=True)).sum() / len(mask)
        return alpha * tckd + beta * nckd
    tckd = F.kl_div(s_binary, t_binary, reduction="batchmean", log_target=True)
    nckd = F.kl_div(s_rest, t_rest, reduction="batchmean", log_target=True)
    return scale**2 * (alpha * tckd + beta * nckd)


def _decouple(scaled: Tensor, mask: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log (p_y, 1 - p_y)`` (N, 2) and the log-distribution over the other classes (N, C)."""
    log_p = scaled.log_softmax(1)
    others = scaled.masked_fill(mask, -torch.inf)
    # log(1 - p_y) as a logsumexp of the other classes: no subtraction, so no log(0) when p_y rounds to 1
    log_rest = log_p.masked_fill(mask, -torch.inf).logsumexp(1, keepdim=True)
    binary = torch.cat((log_p.gather(1, label), log_rest), dim=1)
    # the target's place holds 0 on both sides: equal, hence nothing to the KL, and finite
    return binary, others.log_softmax(1).masked_fill(mask, 0.0)


class DKD(nn.Module):
    """Decoupled KD: weighs target-class and non-target-class knowledge apart (Zhao et al.).

    With ``p = softmax(logits / T)``, label y, and ``q_i = p_i / (1 - p_y)`` for the classes i != y::

        TCKD = KL((p_y, 1 - p_y)_t || (p_y, 1 - p_y)_s)
        NCKD = KL(q_t || q_s)
        loss = T^2 * (alpha * TCKD + beta * NCKD), averaged over samples and positions

    With ``alpha = 1`` and ``beta = 1 - p_y`` of the teacher, sample by sample, it is :class:`KD`. The paper
    warms the loss up linearly over the first 20 epochs on CIFAR-100: schedule the term's weight.

    Args:
        alpha: Weight of the target-class part, not negative; one of the two may be 0.
        beta: Weight of the non-target part; the paper takes 8, 6 or 2 on CIFAR-100, 0.5 on ImageNet.
        temperature: T > 0. May be changed between steps; the function takes a tensor, too: one for each sample (B), or
            for each sample and position.

    Returns:
        ``forward(student, teacher, target)`` takes logits (B, C) or (B, C, ...) and class indices (B) or
        (B, ...), and returns a scalar, zero at equality.

    Raises:
        ValueError: If the shapes differ, if there are fewer than three classes, or if the target holds no
            class indices.

    Source:
        Zhao et al., Decoupled Knowledge Distillation, arXiv 2203.08679.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> student, teacher = torch.zeros(2, 10), 3 * torch.eye(10)[:2]
        >>> losses.DKD()(student, teacher, torch.tensor([0, 1])).shape
        torch.Size([])
    """

    per_sample = True
    """The temperature may be a tensor, one for each sample."""

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        _check.weights(alpha=alpha, beta=beta)
        self.alpha = alpha
        self.beta = beta
        self.temperature: float | Tensor = _check.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Return the decoupled divergence of two logits, given the labels."""
        return dkd(student, teacher, target, self.alpha, self.beta, self.temperature)
