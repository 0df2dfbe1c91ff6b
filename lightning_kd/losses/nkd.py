"""NKD: soft target, and the non-target classes normalised among themselves."""

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import rows, upcast


def nkd(student: Tensor, teacher: Tensor, target: Tensor, gamma: float = 1.5, temperature: float = 1.0) -> Tensor:
    """Return ``-t_y log s_y - gamma T^2 sum_i t^_i log s^_i``; see :class:`NKD`."""
    _check.temperature(temperature)
    _check.logits(student, teacher, classes=3, why=_check.TWO_CLASSES)
    label = _check.class_target(target, student).reshape(-1, 1)
    s, t = rows(upcast(student)), rows(upcast(teacher.detach()))
    mask = torch.zeros_like(s, dtype=torch.bool).scatter(1, label, True)
    soft_target = t.softmax(1).gather(1, label) * s.log_softmax(1).gather(1, label)
    log_s = (s / temperature).masked_fill(mask, -torch.inf).log_softmax(1).masked_fill(mask, 0.0)
    q_t = (t / temperature).masked_fill(mask, -torch.inf).softmax(1)
    return -soft_target.mean() - gamma * temperature**2 * (q_t * log_s).sum(1).mean()


class NKD(nn.Module):
    """Normalised KD: soft target label plus renormalised non-target classes (Yang et al.).

    With ``p = softmax(logits)``, label y, and ``q`` the softmax of ``logits / T`` over the classes i != y::

        loss = -p_t[y] log p_s[y] - gamma * T^2 * sum_{i != y} q_t[i] log q_s[i]

    averaged over samples and positions. The target part has no temperature. Both parts are cross entropies,
    so the loss is not zero at equality; the first is smallest where the student is certain of the label.

    Args:
        gamma: Weight of the non-target part, not negative.
        temperature: T > 0 of the non-target part. May be changed between steps.

    Returns:
        ``forward(student, teacher, target)`` takes logits (B, C) or (B, C, ...) and class indices (B) or
        (B, ...), and returns a scalar.

    Raises:
        ValueError: If the shapes differ, if there are fewer than three classes, or if the target holds no
            class indices.

    Source:
        Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, arXiv 2303.13005.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> student, teacher = torch.zeros(2, 10), 3 * torch.eye(10)[:2]
        >>> losses.NKD()(student, teacher, torch.tensor([0, 1])) > 0
        tensor(True)
    """

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__()
        _check.weights(gamma=gamma)
        self.gamma = gamma
        self.temperature = _check.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Return the normalised distillation loss of two logits, given the labels."""
        return nkd(student, teacher, target, self.gamma, self.temperature)
