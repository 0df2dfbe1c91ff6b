"""PKT: the neighbourhood of each sample as a probability distribution."""

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import full_precision, unit, upcast


def pkt(student: Tensor, teacher: Tensor, self_pairs: bool = False, eps: float = 1e-7) -> Tensor:
    """Return ``sum_ij p_t[i, j] log(p_t[i, j] / p_s[i, j]) / B^2``; see :class:`PKT`."""
    why = "with fewer, the only neighbour always has probability 1."
    _check.samples(student, teacher, 2 if self_pairs else 3, why)
    _check.direction(student.flatten(1))
    with full_precision(student):
        p_s = _neighbours(student, self_pairs, eps)
        p_t = _neighbours(teacher.detach(), self_pairs, eps)
        return (p_t * ((p_t + eps) / (p_s + eps)).log()).mean()


def _neighbours(feature: Tensor, self_pairs: bool, eps: float) -> Tensor:
    """Return the conditional probabilities (B, B) of j as the neighbour of i."""
    direction = unit(upcast(feature).flatten(1))
    kernel = ((direction @ direction.T + 1) / 2).clamp_min(0)
    if not self_pairs:
        kernel = kernel * (1 - torch.eye(kernel.shape[0], dtype=kernel.dtype, device=kernel.device))
    return kernel / kernel.sum(1, keepdim=True).clamp_min(eps)


class PKT(nn.Module):
    """Probabilistic transfer: match who neighbours whom in the batch (Passalis and Tefas).

    With the kernel ``K_ij = (cos(x_i, x_j) + 1) / 2`` and ``p[i, j] = K_ij / sum_{k != i} K_ik`` for j != i::

        loss = sum_ij p_t[i, j] * log(p_t[i, j] / p_s[i, j]) / B^2

    The paper sums; the division by B^2 is that of the common implementations, to which the published weight
    of 30000 belongs. These also count each sample as its own neighbour, which the paper does not:
    ``self_pairs=True``. Features are flattened, and may differ in everything but the batch size.

    Args:
        self_pairs: Count each sample as its own neighbour.
        eps: Added inside the logarithm, where opposite samples have probability 0.

    Returns:
        ``forward(student, teacher)``, both (B, ...), returns a scalar, zero at equality.

    Raises:
        ValueError: If the batch sizes differ or are below three (two with ``self_pairs``), or the student's features
            are of one number.

    Source:
        Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer,
        arXiv 1803.10837.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> feature = torch.randn(4, 8)
        >>> losses.PKT()(3 * feature, feature).abs() < 1e-6
        tensor(True)
    """

    def __init__(self, self_pairs: bool = False, eps: float = 1e-7) -> None:
        super().__init__()
        self.self_pairs = self_pairs
        self.eps = _check.positive("eps", eps)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the divergence of two batches' neighbourhoods."""
        return pkt(student, teacher, self.self_pairs, self.eps)
