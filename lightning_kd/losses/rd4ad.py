"""RD4AD: the cosine of features, position by position or of the whole map."""

from typing import ClassVar, Literal

from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import unit, upcast
from lightning_kd.losses.stfpm import stfpm


def rd4ad(student: Tensor, teacher: Tensor, mask: Tensor | None = None, flatten: bool = False) -> Tensor:
    """Return one minus the cosine of two maps; see :class:`RD4AD`."""
    if not flatten:
        return stfpm(student, teacher, mask)
    _check.maps(student, teacher)
    student, teacher, _ = _mask.blanked(student, teacher.detach(), mask)
    difference = unit(upcast(student).flatten(1)) - unit(upcast(teacher).flatten(1))
    return 0.5 * difference.square().sum(1).mean()


class RD4AD(nn.Module):
    """Cosine distance between the features of a decoder and those of its teacher (Deng and Li).

    Over samples and positions, for each level of a pyramid, whose terms are added::

        loss = mean(1 - cos(s, t))

    As the paper has it, the vectors are those of a position: it is :class:`STFPM` then. In the authors' code the vector
    of a sample is its whole map, ``flatten=True``: positions where the features are long count more.

    Args:
        flatten: Whether the cosine is of whole maps.

    Returns:
        ``forward(student, teacher, mask=None)``, both maps (B, C, H, W), returns a scalar in [0, 2]. With a mask
        (B, H', W') only the positions count where it is True.

    Raises:
        ValueError: If the shapes differ.

    Source:
        Deng and Li, Anomaly Detection via Reverse Distillation from One-Class Embedding, arXiv 2201.10703, eqs. 1
        and 2; the authors' code is hq-deng/RD4AD.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher = torch.randn(2, 5, 8, 8)
        >>> bool(losses.RD4AD(flatten=True)(3 * teacher, teacher) < 1e-6)
        True
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "shape"

    def __init__(self, flatten: bool = False) -> None:
        super().__init__()
        self.flatten = flatten

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return one minus the cosine of two maps."""
        return rd4ad(student, teacher, mask, self.flatten)
