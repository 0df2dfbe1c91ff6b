"""DIST: relations between and within classes, through correlation."""

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import rows, unit, upcast

_TWO_CLASSES = (
    "Of two classes the rows always correlate by 1 or -1, with no gradient, so that without gamma nothing is taught: "
    "use KD() for two classes, KD(activation='sigmoid') for binary and multi-label logits."
)

_TWO_SAMPLES = (
    "a correlation over one is undefined, and over two it is 1 or -1, with no gradient (all there is without beta)."
)


def dist(student: Tensor, teacher: Tensor, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> Tensor:
    """Return ``T^2 * (beta * (1 - rho_rows) + gamma * (1 - rho_columns))``; see :class:`DIST`."""
    _check.temperature(temperature)
    _check.logits(student, teacher, classes=2 if gamma != 0 else 3, why=_TWO_CLASSES)
    p_s = (rows(upcast(student)) / temperature).softmax(1)
    p_t = (rows(upcast(teacher.detach())) / temperature).softmax(1)
    if gamma != 0:
        _check.samples(p_s, p_t, 2 if beta != 0 else 3, _TWO_SAMPLES)
    loss = beta * (1 - _pearson(p_s, p_t, dim=1)) + gamma * (1 - _pearson(p_s, p_t, dim=0))
    return temperature**2 * loss


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return (_standard(a, dim) * _standard(b, dim)).sum(dim).mean()


def _standard(p: Tensor, dim: int) -> Tensor:
    # what remains of a constant after its mean is taken off is rounding, some 1e-7 of it: no direction
    noise = 1e-6 * torch.linalg.vector_norm(p.detach(), dim=dim, keepdim=True)
    return unit(p - p.mean(dim, keepdim=True), dim, eps=noise.clamp_min(1e-8))


class DIST(nn.Module):
    """Correlation of the predictions across classes and across the batch (Huang et al.).

    With ``p = softmax(logits / T)`` as a matrix (N, C), N samples and positions, and ``rho`` the mean Pearson
    correlation of student and teacher, of their rows (classes of a sample) or columns (samples of a class)::

        loss = T^2 * (beta * (1 - rho_rows) + gamma * (1 - rho_columns))

    A row or column that is constant up to rounding counts as uncorrelated and has no gradient. Two classes always
    correlate by 1 or -1, so that only gamma teaches there; for one logit per sample and for independent labels use
    ``KD(activation="sigmoid")``: the loss sees no target and cannot tell.

    Args:
        beta: Weight of the relation between the classes of a sample.
        gamma: Weight of the relation between the samples of a class.
        temperature: T > 0. May be changed between steps.

    Returns:
        ``forward(student, teacher)``, both logits (B, C) or (B, C, ...), returns a scalar, zero where the two
        are perfectly correlated.

    Raises:
        ValueError: If the shapes differ, with fewer than two samples (three if beta is 0, one if gamma is 0), or fewer
            than two classes (three if gamma is 0).

    Source:
        Huang et al., Knowledge Distillation from A Stronger Teacher, arXiv 2205.10536.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher = torch.randn(4, 10)
        >>> torch.allclose(losses.DIST()(teacher + 1, teacher), torch.tensor(0.0), atol=1e-5)
        True
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        _check.weights(beta=beta, gamma=gamma)
        self.beta = beta
        self.gamma = gamma
        self.temperature = _check.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return how far two logits are from perfectly correlated."""
        return dist(student, teacher, self.beta, self.gamma, self.temperature)
