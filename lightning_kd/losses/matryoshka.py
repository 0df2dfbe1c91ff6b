"""Matryoshka: any loss on embeddings, on their first numbers, too."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._wrapped import Wrapped, temperature_of_the_loss


class Matryoshka(Wrapped):
    """Any loss on embeddings, on embeddings that are cut short, too (Kusupati et al.).

    With the first ``d`` numbers of each embedding, for every ``d`` of ``dims``::

        loss = mean_d loss(student[:, :d], teacher[:, :d])

    So a student that is distilled may be cut to any of these lengths, as its teacher may. Of a teacher that may not,
    the whole embedding is imitated: ``whole_teacher=True``, with a loss of relations, ``RKD()`` or ``PKT()``, for which
    the two sides may differ in length. The paper sums over the lengths; their mean keeps the weight what it was.

    Args:
        loss: A loss on embeddings (B, D), such as ``LEAF(normalize=True)``, since what is cut has another length.
        dims: The lengths, at least one; name the whole length, too.
        whole_teacher: Whether the teacher's embeddings stay whole.

    Returns:
        ``forward(student, teacher, target=None)`` returns a scalar; the target is passed on if ``loss`` takes it.

    Raises:
        ValueError: If an embedding is shorter than asked for, or ``loss`` has parameters for the shapes of a sample.

    Source:
        Kusupati et al., Matryoshka Representation Learning, arXiv 2205.13147, equation 1.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> loss = losses.Matryoshka(losses.LEAF(), dims=[2, 8])
        >>> loss(torch.zeros(4, 8), torch.ones(4, 8))
        tensor(5.)
    """

    def __init__(self, loss: nn.Module, dims: Sequence[int], whole_teacher: bool = False) -> None:
        super().__init__(loss)
        if hasattr(loss, "build"):
            raise ValueError(
                f"{type(loss).__name__} learns parameters for embeddings of one length: Matryoshka wraps losses that "
                "have none, LEAF(normalize=True) or RKD() say."
            )
        if not dims:
            raise ValueError("dims are the lengths to which embeddings are cut, [64, 128, 384] say; got none.")
        self.dims = [_check.whole("dims", d) for d in dims]
        self.whole_teacher = whole_teacher

    temperature = temperature_of_the_loss

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the mean of the wrapped loss over the lengths."""
        _check.tensors(student, teacher)
        shorter = student if self.whole_teacher or student.shape[-1] <= teacher.shape[-1] else teacher
        if student.ndim != 2 or teacher.ndim != 2 or shorter.shape[1] < max(self.dims):
            raise ValueError(
                f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be embeddings (B, D) that can "
                f"be cut to {max(self.dims)}. Lower dims, or with a loss of relations say whole_teacher=True."
            )
        cut = [self.call(student[:, :d], teacher if self.whole_teacher else teacher[:, :d], target) for d in self.dims]
        return torch.stack(cut).mean()
