"""PLD: the teacher's ranking of the classes, the true one first."""

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import rows, upcast


def pld(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Return the teacher-weighted Plackett-Luce loss of the teacher's ranking; see :class:`PLD`."""
    _check.logits(student, teacher)
    label = _check.class_target(target, student).reshape(-1, 1)
    s, t = rows(upcast(student)), rows(upcast(teacher.detach()))
    order = t.scatter(1, label, torch.inf).argsort(dim=1, descending=True, stable=True)
    weight = t.softmax(1).gather(1, order)
    ranked = s.log_softmax(1).gather(1, order)
    remaining = ranked.flip(1).logcumsumexp(1).flip(1)  # logsumexp over this rank and all below
    return (weight * (remaining - ranked)).sum(1).mean()


class PLD(nn.Module):
    """Plackett-Luce distillation: learn the teacher's class ranking, true label first (Bassam et al.).

    Let ``pi`` list the classes with the label first and the others by falling teacher logit. Each rank is a
    choice among the classes that remain, weighted by the teacher's probability of the class chosen::

        loss = sum_k softmax(t)[pi(k)] * (logsumexp_{l >= k} s[pi(l)] - s[pi(k)])

    averaged over samples and positions. It is convex in the student's logits and contains the cross entropy
    (rank 1), so it is not zero at equality. It can stand in for the task's own loss.

    Returns:
        ``forward(student, teacher, target)`` takes logits (B, C) or (B, C, ...) and class indices (B) or
        (B, ...), and returns a scalar.

    Raises:
        ValueError: If the shapes differ, if there are fewer than two classes, or if the target holds no class
            indices.

    Source:
        Bassam et al., PLD: A Choice-Theoretic List-Wise Knowledge Distillation, arXiv 2506.12542.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
        >>> target = torch.tensor([0])
        >>> losses.PLD()(3 * teacher, teacher, target) < losses.PLD()(-teacher, teacher, target)
        tensor(True)
    """

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Return the ranking loss of two logits, given the labels."""
        return pld(student, teacher, target)
