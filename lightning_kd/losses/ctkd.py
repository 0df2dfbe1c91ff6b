"""CTKD: a temperature that is learned against the student, more and more so over the run."""

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._wrapped import Wrapped
from lightning_kd.schedules import Cosine, Moment, Schedule


def reverse_gradient(x: Tensor, strength: float) -> Tensor:
    """Return ``x``, whose gradient arrives times ``-strength``."""
    return x.detach() - strength * (x - x.detach())


class CTKD(Wrapped):
    """Curriculum temperature: any loss with a temperature, which is learned to make the task harder (Li et al.).

    With one learned number theta and the strength lambda of the reversal::

        T = low + (high - low) * sigmoid(theta)
        theta follows -lambda * dL/dtheta, so that it raises the loss L that the student lowers

    lambda grows from 0 to 1, along a cosine over the run unless told otherwise: an easy task first, then a harder one.
    As in the authors' code theta begins at 1, and the optimizer that trains the student trains it, with the same weight
    decay. There lambda is 1 after 10 of 240 epochs: ``reversal=Cosine(0.0, 1.0, until=10 / 240)``. This is their global
    temperature, the one their code holds; the paper's other one has a network for each sample.

    Logged are ``train/<term>/temperature`` and ``train/<term>/reversal``.

    Args:
        loss: A loss with a temperature, such as ``KD()`` or ``DKD()``; its own temperature is not used.
        low: Lower bound of the temperature; the authors' ``t_start``.
        high: Upper bound; ``t_start + t_end`` of the authors' code.
        reversal: lambda over the run; ``Cosine(0.0, 1.0)`` unless given.

    Returns:
        ``forward(student, teacher, target=None, mask=None)`` returns what ``loss`` returns; target and mask are
        passed on if ``loss`` takes them.

    Raises:
        ValueError: If ``loss`` has no temperature, or not ``0 < low < high``.

    Source:
        Li et al., Curriculum Temperature for Knowledge Distillation, arXiv 2211.16231; https://github.com/zhengli97/CTKD.

    Example:
        >>> from lightning_kd import losses
        >>> loss = losses.CTKD(losses.KD())
        >>> {name: round(float(value), 2) for name, value in loss.values.items()}
        {'temperature': 15.62, 'reversal': 0.0}
    """

    def __init__(self, loss: nn.Module, low: float = 1.0, high: float = 21.0, reversal: Schedule | None = None) -> None:
        super().__init__(loss, tempers=True)
        self.low, self.high = _check.bounds(low, high)
        self.reversal = reversal or Cosine(0.0, 1.0)
        self.theta = nn.Parameter(torch.tensor(1.0))
        self.at(Moment())

    def at(self, moment: Moment) -> None:
        """Set the strength of the reversal for a moment of the run."""
        self._strength = self.reversal.at(moment)

    @property
    def values(self) -> dict[str, Tensor | float]:
        """The temperature and the strength of the reversal, as of now."""
        return {"temperature": self._temperature_of(self.theta.detach()), "reversal": self._strength}

    def _temperature_of(self, theta: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * theta.sigmoid()

    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the wrapped loss at the learned temperature."""
        temperature = self._temperature_of(reverse_gradient(self.theta, self._strength))
        return self.call(student, teacher, target, mask, temperature)
