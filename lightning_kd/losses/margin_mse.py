"""MarginMSE: by how much one candidate is better than the others."""

from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import upcast


def margin_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of the margins of scores (B, N); see :class:`MarginMSE`."""
    _check.same_shape(student, teacher, "Let both models score the same candidates, in the same order.")
    if student.ndim != 2 or student.shape[1] < 2:
        raise ValueError(
            f"scores are (B, N), those of N >= 2 candidates for each query, got {tuple(student.shape)}: a margin is "
            "between two of them. Stack what a model says of a query's candidates: torch.stack(scores, dim=1)."
        )
    s, t = upcast(student), upcast(teacher.detach())
    margin = (s[:, :1] - s[:, 1:]) - (t[:, :1] - t[:, 1:]).to(s.dtype)
    return margin.square().mean()


class MarginMSE(nn.Module):
    """Margins of scores: by how much the first candidate is better than each other one (Hofstaetter et al.).

    Of scores ``x`` of each query's candidates, the first of which answers it::

        loss = mean_B,j ((s_0 - s_j) - (t_0 - t_j))^2,  j = 1 .. N - 1

    The student may be off by a constant for each query: a cross-encoder's scores can be learned by a model of
    embeddings, whose scores are inner products. The paper has two candidates; with more, it is the mean over the
    triples. Scores of very different scale are brought together by ``Standardized(MarginMSE())``. For a listwise
    divergence over the candidates take ``KD``, whose classes they are then.

    Returns:
        ``forward(student, teacher)``, both (B, N), returns a scalar, zero at equality and where the student differs by
        a constant for each query.

    Raises:
        ValueError: If the shapes differ, or there are fewer than two candidates.

    Source:
        Hofstaetter et al., Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation,
        arXiv 2010.02666, section 3. The formula is also that of sentence-transformers'
        ``MarginMSELoss``.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> losses.MarginMSE()(torch.tensor([[0.5, 0.25]]), torch.tensor([[9.0, 8.0]]))
        tensor(0.5625)
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean squared error of the margins of two batches of scores."""
        return margin_mse(student, teacher)
