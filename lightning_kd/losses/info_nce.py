"""InfoNCE: find the teacher's embedding of the same sample among those of others."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._bank import NO_LABELS
from lightning_kd.losses._numerics import full_precision, unit, upcast


def likeness(
    anchors: Tensor, candidates: Tensor, temperature: float, target: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the logits (B, B) of unit embeddings, -inf where the candidate is another of the class, and the classes.

    The class of anchor i is i: its candidate is of the same sample.
    """
    _check.temperature(temperature)
    _check.samples(anchors, candidates, 2, "the negatives are the batch's other samples.")
    with full_precision(anchors):
        logits = upcast(anchors) @ upcast(candidates).T / temperature
    own = torch.arange(logits.shape[0], device=logits.device)
    if target is not None:
        label = _check.class_target(target, anchors, bounded=False, remedy=NO_LABELS)
        same_class = (label[:, None] == label) & (label >= 0) & (own[:, None] != own)
        logits = logits.masked_fill(same_class, -torch.inf)
    return logits, own


def info_nce(student: Tensor, teacher: Tensor, temperature: float = 0.07, target: Tensor | None = None) -> Tensor:
    """Return the contrastive loss of embeddings (B, D) against the teacher's of the batch; see :class:`InfoNCE`."""
    _check.embeddings(student, teacher)
    s, t = unit(upcast(student)), unit(upcast(teacher.detach()))
    return F.cross_entropy(*likeness(s, t.to(s.dtype), temperature, target))


class InfoNCE(nn.Module):
    """Each sample finds its teacher's embedding among those of the batch (van den Oord et al.).

    With embeddings of length 1::

        loss = -mean_i log softmax_j(student_i . teacher_j / T)[i]

    That is interactive contrastive learning of CLIP-KD with one encoder on each side, and the student as the anchor.
    Unlike ``LEAF`` it does not ask for the teacher's embedding itself, but for one that is nearer to it than to the
    others: what a search in the teacher's index needs. Unlike ``CRD`` it has no heads, so that the embeddings
    themselves are aligned. It gains from large batches; under DDP each process has its own candidates.

    Given a target, other samples of the anchor's class are no candidates. A negative label, -100, is no class. A
    sample without another candidate is worth 0: shuffle the data.

    Args:
        temperature: Positive. May be changed between steps.

    Returns:
        ``forward(student, teacher, target=None)``, both (B, D), returns a scalar. It is not zero at equality.

    Raises:
        ValueError: If the shapes differ, or there is a single sample.

    Source:
        van den Oord et al., arXiv 1807.03748, equation 4; between student and teacher: Yang et al., CLIP-KD, arXiv
        2307.12732, interactive contrastive learning, whose code has both modalities as anchors and learns T from 0.07.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher = torch.eye(4)
        >>> bool(losses.InfoNCE()(teacher, teacher) < losses.InfoNCE()(teacher.roll(1, 0), teacher))
        True
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "shape"

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = _check.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Return how badly the samples of a batch find their own teacher's embedding."""
        return info_nce(student, teacher, self.temperature, target)
