"""VID: a learned Gaussian of the teacher's feature given the student's."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import full_precision, upcast
from lightning_kd.numbers import is_number

EPS = 1e-5


def vid(mean: Tensor, teacher: Tensor, rho: Tensor, dim: int = 1) -> Tensor:
    """Return the Gaussian negative log-likelihood of the teacher; see :class:`VID`.

    Args:
        mean: The prediction, of the teacher's shape.
        teacher: The teacher's feature, (B, C) or (B, C, ...).
        rho: (C), the variance before the softplus.
        dim: The channel dimension.

    Returns:
        The mean over all elements, without the constant ``log(2 pi) / 2``.
    """
    _check.same_shape(mean, teacher, "Maps are pooled to the smaller; for others align the positions.")
    error = (upcast(mean) - upcast(teacher.detach())).movedim(dim, -1)
    variance = F.softplus(rho) + EPS
    return 0.5 * (error.square() / variance + variance.log()).mean()


class VID(nn.Module):
    """Variational information: Gaussian likelihood of the teacher's feature, learned variance (Ahn et al.).

    A regressor (three linear layers over the channels, as 1x1 convolutions) predicts the teacher's feature
    from the student's; each channel c has a learned variance ``v_c = softplus(rho_c) + 1e-5``::

        loss = mean(1/2 * ((teacher - regressor(student))^2 / v_c + log v_c))

    It bounds the mutual information of the two features from below, up to a constant; so it may be negative
    and is not zero at equality. Two maps of different resolution meet at the smaller one, by average pooling.

    Args:
        variance: The variance to start from, above 1e-5.
        dim: The channel dimension; -1 for tokens (B, N, C).

    Returns:
        ``forward(student, teacher)``, both (B, C) or (B, C, ...) with their own C, returns a scalar.

    Raises:
        RuntimeError: If ``build(student, teacher)`` was not called; a Term calls it before the optimizers.
        ValueError: If the batch sizes or, other than for maps (B, C, H, W), the positions differ.

    Source:
        Ahn et al., Variational Information Distillation for Knowledge Transfer, arXiv 1904.05835.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> student, teacher = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)
        >>> loss = losses.VID()
        >>> loss.build(student, teacher)
        >>> loss(student, teacher).shape
        torch.Size([])
    """

    regressor: nn.Sequential | None
    rho: nn.Parameter | None

    def __init__(self, variance: float = 5.0, dim: int = 1) -> None:
        super().__init__()
        if not (is_number(variance) and variance > EPS):
            raise ValueError(f"variance must be finite and above {EPS}, got {variance!r}.")
        self.variance = variance
        self.dim = _check.dimension(dim)
        self.regressor = None
        self.register_parameter("rho", None)

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Create the regressor and the variances for these channels; values and batch size do not matter."""
        _check.samples(student, teacher, 1, "there is nothing to regress.")
        if not all(-x.ndim <= self.dim < x.ndim for x in (student, teacher)):
            raise ValueError(
                f"expected channels in dimension {self.dim}, got student {tuple(student.shape)} and teacher "
                f"{tuple(teacher.shape)}. Maps and vectors have them in dim=1, tokens (B, N, C) in dim=-1."
            )
        inner, outer = student.shape[self.dim], teacher.shape[self.dim]
        self.regressor = nn.Sequential(
            nn.Linear(inner, outer, bias=False),
            nn.ReLU(),
            nn.Linear(outer, outer, bias=False),
            nn.ReLU(),
            nn.Linear(outer, outer, bias=False),
        ).to(student.device)
        start = self.variance - EPS
        inverse_softplus = start + math.log(-math.expm1(-start))
        self.rho = nn.Parameter(torch.full((outer,), inverse_softplus, device=student.device))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the negative log-likelihood of the teacher's feature given the student's."""
        if self.regressor is None or self.rho is None:
            raise RuntimeError("VID has no regressor yet: use it in a Term, or call build(student, teacher).")
        _check.tensors(student, teacher)
        student, teacher = _meet(upcast(student), upcast(teacher.detach()), self.dim)
        with full_precision(student):
            # the regressor is bfloat16 where the trainer's precision is "bf16-true"; otherwise float32
            mean = self.regressor(student.movedim(self.dim, -1).to(self.rho.dtype)).movedim(-1, self.dim)
        return vid(mean, teacher, upcast(self.rho), self.dim)


def _meet(student: Tensor, teacher: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    if student.ndim == teacher.ndim == 4 and dim == 1 and student.shape[2:] != teacher.shape[2:]:
        size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
    return student, teacher
