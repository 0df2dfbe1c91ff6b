"""Region-wise BSD: learn a peer's features in the regions where it tells the classes apart better."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import full_precision, unit, upcast

_TEMPERATURE = 0.1  # of cosines, as contrastive losses have it; it decides who is better, and scales nothing


def region_bsd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    num_classes: int,
    grid: int = 4,
    mask: Tensor | None = None,
) -> Tensor:
    """Return ``1 - cos`` of the features in regions that the teacher tells better; see :class:`RegionBSD`."""
    _check.maps(student, teacher, at_least=2, why="nobody is ahead where there is one class, and the term zero.")
    _check.direction(student)
    student, teacher, here = _mask.blanked(student, teacher.detach(), mask)
    label = _mask.class_target(target, student)
    counts = torch.ones_like(label, dtype=torch.bool) if here is None else here
    label = label.where(counts, 0)
    _check.in_range("target", label, num_classes, "num_classes counts the classes; leave others out by a mask.")
    label = label.clamp(0, num_classes - 1)
    with torch.no_grad():
        of_student, of_teacher = (_entropy(x, label, counts, num_classes) for x in (student, teacher))
        ahead = F.adaptive_avg_pool2d(torch.where(counts, of_student - of_teacher, 0.0)[:, None], grid)
        # asked this way round, what is not a number is not left out in silence
        taught = counts & ~(F.interpolate(ahead, counts.shape[1:], mode="nearest-exact")[:, 0] <= 0)
    apart = 1.0 - (unit(upcast(student), 1) * unit(upcast(teacher), 1)).sum(1)
    return torch.where(taught, apart, 0.0).sum() / _mask.total(counts)


def _entropy(x: Tensor, label: Tensor, counts: Tensor, num_classes: int) -> Tensor:
    """Return for each pixel (B, h, w) the cross entropy of its class, by how near it is to the middles of all."""
    feature = upcast(x).flatten(2).transpose(1, 2)
    # the cosine does not change with the image's scale; without it, squares overflow
    feature = feature / feature.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(feature.dtype).tiny)
    classes = torch.arange(num_classes, device=label.device)
    member = (label.flatten(1).unsqueeze(1) == classes[:, None]) & counts.flatten(1).unsqueeze(1)
    with full_precision(feature):
        middle = unit(member.to(feature.dtype) @ feature)  # (B, classes, channels); the direction is all that counts
        near = middle @ unit(feature).transpose(1, 2) / _TEMPERATURE
    near = near.masked_fill(~member.any(2, keepdim=True), -torch.inf)  # classes that the image has not
    return F.cross_entropy(near, label.flatten(1), reduction="none").reshape(label.shape)


class RegionBSD(nn.Module):
    """Selective distillation of features among peers, region by region: **a reading** of Zhu et al., see below.

    Of the paper only the abstract could be read, and no code of its authors was found. It says that region-wise BSD
    determines the directions of knowledge transferred between the corresponding regions in the feature space. Here a
    region is a cell of a grid over the map, and a network is the better one in it if its features tell the classes
    apart better there. With ``c_k`` the mean of the features of class k in the image and ``y_i`` the label of pixel i::

        CE_i = cross_entropy(cos(f_i, c) / T, y_i),    T = 0.1
        loss = mean over the pixels of (1 - cos(f_s, f_t)) * [mean(CE_t) < mean(CE_s) in the pixel's region]

    It is 0 for a student that is better everywhere. Between two peers a region is taught in one direction, as far as
    the projectors of both leave their order as it is. Beside it :class:`~lightning_kd.losses.BSD` is the pixel-wise
    part, of logits.

    Args:
        num_classes: How many classes the labels have.
        grid: Regions along each side of the map.

    Returns:
        ``forward(student, teacher, target, mask=None)`` takes maps (B, C, h, w) of one shape and class indices
        (B, H, W) of any resolution, and returns a scalar in [0, 2], zero at equality. A mask (B, H, W) is True where a
        pixel counts.

    Raises:
        ValueError: If the shapes differ, there is one position or channel only, or the target holds no class indices
            below ``num_classes``.

    Source:
        Zhu et al., A Good Student is Cooperative and Reliable: CNN-Transformer Collaborative Learning for Semantic
        Segmentation, arXiv 2307.12574, abstract.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> labels = torch.randint(5, (2, 8, 8))
        >>> told = torch.nn.functional.one_hot(labels, 5).movedim(-1, 1).float()
        >>> guess = torch.randn(2, 5, 8, 8)
        >>> losses.RegionBSD(5)(guess, told, labels) > 0, losses.RegionBSD(5)(told, guess, labels)
        (tensor(True), tensor(0.))
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "shape"

    def __init__(self, num_classes: int, grid: int = 4) -> None:
        super().__init__()
        self.num_classes = _check.whole("num_classes", num_classes)
        self.grid = _check.whole("grid", grid)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return how far the features are apart where the teacher is better."""
        return region_bsd(student, teacher, target, self.num_classes, self.grid, mask)
