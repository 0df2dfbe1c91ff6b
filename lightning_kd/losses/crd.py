"""CRD: tell the teacher's embedding of the same sample from those of other samples."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._bank import Banks
from lightning_kd.losses._numerics import full_precision, unit, upcast
from lightning_kd.losses.info_nce import likeness
from lightning_kd.numbers import is_number, is_whole


def crd(student: Tensor, teacher: Tensor, temperature: float = 0.07, target: Tensor | None = None) -> Tensor:
    """Return the symmetric in-batch contrastive loss of unit embeddings (B, D); see :class:`CRD`.

    The gradient reaches both embeddings, since the teacher's comes from a head that is trained.
    """
    _check.same_shape(student, teacher, "Embed both sides with as many dimensions.")
    logits, own = likeness(student, teacher, temperature, target)
    return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)


class CRD(nn.Module):
    """Contrastive representation distillation, in-batch or with memory banks (Tian et al.).

    Two heads (linear, scaled to length 1) embed the flattened features of student and teacher; x_ij is the
    cosine of sample i's student and sample j's teacher embedding, over the temperature.

    Without memory: the symmetric InfoNCE over the batch, ``-mean_i log softmax_j(x_ij)[i]`` plus the same
    with the roles exchanged. It is not the paper's objective but a close relative: same pairs, the batch's
    other samples as negatives, no state. It gains from large batches; under DDP each process has its own
    negatives.

    With ``memory=M``, the number of training samples: the paper's noise-contrastive estimation against K
    embeddings of other samples from banks of M, once per side::

        h(x) = (e^x / Z) / (e^x / Z + K / M)
        loss = mean_i(-log h(x_i,positive) - sum_K log(1 - h(x_i,negative)))

    The K negatives are drawn once per batch and shared by its samples, so that memory is B * K + K * dim
    floats; the authors draw K per sample. They are drawn by a counter of the loss's own, seeded once by torch's
    seed, so that the student's data order and dropout stay what they are without the term. Z is the authors'
    normalisation, set from the first batch to the mean of ``M e^x``; ``partition=1.0`` is the paper's h. **In
    training mode forward updates the banks**, with momentum; in eval mode it does not. Under DDP the banks
    follow the process whose buffers are broadcast.

    Given a target, samples of the anchor's class are no negatives (with memory: as far as their label was
    seen). A negative label, -100, is no class: nothing is known of such a sample. Without memory a batch of a single
    class has no negatives, and is worth 0: shuffle the data.

    Args:
        dim: Size of the embeddings, at least 2.
        temperature: Positive. May be changed between steps.
        memory: Number of training samples M, or None for the in-batch form.
        negatives: K; only read with memory.
        momentum: Share of the old embedding when a bank is updated, in [0, 1).
        partition: Z, or None to set it from the first batch.

    Returns:
        ``forward(student, teacher, target=None, index=None)``, features (B, ...), returns a scalar. ``index``
        (B), the samples' place in the training set, is needed with memory; their range is checked on the CPU only.

    Raises:
        RuntimeError: If ``build(student, teacher)`` was not called; a Term calls it before the optimizers.
        ValueError: If the batch sizes differ, there is a single sample, or the index is missing.

    Source:
        Tian et al., Contrastive Representation Distillation, arXiv 1910.10699.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> student, teacher = torch.randn(8, 16), torch.randn(8, 32)
        >>> loss = losses.CRD(dim=4)
        >>> loss.build(student, teacher)
        >>> loss(student, teacher).shape
        torch.Size([])
    """

    student_head: nn.Linear | None
    teacher_head: nn.Linear | None
    banks: Banks | None

    def __init__(
        self,
        dim: int = 128,
        temperature: float = 0.07,
        memory: int | None = None,
        negatives: int = 16384,
        momentum: float = 0.5,
        partition: float | None = None,
    ) -> None:
        super().__init__()
        if memory is not None and not (is_whole(memory) and is_whole(negatives) and memory >= 2 and negatives >= 1):
            raise ValueError(f"memory needs at least 2 samples and 1 negative, got {memory!r} and {negatives!r}.")
        if not (is_number(momentum) and 0 <= momentum < 1):
            raise ValueError(f"momentum must be in [0, 1), got {momentum!r}: at 1 the banks never change.")
        if not (is_whole(dim) and dim >= 2):
            raise ValueError(
                f"dim must be a whole number of dimensions, 2 or more (of one, a unit embedding is 1 or -1, with no "
                f"gradient); got {dim!r}."
            )
        self.dim = dim
        self.temperature = _check.positive("temperature", temperature)
        self.memory = memory
        self.negatives = negatives
        self.student_head = self.teacher_head = None
        partition = None if partition is None else _check.positive("partition", partition)
        self.banks = None if memory is None else Banks(memory, dim, momentum, partition)

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Create the two heads for features of these shapes; values and batch size do not matter."""
        _check.samples(student, teacher, 1, "there is nothing to embed.")
        self.student_head = nn.Linear(student[0].numel(), self.dim, device=student.device)
        self.teacher_head = nn.Linear(teacher[0].numel(), self.dim, device=teacher.device)

    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Return the contrastive loss of two features; in training, update the banks if there are any."""
        if self.student_head is None or self.teacher_head is None:
            raise RuntimeError("CRD has no heads yet: use it in a Term, or call build(student, teacher).")
        why = "the negatives are the batch's other samples."
        _check.samples(student, teacher, 1 if self.banks is not None else 2, why)
        with full_precision(student):
            s, t = _embed(self.student_head, student), _embed(self.teacher_head, teacher.detach())
            if self.banks is None:
                return crd(s, t, self.temperature, target)
            loss: Tensor = self.banks(s, t, index, target, self.temperature, self.negatives)
            return loss


def _embed(head: nn.Linear, feature: Tensor) -> Tensor:
    # a head is bfloat16 where the trainer's precision is "bf16-true"; otherwise this is float32
    return unit(upcast(head(feature.flatten(1).to(head.weight.dtype))))
