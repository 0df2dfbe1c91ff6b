"""InBatch: any loss on scores of candidates, where the candidates are the batch's other samples."""

from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import full_precision, unit, upcast
from lightning_kd.losses._wrapped import Wrapped, temperature_of_the_loss


def scores(embeddings: Tensor, scale: float = 20.0) -> Tensor:
    """Return how like each sample (B, D) is to the others, ``scale * cos`` (B, B - 1), in their order; see InBatch."""
    x = unit(upcast(embeddings.flatten(1)))
    with full_precision(x):
        every = scale * (x @ x.T)
    # Without the diagonal: after its first entry the flat matrix is B - 1 rows of B others and one of these.
    return every.flatten()[1:].view(len(x) - 1, len(x) + 1)[:, :-1].reshape(len(x), len(x) - 1)


class InBatch(Wrapped):
    """Any loss on scores of candidates, for models of embeddings: the candidates are the batch's other samples.

    With embeddings of length 1, and for each sample i the others j of its batch::

        loss(scale * student_i . student_j, scale * teacher_i . teacher_j),  both (B, B - 1)

    So ``InBatch(KD(temperature=1.0))`` is the listwise divergence: by whom the teacher would have a sample answered, as
    a distribution over the batch. Each side is compared with itself, so that the two may differ in length, and the
    student's embeddings are free to turn: to search the teacher's index take ``InfoNCE`` or ``LEAF``. Under DDP each
    process has its own candidates.

    Args:
        loss: A loss on (B, N) that needs no labels, such as ``KD(temperature=1.0)``. Where it follows the run, it is
            the outermost.
        scale: What cosines are multiplied by, the inverse of a temperature: with ``KD(temperature=1.0)`` the gradient
            keeps its size.

    Returns:
        ``forward(student, teacher)``, both (B, ...), returns what ``loss`` returns.

    Raises:
        ValueError: If the two differ in batch, there are fewer than three samples, or ``loss`` needs labels or has
            parameters for the shapes of a sample.

    Source:
        KL over the similarities of a batch: contrastive relational distillation of Yang et al., CLIP-KD, arXiv
        2307.12732, there between images and texts. ``scale`` is that of sentence-transformers, whose default is 20.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher = torch.randn(8, 16)
        >>> losses.InBatch(losses.KD(temperature=1.0))(2 * teacher, teacher) < 1e-6
        tensor(True)
    """

    def __init__(self, loss: nn.Module, scale: float = 20.0) -> None:
        super().__init__(loss)
        if hasattr(loss, "build") or self.needs_target:
            raise ValueError(
                f"{type(loss).__name__} learns parameters for the shapes of whole batches, or needs labels, and "
                "candidates have none: InBatch wraps losses that do neither, KD() say."
            )
        self.align = "none"  # the sides meet as scores
        self.scale = _check.positive("scale", scale)

    temperature = temperature_of_the_loss

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the wrapped loss of how like the samples of a batch are to each other."""
        _check.samples(student, teacher, 3, "the candidates are the batch's other samples, and one alone says nothing.")
        _check.direction(student.flatten(1))
        return self.call(scores(student, self.scale), scores(teacher.detach(), self.scale), None)
