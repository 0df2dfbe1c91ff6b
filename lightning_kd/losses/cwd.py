"""CWD: where each channel looks."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check, _dense, _mask
from lightning_kd.losses._numerics import upcast

_ONE_POSITION = "a softmax over one position is always 1, so the term would be silently zero."


def cwd(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Return ``T^2 * KL(p_t || p_s)`` over positions, averaged over samples and channels; see :class:`CWD`."""
    _check.temperature(temperature)
    _check.maps(student, teacher, at_least=2, why=_ONE_POSITION)
    here = _mask.counted(mask, student)
    if here is None and _dense.serves(student, temperature):
        total = _dense.divergence(student.flatten(2), teacher.flatten(2), temperature, 0.0, 2)
        return temperature**2 * total / (student.shape[0] * student.shape[1])
    s, t = (_log_softmax(upcast(x) / temperature, here) for x in (student, teacher.detach()))
    samples = student.shape[0] if here is None else _mask.total(here.flatten(1).any(1))
    divergence = F.kl_div(s, t, reduction="sum", log_target=True)
    return temperature**2 * divergence / (samples * student.shape[1])


def _log_softmax(x: Tensor, here: Tensor | None) -> Tensor:
    """Return the log-distribution (B, C, positions) over what counts, and 0 elsewhere: equal on both sides."""
    if here is None:
        return x.flatten(2).log_softmax(2)
    elsewhere = ~here.flatten(1).unsqueeze(1)
    # a finite number, so that a sample of which nothing counts is a distribution, too
    low = torch.finfo(x.dtype).min / 2
    return x.flatten(2).masked_fill(elsewhere, low).log_softmax(2).masked_fill(elsewhere, 0.0)


class CWD(nn.Module):
    """Channel-wise distillation: match where in the image each channel is active (Shu et al.).

    With ``p = softmax(x_c / T)`` over the positions of channel c of a sample::

        loss = T^2 * KL(p_t || p_s), averaged over samples and channels

    It serves the logits of a segmentation, where a channel is a class, and features, where the term's projector maps
    the student's channels to the teacher's. Usual weights, at temperature 1: 5 on logits, 10 on the levels of a
    detector's neck.

    Args:
        temperature: T > 0. May be changed between steps.

    Returns:
        ``forward(student, teacher, mask=None)``, both maps (B, C, H, W), returns a scalar, zero where each channel
        differs by a constant only. With a mask (B, H', W') the softmax is over the pixels where it is True, and the
        mean over the samples that have some.

    Raises:
        ValueError: If the shapes differ, or there is one position only.

    Source:
        Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, arXiv 2011.13256.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher = torch.randn(2, 5, 8, 8)
        >>> bool(losses.CWD()(teacher + torch.randn(5, 1, 1), teacher) < 1e-6)
        True
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "shape"

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = _check.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the divergence of two maps' channels."""
        return cwd(student, teacher, self.temperature, mask)
