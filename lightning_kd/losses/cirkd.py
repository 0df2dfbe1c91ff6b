"""CIRKD: which pixels of other images a pixel is like."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._nodes import nodes
from lightning_kd.losses._numerics import full_precision


def cirkd(
    student: Tensor, teacher: Tensor, temperature: float = 0.1, patch: int = 1, mask: Tensor | None = None
) -> Tensor:
    """Return ``KL(p_t || p_s)`` of the similarities to the pixels of each image; see :class:`CIRKD`."""
    _check.temperature(temperature)
    _check.maps(student, teacher, channels=False)
    _check.direction(student)
    s, t, counts = nodes(student, teacher, patch, "average", mask)
    images = _mask.total(counts.any(1))
    log_s, log_t = (_log_similarities(x, counts, temperature) for x in (s, t))
    # where a row or a column does not count, both are 0
    return F.kl_div(log_s, log_t, reduction="sum", log_target=True) / (_mask.total(counts) * images)


def _log_similarities(x: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """Return (B, nodes, B, nodes), log-distributions of each node over the nodes of each image."""
    with full_precision(x):
        similarity = torch.einsum("ipc,jqc->ipjq", x, x) / temperature
    low = torch.finfo(x.dtype).min / 2
    log_p = similarity.masked_fill(~counts, low).log_softmax(3)
    return log_p.masked_fill(~(counts[:, :, None, None] & counts), 0.0)


class CIRKD(nn.Module):
    """Cross-image relations: match which pixels of the batch's images a pixel is like (Yang et al.).

    With the features ``f`` of length 1, and of pixel i the distribution over the pixels j of one image ``n``::

        p = softmax_j(f_i . f_j / T)
        loss = KL(p_t || p_s), averaged over all pixels i of the batch and all images n, the pixel's own too

    This is the paper's mini-batch-based pixel-to-pixel part, with the authors' temperature. Its parts with a memory
    of pixels and of regions from earlier batches are not here. A pixel is compared with all of the batch, so memory
    grows with the square of batch times positions: ``patch=2`` makes it a sixteenth.

    Args:
        temperature: T > 0. May be changed between steps.
        patch: Pixels are the means of patches of that side.

    Returns:
        ``forward(student, teacher, mask=None)`` takes maps (B, C, H, W) with channels of their own and returns a
        scalar, zero at equality. With a mask (B, H', W') only pixels where it is True are compared.

    Raises:
        ValueError: If batch or resolution differ, or there is one position, channel or patch only.

    Source:
        Yang et al., Cross-Image Relational Knowledge Distillation for Semantic Segmentation, arXiv 2204.06986.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher = torch.randn(2, 8, 16, 16)
        >>> bool(losses.CIRKD()(3 * teacher, teacher) < 1e-6)
        True
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "size"

    def __init__(self, temperature: float = 0.1, patch: int = 1) -> None:
        super().__init__()
        self.temperature = _check.positive("temperature", temperature)
        self.patch = _check.whole("patch", patch)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return how differently the pixels of two maps are related."""
        return cirkd(student, teacher, self.temperature, self.patch, mask)
