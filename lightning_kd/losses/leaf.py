"""LEAF: embeddings that may search the teacher's index."""

from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import unit, upcast


def leaf(student: Tensor, teacher: Tensor, normalize: bool = False) -> Tensor:
    """Return the mean squared distance of embeddings (B, D) to the teacher's; see :class:`LEAF`."""
    _check.tensors(student, teacher)
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be embeddings (B, D) of one "
            "length, since the student's are to be found beside the teacher's. Give the student a last layer of the "
            "teacher's length: a projector of the term would not be there when it searches."
        )
    s, t = upcast(student), upcast(teacher.detach())
    if normalize:
        s, t = unit(s), unit(t)
    return (s - t.to(s.dtype)).square().sum(1).mean()


class LEAF(nn.Module):
    """Alignment: the squared distance to the teacher's embedding of the same input (Vujanic and Rueckstiess).

    ::

        loss = mean_B ||student - teacher||^2

    A student that is aligned may search an index that the teacher made. So its own last layer, and not a projector,
    brings its embeddings to the teacher's length; of embeddings of length 1 it is ``2 - 2 cos``. It needs no labels,
    no pairs and no large batch. The formula is the one that a review of the paper gives, of one sample and behind a
    normalisation that may be left out; the paper's own text and the authors' code were not there to be checked.

    Args:
        normalize: Whether both are scaled to length 1 first: for models that leave this to the search.

    Returns:
        ``forward(student, teacher)``, both (B, D), returns a scalar, zero at equality.

    Raises:
        ValueError: If the embeddings are not (B, D) of one length.

    Source:
        Vujanic and Rueckstiess, LEAF: Knowledge Distillation of Text Embedding Models with Teacher-Aligned
        Representations, arXiv 2509.12539.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> losses.LEAF()(torch.zeros(2, 8), torch.ones(2, 8))
        tensor(8.)
    """

    def __init__(self, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean squared distance of two batches of embeddings."""
        return leaf(student, teacher, self.normalize)
