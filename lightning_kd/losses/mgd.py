"""MGD: generate the teacher's feature from a student's of which a part is hidden."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import full_precision, upcast
from lightning_kd.numbers import is_number


def mgd(generated: Tensor, teacher: Tensor, alpha: float = 2e-5, mask: Tensor | None = None) -> Tensor:
    """Return ``alpha`` times the sum of squared differences for each sample; see :class:`MGD`."""
    _check.maps(generated, teacher)
    generated, teacher, here = _mask.blanked(generated, teacher.detach(), mask)
    samples = len(generated) if here is None else _mask.total(here.flatten(1).any(1))
    return alpha * (upcast(generated) - upcast(teacher)).square().sum() / samples


class MGD(nn.Module):
    """Masked generative distillation: from a student's feature with holes, generate the teacher's (Yang et al.).

    The student's feature f_s, at random positions replaced by 0, goes through two 3x3 convolutions G with a ReLU
    between them, which are trained along and not needed afterwards::

        loss = alpha * sum((G(f_s * M) - f_t)^2) / B,  M = 0 with probability ``ratio``, else 1

    The sum is over channels and positions, as the published alphas are for it. M has one number for each position, as
    in the authors' code for detection and segmentation, or one for each channel, as in that for classification. It is
    drawn anew in each call, from torch's global generator.

    Args:
        alpha: Factor of the sum. 2e-5 for one-stage detectors and segmentation, 5e-7 for two-stage detectors, 7e-5 for
            classification.
        ratio: The share that is hidden, in [0, 1). 0.65 for one-stage detectors, 0.45 for two-stage ones, 0.75 for
            segmentation, 0.15 for classification.
        channels: Hide channels and not positions.

    Returns:
        ``forward(student, teacher, mask=None)``, both maps (B, C, H, W), returns a scalar. With a mask (B, H', W')
        pixels where it is False are 0 for G, too, and are not in the sum, which is divided by the samples that have
        others.

    Raises:
        RuntimeError: If ``build(student, teacher)`` was not called; a Term calls it before the optimizers.
        ValueError: If the shapes differ, or an argument is out of range.

    Source:
        Yang et al., Masked Generative Distillation, arXiv 2205.01529; https://github.com/yzd-v/MGD.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> student, teacher = torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8)
        >>> loss = losses.MGD()
        >>> loss.build(student, teacher)
        >>> loss(student, teacher).shape
        torch.Size([])
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "shape"
    generation: nn.Sequential | None

    def __init__(self, alpha: float = 2e-5, ratio: float = 0.65, channels: bool = False) -> None:
        super().__init__()
        if not (is_number(ratio) and 0 <= ratio < 1):
            raise ValueError(f"ratio is the share of the feature that is hidden, in [0, 1), got {ratio!r}.")
        self.alpha = _check.positive("alpha", alpha)
        self.ratio = ratio
        self.channels = channels
        self.generation = None

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Create the convolutions for the teacher's channels; values, batch and resolution do not matter."""
        _check.maps(student, teacher)
        width = teacher.shape[1]
        self.generation = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        ).to(student.device)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return how far what is generated is from the teacher's feature."""
        if self.generation is None:
            raise RuntimeError("MGD has no convolutions yet: use it in a Term, or call build(student, teacher).")
        _check.maps(student, teacher)
        student, teacher, _ = _mask.blanked(student, teacher.detach(), mask)
        batch, channels, height, width = student.shape
        shape = (batch, channels, 1, 1) if self.channels else (batch, 1, height, width)
        shown = torch.rand(shape, device=student.device) >= self.ratio
        with full_precision(student):
            # the convolutions are bfloat16 where the trainer's precision is "bf16-true"; otherwise float32
            weights = next(self.generation.parameters()).dtype
            generated = self.generation(torch.where(shown, upcast(student), 0.0).to(weights))
        return mgd(generated, teacher, self.alpha, mask)
