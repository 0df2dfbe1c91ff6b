"""Region-wise BSD: learn a peer's features in the regions where it tells the classes apart better."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import unit, upcast
from lightning_kd.losses.ifvd import variation


def region_bsd(
    student: Tensor, teacher: Tensor, target: Tensor, num_classes: int, grid: int = 4, mask: Tensor | None = None
) -> Tensor:
    """Return ``1 - cos`` of the features in regions that the teacher tells better; see :class:`RegionBSD`."""
    _check.maps(student, teacher)
    student, teacher, here = _mask.blanked(student, teacher.detach(), mask)
    label = _mask.class_target(target, student)
    counts = torch.ones_like(label, dtype=torch.bool) if here is None else here
    label = label.where(counts, 0)
    _check.in_range("target", label, num_classes, "num_classes counts the classes; leave others out by a mask.")
    label = label.clamp(0, num_classes - 1).flatten(1)
    with torch.no_grad():
        near = [variation(x, label, counts.flatten(1), num_classes).reshape(counts.shape) for x in (student, teacher)]
        ahead = F.adaptive_avg_pool2d(torch.where(counts, near[1] - near[0], 0.0)[:, None], grid)
        # asked this way round, what is not a number is not left out in silence
        taught = counts & ~(F.interpolate(ahead, counts.shape[1:], mode="nearest-exact")[:, 0] <= 0)
    apart = 1.0 - (unit(upcast(student), 1) * unit(upcast(teacher), 1)).sum(1)
    return torch.where(taught, apart, 0.0).sum() / _mask.total(counts)


class RegionBSD(nn.Module):
    """Selective distillation of features among peers, region by region: **a reading** of Zhu et al., see below.

    Of the paper only the abstract could be read, and no code of its authors was found. It says that region-wise BSD
    determines the directions of knowledge transferred between the corresponding regions in the feature space. Here a
    region is a cell of a grid over the map, and a network is the better one in it whose pixels are closer to the middle
    of their class, in the mean over the region: with the cosine ``v_i`` of a pixel's feature with the mean of its class
    in the image, as :class:`~lightning_kd.losses.IFVD` has it::

        loss = mean over the pixels of (1 - cos(f_s, f_t)) * [mean(v_t) > mean(v_s) in the pixel's region]

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
        ValueError: If the shapes differ, or the target holds no class indices below ``num_classes``.

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
        self.num_classes = int(_check.positive("num_classes", num_classes))
        self.grid = int(_check.positive("grid", grid))

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return how far the features are apart where the teacher is better."""
        return region_bsd(student, teacher, target, self.num_classes, self.grid, mask)
