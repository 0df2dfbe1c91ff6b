"""IFVD: how far each pixel is from the middle of its class."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import full_precision, unit, upcast


def ifvd(student: Tensor, teacher: Tensor, target: Tensor, num_classes: int, mask: Tensor | None = None) -> Tensor:
    """Return ``mean((v_s - v_t)^2)`` of the pixels' similarities to their class; see :class:`IFVD`."""
    _check.maps(student, teacher, False, 2, "the only pixel is the middle of its class, and the term silently zero.")
    _check.direction(student)
    student, teacher, here = _mask.blanked(student, teacher.detach(), mask)
    label = _mask.class_target(target, student)
    if here is not None:
        label = label.where(here, 0)
    _check.in_range("target", label, num_classes, "num_classes counts the classes; leave others out by a mask.")
    label = label.clamp(0, num_classes - 1).flatten(1)
    counts = torch.ones_like(label, dtype=torch.bool) if here is None else here.flatten(1)
    difference = _variation(student, label, counts, num_classes) - _variation(teacher, label, counts, num_classes)
    return torch.where(counts, difference, 0.0).square().sum() / _mask.total(counts)


def _variation(x: Tensor, label: Tensor, counts: Tensor, num_classes: int) -> Tensor:
    """Return the cosine (B, positions) of each pixel's feature with the mean of its class in the image."""
    feature = upcast(x).flatten(2).transpose(1, 2)
    # the cosine does not change with the image's scale; without it, squares overflow
    feature = feature / feature.detach().abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(feature.dtype).tiny)
    classes = torch.arange(num_classes, device=label.device)
    member = ((label.unsqueeze(1) == classes.unsqueeze(1)) & counts.unsqueeze(1)).to(feature.dtype)
    with full_precision(feature):
        total = member @ feature  # (B, classes, channels); of a mean, the direction is all that counts
    centre = unit(total).gather(1, label.unsqueeze(2).expand(-1, -1, feature.shape[2]))
    return (unit(feature) * centre).sum(2)


class IFVD(nn.Module):
    """Intra-class feature variation: match how far each pixel is from the middle of its class (Wang et al.).

    With the mean ``c_k`` of the features of class k in an image, and of each pixel i with the label k the cosine
    ``v_i = cos(f_i, c_k)``::

        loss = mean((v_s - v_t)^2)     over the pixels

    The gradient flows through the means, too. The middle is that of each image, as in the authors' code.

    Args:
        num_classes: How many classes the labels have.

    Returns:
        ``forward(student, teacher, target, mask=None)`` takes maps (B, C, h, w) with channels of their own and class
        indices (B, H, W) of any resolution, and returns a scalar, zero at equality. A mask (B, H, W) is True where a
        pixel counts, for the middle of its class, too.

    Raises:
        ValueError: If batch or resolution differ, there is one position or channel only, or the target holds no class
            indices below ``num_classes``.

    Source:
        Wang et al., Intra-class Feature Variation Distillation for Semantic Segmentation, ECCV 2020;
        https://github.com/YukangWang/IFVD. Among the baselines of Yang et al., arXiv 2204.06986.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher, labels = torch.randn(2, 8, 16, 16), torch.randint(5, (2, 64, 64))
        >>> bool(losses.IFVD(num_classes=5)(3 * teacher, teacher, labels) < 1e-6)
        True
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "size"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = _check.whole("num_classes", num_classes)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return how differently two maps vary within the classes."""
        return ifvd(student, teacher, target, self.num_classes, mask)
