"""A temperature for each sample, from how certain the teacher is of it."""

import math
from typing import Literal

from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import upcast
from lightning_kd.losses._wrapped import Wrapped, temperature_of_the_loss

Confidence = Literal["probability", "entropy"]


def confidence(logits: Tensor, by: Confidence = "probability", dim: int = 1) -> Tensor:
    """Return how certain logits (B, C, ...) are, (B, ...), from 0 (all classes alike) to 1; see `SampleTemperature`."""
    log_p = upcast(logits).log_softmax(dim)
    classes = logits.shape[dim]
    if by == "probability":
        return (log_p.amax(dim).exp() * classes - 1.0) / (classes - 1.0)
    return 1.0 + (log_p.exp() * log_p).sum(dim) / math.log(classes)


class SampleTemperature(Wrapped):
    """A temperature for each sample: softer where the teacher is certain, sharper where it is not.

    With the temperature T of the wrapped loss, C classes, and ``p = softmax(teacher)`` of sample (and position) i::

        T_i = T * spread ** (2 * c_i - 1),  from T / spread to T * spread
        c_i = (max(p) - 1/C) / (1 - 1/C)    "probability"
        c_i = 1 - H(p) / log C              "entropy"

    A certain teacher says more about the other classes when it is softened; one that is not is better not softened any
    more. A temperature that goes by sample and certainty is the idea of dynamic temperature distillation (Wen et al.);
    swing distillation (Li et al.) has one for each token, by how private it is. This formula is the plainest with
    bounds, and **neither paper's own**. The factor T_i^2 stands inside the mean over samples.

    A schedule of the temperature is one of T. Logged is ``train/<term>/mean_temperature``.

    Args:
        loss: A loss that takes a temperature for each sample: ``KD()``, ``DKD()``, or one of these standardised.
        spread: Largest factor of the temperature; below 1 the certain samples are the sharp ones.
        by: What certainty is measured by.
        dim: The class dimension, that of ``loss``; -1 for tokens (B, N, C).

    Returns:
        ``forward(student, teacher, target=None, mask=None)`` returns what ``loss`` returns; target and mask are
        passed on if ``loss`` takes them.

    Raises:
        ValueError: If ``loss`` cannot take a temperature for each sample, or ``spread`` is not positive.

    Source:
        After Wen et al., Preparing Lessons: Improve Knowledge Distillation with Better Supervision, arXiv 1911.07471,
        and Li et al., Swing Distillation, arXiv 2212.08349; not their equations.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> loss = losses.SampleTemperature(losses.KD(temperature=4.0), spread=2.0)
        >>> teacher = torch.tensor([[0.0, 0.0, 0.0], [99.0, 0.0, 0.0]])
        >>> loss.temperatures(teacher)
        tensor([2., 8.])
    """

    def __init__(self, loss: nn.Module, spread: float = 2.0, by: Confidence = "probability", dim: int = 1) -> None:
        super().__init__(loss, tempers=True)
        if not self.per_sample:
            raise ValueError(
                f"{type(loss).__name__} takes one temperature for all samples. Wrap KD() or DKD(), or one of these in "
                "Standardized."
            )
        if by not in ("probability", "entropy"):
            raise ValueError(f"by is 'probability' or 'entropy', got {by!r}.")
        self.per_sample = False  # from here on it is the teacher who says
        self.spread = _check.positive("spread", spread)
        self.by: Confidence = by
        self.dim = _check.dimension(dim)
        self.values: dict[str, Tensor] = {}
        """The mean temperature of the last call; logged, and read by nothing else."""

    temperature = temperature_of_the_loss

    def temperatures(self, teacher: Tensor) -> Tensor:
        """Return the temperatures (B, ...) of the teacher's logits (B, C, ...)."""
        return self.temperature * self.spread ** (2.0 * confidence(teacher, self.by, self.dim) - 1.0)  # type: ignore[no-any-return]

    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the wrapped loss at the temperatures of the samples."""
        _check.logits(student, teacher, self.dim)
        student, teacher, here = _mask.blanked(student, teacher.detach(), mask, self.dim)
        temperatures = self.temperatures(teacher)
        known = temperatures.detach()
        mean = known.mean() if here is None else known.where(here, 0.0).sum() / _mask.total(here)
        self.values = {"mean_temperature": mean}
        return self.call(student, teacher, target, mask, temperatures)
