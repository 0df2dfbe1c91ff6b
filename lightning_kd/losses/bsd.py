"""BSD: learn of a peer where it is the better one."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import upcast
from lightning_kd.losses.kd import kd


def bsd(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Return :func:`kd` of the pixels that the teacher tells better than the student; see :class:`BSD`."""
    _check.logits(student, teacher)
    _check.maps(student, teacher)
    student, teacher, here = _mask.blanked(student, teacher.detach(), mask)
    label = _mask.class_target(target, student)
    if here is None:
        here = torch.ones_like(label, dtype=torch.bool)
    label = label.where(here, 0)
    _check.in_range("target", label, student.shape[1], _check.BY_MASK)
    with torch.no_grad():
        of_student, of_teacher = (F.cross_entropy(upcast(x), label, reduction="none") for x in (student, teacher))
        # asked this way round, what is not a number is not left out in silence
        better = here & ~(of_teacher >= of_student)
    return kd(student, teacher, temperature, mask=better)


class BSD(nn.Module):
    """Selective distillation among peers: soft labels of those pixels that the other tells better (Zhu et al.).

    With the cross entropies CE of both with the label of a pixel::

        loss = KD(pixels where CE_t < CE_s)

    Between two peers each pixel is taught in one direction only, by the one that knows it: made for a CNN and a
    transformer that learn at once, ``MutualDistillation(peers=[...], terms={"bsd": Term(BSD())})``. It is 0 for a
    student that is better everywhere. This is the pixel-wise part of bidirectional selective distillation, in the space
    of logits, **by the paper's abstract and not checked against its equations**; no code of its authors was found. A
    reading of its region-wise part, in the space of features, is :class:`~lightning_kd.losses.RegionBSD`; for its
    heterogeneous features (HFD, consistency of early layers) take ``FitNet`` between early layers of the two, another
    reading, as ``scenes_segmentation_collaborative`` does.

    Args:
        temperature: T > 0. May be changed between steps.

    Returns:
        ``forward(student, teacher, target, mask=None)`` takes logits (B, C, h, w) and class indices (B, H, W) of any
        resolution, and returns a scalar, zero at equality. A mask (B, H, W) is True where a pixel counts.

    Raises:
        ValueError: If the shapes differ, or the target holds no class indices.

    Source:
        Zhu et al., A Good Student is Cooperative and Reliable: CNN-Transformer Collaborative Learning for Semantic
        Segmentation, arXiv 2307.12574.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> labels = torch.randint(5, (2, 8, 8))
        >>> right = 5.0 * torch.nn.functional.one_hot(labels, 5).movedim(-1, 1)
        >>> losses.BSD()(-right, right, labels) > 0, losses.BSD()(right, -right, labels) > 0
        (tensor(True), tensor(False))
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "size"

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = _check.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the divergence of two logits where the teacher is better."""
        return bsd(student, teacher, target, self.temperature, mask)
