"""SEED: which of many earlier samples an embedding is like."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import full_precision, unit, upcast


def seed(
    student: Tensor, teacher: Tensor, others: Tensor, temperature: float = 0.2, teacher_temperature: float = 0.01
) -> Tensor:
    """Return ``KL(p_t || p_s)`` of the similarities to teacher embeddings (K, D); see :class:`SEED`."""
    _check.temperature(temperature)
    _check.temperature(teacher_temperature)
    _check.embeddings(student, teacher)
    s, t = unit(upcast(student)), unit(upcast(teacher.detach()))
    t, bank = t.to(s.dtype), others.to(s.dtype)
    with full_precision(student):
        log_s, log_t = (
            (torch.cat([(x * t).sum(1, keepdim=True), x @ bank.T], dim=1) / heat).log_softmax(1)
            for x, heat in ((s, temperature), (t, teacher_temperature))
        )
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


class SEED(nn.Module):
    """Similarities to a queue of earlier samples, as the teacher sees them (Fang et al.).

    With embeddings of length 1, the teacher's t of the same sample, and the teacher's embeddings q_1 .. q_K of earlier
    ones, both sides are a distribution over K + 1 samples::

        p_x = softmax([x.t, x.q_1, ..., x.q_K] / T_x)
        loss = KL(p_t || p_s), the mean over the batch

    The authors have the cross entropy, which has the same gradient, and a queue of 65,536, with 1e-4 as the teacher's
    temperature in their code; 0.01 leaves more than the sample itself. The queue needs no labels, and is a buffer of
    ``queue * D`` floats: it begins with random directions, and is saved, so that a resumed run goes on with it. **In
    training mode forward puts the batch into the queue**; in eval mode it does not. Under DDP it follows the process
    whose buffers are broadcast.

    Args:
        queue: Number of earlier samples, K.
        temperature: Of the student's distribution, positive. May be changed between steps.
        teacher_temperature: Of the teacher's.

    Returns:
        ``forward(student, teacher)``, both (B, D), returns a scalar.

    Raises:
        RuntimeError: If ``build(student, teacher)`` was not called; a Term calls it before the optimizers.
        ValueError: If the shapes differ, or a batch is larger than the queue.

    Source:
        Fang et al., SEED: Self-supervised Distillation For Visual Representation, arXiv 2101.04731, equations 1 to 5.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> student, teacher = torch.randn(8, 16), torch.randn(8, 16)
        >>> loss = losses.SEED(queue=64)
        >>> loss.build(student, teacher)
        >>> loss(student, teacher).shape
        torch.Size([])
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "shape"
    bank: Tensor
    place: Tensor

    def __init__(self, queue: int = 4096, temperature: float = 0.2, teacher_temperature: float = 0.01) -> None:
        super().__init__()
        self.queue = _check.whole("queue", queue)
        self.temperature = _check.positive("temperature", temperature)
        self.teacher_temperature = _check.positive("teacher_temperature", teacher_temperature)

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Create the queue for embeddings as long as the teacher's; values and batch size do not matter."""
        # Of a generator of its own: data order and dropout of the student are what they are without the term.
        own = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        directions = torch.randn(self.queue, teacher.shape[-1], generator=own, device="cpu")
        self.register_buffer("bank", F.normalize(directions).to(teacher.device))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64, device=teacher.device))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return how differently two batches are like earlier ones; in training, remember the teacher's."""
        if "bank" not in self._buffers:
            raise RuntimeError("SEED has no queue yet: use it in a Term, or call build(student, teacher).")
        if len(teacher) > self.queue:
            raise ValueError(f"a batch of {len(teacher)} does not fit into queue={self.queue}: make the queue longer.")
        # A copy: backward needs what the queue was.
        loss = seed(student, teacher, self.bank.clone(), self.temperature, self.teacher_temperature)
        if self.training:
            with torch.no_grad():
                rows = (self.place + torch.arange(len(teacher), device=self.place.device)) % self.queue
                self.bank.index_copy_(0, rows, unit(upcast(teacher.detach())).to(self.bank.dtype))
                self.place.copy_((self.place + len(teacher)) % self.queue)
        return loss
