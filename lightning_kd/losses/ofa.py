"""OFA: logits of an intermediate exit against the teacher's, with the target enhanced."""

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import rows, upcast

Enhance = Literal["all", "target"]


def ofa(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    eps: float = 1.0,
    temperature: float = 1.0,
    enhance: Enhance = "all",
) -> Tensor:
    """Return ``-sum(((p_t + 1_y)^eps - 1_y) log p_s)``; see :class:`OFA`."""
    _check.temperature(temperature)
    _check.logits(student, teacher)
    label = _check.class_target(target, student).reshape(-1, 1)
    log_s = (rows(upcast(student)) / temperature).log_softmax(1)
    p_t = (rows(upcast(teacher.detach())) / temperature).softmax(1)
    enhanced = torch.expm1(eps * p_t.gather(1, label).log1p())  # (1 + p)^eps - 1 without cancellation
    others = p_t.pow(eps) if enhance == "all" else p_t
    return -(others.scatter(1, label, enhanced) * log_s).sum(1).mean()


class OFA(nn.Module):
    """One-for-all KD: target-enhanced loss on the logits of an intermediate exit (Hao et al.).

    With ``p = softmax(logits / T)`` and ``1_y`` the one-hot label::

        loss = -sum_c ((p_t[c] + 1_y[c])^eps - 1_y[c]) * log p_s[c], averaged over samples and positions

    ``eps > 1`` strengthens the target class by the teacher's confidence in it; with ``eps = 1`` it is the
    cross entropy with the teacher's soft labels, smallest at equality. There is no factor T^2. The exits are
    projectors that map a stage's features to logits; each exit is one term.

    The formula is that of the authors' code, with which the published numbers were made. In the paper the
    exponent acts on the target class alone and the hard-label cross entropy is part of the loss:
    ``enhance="target"`` is that, less the cross entropy, which is here the task's own loss.

    Args:
        eps: The exponent, positive; may differ per exit.
        temperature: T > 0. May be changed between steps.
        enhance: ``"all"`` raises every class to ``eps``; ``"target"`` the target only.

    Returns:
        ``forward(student, teacher, target)`` takes logits (B, C) or (B, C, ...) and class indices (B) or
        (B, ...), and returns a scalar.

    Raises:
        ValueError: If the shapes differ, if there are fewer than two classes, or if the target holds no class
            indices.

    Source:
        Hao et al., One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation,
        arXiv 2310.19444.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> exit_logits, teacher = torch.zeros(2, 10), 3 * torch.eye(10)[:2]
        >>> losses.OFA(eps=1.5)(exit_logits, teacher, torch.tensor([0, 1])) > 0
        tensor(True)
    """

    def __init__(self, eps: float = 1.0, temperature: float = 1.0, enhance: Enhance = "all") -> None:
        super().__init__()
        if enhance not in ("all", "target"):
            raise ValueError(f"enhance must be 'all' or 'target', got {enhance!r}.")
        self.eps = _check.positive("eps", eps)
        self.temperature = _check.positive("temperature", temperature)
        self.enhance: Enhance = enhance

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Return the target-enhanced cross entropy of two logits, given the labels."""
        return ofa(student, teacher, target, self.eps, self.temperature, self.enhance)
