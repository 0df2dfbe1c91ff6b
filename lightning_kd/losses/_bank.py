"""The memory banks of contrastive distillation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import unit

NO_LABELS = "Without class indices in the batch, contrast goes without labels: say so with target=lambda batch: None."


def crd_nce(
    positive: Tensor, negatives: Tensor, log_partition: Tensor, noise: float, mask: Tensor | None = None
) -> Tensor:
    """Return the noise-contrastive loss of scores against a memory bank; see ``losses.CRD``.

    With ``h(x) = sigmoid(x - log Z - log(noise))``::

        mean_B(-log h(positive) - sum_K log(1 - h(negative)))

    Args:
        positive: (B), cosine over temperature of each anchor with its own partner.
        negatives: (B, K), the same with K others.
        log_partition: log Z, a scalar.
        noise: K / M, negatives over size of the data set.
        mask: (B, K), true where a negative does not count.

    Returns:
        A scalar.
    """
    offset = log_partition + math.log(noise)
    others = F.softplus(negatives - offset)
    if mask is not None:
        others = others.masked_fill(mask, 0.0)
    return (F.softplus(offset - positive) + others.sum(1)).mean()


class Banks(nn.Module):
    """One embedding per training sample, of student and teacher, and the label where one was seen.

    The banks are persistent buffers, so that a resumed run continues with the same negatives. They hold
    ``2 * samples * dim`` floats, drawn at random on the unit sphere. What is random comes from the seed of torch's
    generator and a count of the training steps, and draws nothing from it: data order and dropout of the student are
    what they are without the term.
    """

    draws: Tensor
    student: Tensor
    teacher: Tensor
    label: Tensor
    log_partition: Tensor

    def __init__(self, samples: int, dim: int, momentum: float, partition: float | None) -> None:
        super().__init__()
        self.momentum = momentum
        seed = torch.initial_seed() % 2**63
        self.register_buffer("draws", torch.tensor([seed, 0]))  # the seed, and how many draws were made
        own = torch.Generator().manual_seed(seed)  # on the CPU, wherever a `with torch.device(...)` makes the module
        for side in ("student", "teacher"):
            directions = F.normalize(torch.randn(samples, dim, generator=own, device="cpu"), dim=1)
            self.register_buffer(side, directions.to(self.draws.device))
        self.register_buffer("label", torch.full((samples,), -1, dtype=torch.int64))
        # log Z with the student and with the teacher as anchor; NaN until the first batch has set it
        start = torch.nan if partition is None else partition
        self.register_buffer("log_partition", torch.full((2,), start).log())

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        index: Tensor | None,
        target: Tensor | None,
        temperature: float,
        negatives: int,
    ) -> Tensor:
        """Return the loss of unit embeddings (B, D) against the banks; in training, update these."""
        if index is None or index.is_floating_point() or index.shape != student.shape[:1]:
            got = None if index is None else f"{index.dtype} {tuple(index.shape)}"
            raise ValueError(
                f"CRD with memory needs `index`, integers of shape {tuple(student.shape[:1])}: the samples' "
                f"place in the training set, got {got}. Let the data set return it and pass index=... to "
                "the callback, a function of the batch, its key or its index; a task adapter says it in labels(). Or "
                "use CRD() without memory."
            )
        label = None if target is None else _check.class_target(target, student, bounded=False, remedy=NO_LABELS)
        samples = self.label.shape[0]
        _check.in_range("index", index, samples, "memory= is the number of training samples.")
        drawn = self.draw(negatives)
        mask = drawn == index[:, None]
        if label is not None:
            mask = mask | (self.label[drawn] == label[:, None]) & (label[:, None] >= 0)
        losses, log_partition = [], []
        for anchor, bank, known in (
            (student, self.teacher, self.log_partition[0]),
            (teacher, self.student, self.log_partition[1]),
        ):
            positive = (anchor * bank[index]).sum(1) / temperature
            # one (K, D) matrix for all anchors: a draw for each would be (B, K, D)
            others = anchor @ bank[drawn].to(anchor.dtype).T / temperature
            estimate = others.detach().logsumexp((0, 1)) - math.log(others.numel() / samples)
            log_z = torch.where(known.isnan(), estimate, known)
            log_partition.append(log_z)
            losses.append(crd_nce(positive, others, log_z, negatives / samples, mask))
        if self.training:
            self.update(student, teacher, index, label)
            self.draws[1] += negatives
            self.log_partition.copy_(torch.stack(log_partition))
        return losses[0] + losses[1]

    def draw(self, count: int) -> Tensor:
        """Return the next ``count`` places in the banks; in eval mode and until the next training step, the same.

        By a hash of a counter, as it needs no state but numbers: no generator of the device is asked or moved.
        """
        seed, made = self.draws
        step = torch.arange(1, count + 1, device=self.draws.device) + made
        return splitmix64(seed + step * -0x61C8864680B583EB) % self.label.shape[0]

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor, index: Tensor, target: Tensor | None) -> None:
        """Move the samples' embeddings towards the new ones and note their labels."""
        for bank, new in ((self.student, student), (self.teacher, teacher)):
            mixed = torch.lerp(new, bank[index].to(new.dtype), self.momentum)
            bank[index] = unit(mixed).to(bank.dtype)
        if target is not None:
            self.label[index] = torch.where(target >= 0, target, self.label[index])


def splitmix64(x: Tensor) -> Tensor:
    """Scramble int64 numbers so that each bit depends on all: the output function of splitmix64 (Steele et al.).

    Products wrap around, and ``>>`` copies the sign, which the masks take off again.
    """
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & (1 << 33) - 1)
