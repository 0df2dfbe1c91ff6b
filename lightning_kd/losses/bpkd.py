"""BPKD: edges pixel by pixel, bodies by their shape."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses.cwd import cwd
from lightning_kd.losses.kd import kd


def edge_band(target: Tensor, width: int, mask: Tensor | None = None) -> Tensor:
    """Return where (B, H, W) class indices have another class at most ``width`` rows and columns away.

    That is the union over the classes of what a dilation has and an erosion has not, both by a square of
    ``2 * width + 1``. Pixels where the mask is False are in no band, and no class.
    """
    here = torch.ones_like(target, dtype=torch.bool) if mask is None else mask
    label = target.float()  # whole numbers up to 2^24 are exact
    size = 2 * width + 1
    highest = F.max_pool2d(label.where(here, -torch.inf), size, stride=1, padding=width)
    lowest = -F.max_pool2d((-label).where(here, -torch.inf), size, stride=1, padding=width)
    return here & (highest != lowest)


def bpkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    edge: float = 1.0,
    body: float = 5.0,
    width: int = 2,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Return ``edge * KD`` of the pixels in the band plus ``body * CWD`` of the others; see :class:`BPKD`."""
    _check.logits(student, teacher)
    _check.maps(student, teacher)
    label = _mask.class_target(target, student)
    here = _mask.counted(mask, student)
    if here is None:
        here = torch.ones_like(label, dtype=torch.bool)
    band = edge_band(label, width, here)
    at_edge = kd(student, teacher, temperature, mask=band)
    inside = cwd(student, teacher, temperature, mask=here & ~band)
    return edge * at_edge + body * inside


class BPKD(nn.Module):
    """Boundary-privileged distillation: KL by pixel along edges, by channel inside of them (Liu et al.).

    The band along the edges is what a dilation of a class has and an erosion of it has not, for any class of the
    labels. With the logits of both models::

        loss = edge * KD(pixels in the band) + body * CWD(the others)

    :class:`KD` compares the classes of each pixel, where classes meet; :class:`CWD` the shape of each class, without
    the band. Both contain T^2. The weights are those that the two parts have by themselves; the band is that of the
    labels at the logits' resolution. **The paper's own weights and width were not checked**, only its abstract's
    description was to be had.

    Args:
        edge: Weight of the band, not negative; one of the two may be 0.
        body: Weight of what is inside.
        width: The band reaches that many pixels of the logits to both sides.
        temperature: T > 0. May be changed between steps.

    Returns:
        ``forward(student, teacher, target, mask=None)`` takes logits (B, C, h, w) and class indices (B, H, W) of any
        resolution, and returns a scalar, zero at equality. A mask (B, H, W) is True where a pixel counts: edges to
        what does not count are no edges.

    Raises:
        ValueError: If the shapes differ, or the target holds no class indices.

    Source:
        Liu et al., BPKD: Boundary Privileged Knowledge Distillation For Semantic Segmentation, arXiv 2306.08075.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher, labels = torch.randn(2, 5, 8, 8), torch.randint(5, (2, 32, 32))
        >>> losses.BPKD()(teacher, teacher, labels, mask=labels != 0)
        tensor(0.)
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "size"

    def __init__(self, edge: float = 1.0, body: float = 5.0, width: int = 2, temperature: float = 1.0) -> None:
        super().__init__()
        _check.weights(edge=edge, body=body)
        self.edge = edge
        self.body = body
        self.width = _check.whole("width", width)
        self.temperature = _check.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the divergence of two logits along the edges and inside."""
        return bpkd(student, teacher, target, self.edge, self.body, self.width, self.temperature, mask)
