"""Logit standardisation: any logit loss on z-scores."""

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import upcast
from lightning_kd.losses._wrapped import Wrapped, temperature_of_the_loss


def standardize(logits: Tensor, dim: int = 1, eps: float = 1e-7) -> Tensor:
    """Return ``(logits - mean) / (std + eps)`` over the class dimension; see :class:`Standardized`."""
    if not -logits.ndim <= dim < logits.ndim or logits.shape[dim] < 3:
        raise ValueError(
            f"z-scores need at least three classes in dimension {dim}, got logits {tuple(logits.shape)}: those of two "
            "are always -0.71 and 0.71, so that nothing could be learned from them. Use the loss as it is."
        )
    logits = upcast(logits)
    std = logits.std(dim, keepdim=True)
    # constant logits (a head initialised with zeros) stay 0, with no gradient of size 1/eps
    # (and what is not a number stays so)
    return torch.where(std == 0, 0.0, (logits - logits.mean(dim, keepdim=True)) / (std + eps))


class Standardized(Wrapped):
    """Logit standardisation: any logit loss on the z-scores of both logits (Sun et al.).

    Over the C classes of each sample and position::

        loss(z(student), z(teacher)[, target]),  z(x) = (x - mean(x)) / (std(x) + 1e-7)

    with the standard deviation over C - 1, as in the authors' code. The student is then free in the offset
    and scale of its logits. The paper's settings: temperature 2, weight 9.

    Args:
        loss: A loss on logits, such as ``KD(temperature=2.0)`` or ``DKD()``.
        dim: The class dimension.

    Returns:
        ``forward(student, teacher, target=None, mask=None)`` returns what ``loss`` returns; target and mask are
        passed on if ``loss`` takes them.

    Raises:
        ValueError: If ``loss`` needs a target and none is given, or with fewer than three classes.

    Source:
        Sun et al., Logit Standardization in Knowledge Distillation, arXiv 2403.01427.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> loss = losses.Standardized(losses.KD(temperature=2.0))
        >>> teacher = torch.randn(4, 10)
        >>> torch.allclose(loss(3 * teacher + 1, teacher), torch.tensor(0.0), atol=1e-5)
        True
    """

    def __init__(self, loss: nn.Module, dim: int = 1) -> None:
        super().__init__(loss)
        self.dim = _check.dimension(dim)

    temperature = temperature_of_the_loss

    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the wrapped loss of the standardised logits."""
        _check.tensors(student, teacher)
        student, teacher, _ = _mask.blanked(student, teacher.detach(), mask, self.dim)
        return self.call(standardize(student, self.dim), standardize(teacher, self.dim), target, mask)
