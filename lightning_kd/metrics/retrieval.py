"""How well embeddings retrieve: among classes, or documents that were judged for queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_kd.extras import late_import
from lightning_kd.metrics._check import refuse_no_numbers

CHUNK = 1024
"""Queries that are compared with the whole index at once."""


def search(queries: Tensor, items: Tensor, k: int, index: str | None = None) -> Tensor:
    """Return the numbers ``(Q, k)`` of the items with the largest inner products, best first.

    Args:
        queries: ``(Q, D)``, float32.
        items: ``(N, D)``, float32.
        k: How many to return, at most ``N``.
        index: A factory string of faiss, ``"HNSW32"`` say, to search as approximately as that index does; exact, by
            torch, unless given.

    Returns:
        int64; -1 behind what an approximate index has found.

    Raises:
        ModuleNotFoundError: If an index is asked for and faiss is not installed.

    Example:
        >>> search(torch.eye(2), torch.tensor([[1.0, 0.0], [0.5, 0.5]]), k=2)
        tensor([[0, 1],
                [1, 0]])
    """
    if index is None:
        return torch.cat([(chunk @ items.T).topk(k).indices for chunk in torch.split(queries, CHUNK)])
    faiss = late_import("faiss", "faiss-cpu", "retrieval")
    built = faiss.index_factory(items.shape[1], index, faiss.METRIC_INNER_PRODUCT)
    stored = items.cpu().numpy()
    if not built.is_trained:
        built.train(stored)
    built.add(stored)
    return torch.from_numpy(built.search(queries.cpu().numpy(), k)[1]).to(queries.device)


class RetrievalQuality(Metric):
    """Recall, mAP@R, nDCG and reciprocal rank of a search by embeddings, over all of an epoch.

    With ``relevance="labels"`` every sample is a query among all others, and those of its class are relevant (R of
    them)::

        recall@k = mean over queries of (1 if one of the k nearest is relevant)
        map@r    = mean over queries of 1/R sum_(i <= R) precision(i) relevant(i)

    With ``relevance="judgments"`` queries search documents, and what is relevant to a query was judged::

        ndcg@k   = mean over queries of sum_(i <= k) relevant(i) / log2(i + 1), over the same of the best ranking
        mrr@k    = mean over queries of 1 / rank of the first that is relevant, 0 where it is none of k
        recall@k = mean over queries of the fraction of what is relevant that is among the k nearest

    and where judgments have grades, which are given as gains, as another value beside these::

        ndcg_graded@k = mean over queries of sum_(i <= k) gain(i) / log2(i + 1), over the same of the best ranking

    Queries to which nothing is relevant are left out of the means, and stay in the index. Where nothing can be told,
    because no query has something to find or there is one class only, all values are nan. The best ranking is of all
    that was judged, in the index or not. A document that stands twice among a query's counts once, by its largest gain.

    Args:
        relevance: What is relevant to a query.
        recall_at: The numbers k of ``recall@k``; (1, 5) with labels and (100,) with judgments unless given.
        cutoff: The k of nDCG and the reciprocal rank.
        cosine: Whether embeddings are scaled to length 1.
        index: A factory string of faiss for the search; exact unless given.
        prefix: Put before the names.
        dim: Length to which embeddings are cut first, with which the names end then: ``recall@1_dim16``.

    Raises:
        ValueError: If an embedding is shorter than that, or gains are not one positive number for each judgment; at the
            end, if an embedding has values that are not finite, or some queries' judgments have gains and others' none.

    Source:
        mAP@R: Musgrave et al., A Metric Learning Reality Check, arXiv 2003.08505, section 3.2. nDCG of gains: Jarvelin
        and Kekalainen, Cumulated gain-based evaluation of IR techniques, 2002; the discount as torchmetrics has it.

    Example:
        >>> quality = RetrievalQuality(recall_at=(1,))
        >>> quality.update(torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), torch.tensor([0, 0, 1, 1]))
        >>> {name: float(value) for name, value in quality.compute().items()}
        {'recall@1': 1.0, 'map@r': 1.0}
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    queries: list[Tensor]
    items: list[Tensor]
    labels: list[Tensor]
    relevant: list[Tensor]
    gains: list[Tensor]
    widths: list[Tensor]

    def __init__(
        self,
        relevance: Literal["labels", "judgments"] = "labels",
        recall_at: Sequence[int] | None = None,
        cutoff: int = 10,
        cosine: bool = True,
        index: str | None = None,
        prefix: str = "",
        dim: int | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.judged = relevance == "judgments"
        self.recall_at = tuple(recall_at or ((100,) if self.judged else (1, 5)))
        self.cutoff = cutoff
        self.cosine = cosine
        self.index = index
        self.prefix = prefix
        # Judgments are kept in one long row, and of each sample how many: batches, and processes, may differ in that.
        for name in ("queries", "items", "labels", "relevant", "gains", "widths"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        queries: Tensor,
        labels: Tensor,
        relevant: Tensor | None = None,
        items: Tensor | None = None,
        gains: Tensor | None = None,
    ) -> None:
        """Keep the embeddings of a batch.

        Args:
            queries: ``(B, D)``.
            labels: ``(B,)``: classes; with judgments the documents' numbers, and -1 for a query.
            relevant: With judgments, ``(B, R)``: the numbers of the documents that are relevant, then -1. ``R`` may be
                another one in each batch.
            items: ``(B, D)``, the same samples as the index has them, of another model; those of ``queries`` unless
                given.
            gains: ``(B, R)``: how much each of ``relevant`` is worth, positive; what stands behind them is not read. A
                batch in which nothing is relevant needs none.
        """
        if relevant is not None:
            unknown = torch.full(relevant.shape, torch.nan, device=relevant.device)
            self.gains.append((unknown if gains is None else _gains(relevant, gains)).flatten())
            self.relevant.append(relevant.flatten())
            self.widths.append(torch.full(relevant.shape[:1], relevant.shape[1], device=relevant.device))
        self.queries.append(self._scaled(queries))
        if items is not None:
            self.items.append(self._scaled(items))
        self.labels.append(labels)

    def _scaled(self, embeddings: Tensor) -> Tensor:
        if self.dim is not None and embeddings.shape[1] < self.dim:
            raise ValueError(f"embeddings {tuple(embeddings.shape)} cannot be cut to {self.dim}: lower dims.")
        embeddings = embeddings.detach()[:, : self.dim].float()
        return F.normalize(embeddings) if self.cosine else embeddings

    def compute(self) -> dict[str, Tensor]:
        """Return the values by name."""
        queries, labels = dim_zero_cat(self.queries), dim_zero_cat(self.labels)
        items = dim_zero_cat(self.items) if len(self.items) else queries  # none of two processes are an empty tensor
        wrong = ~(queries.isfinite() & items.isfinite()).all(1)
        refuse_no_numbers("the embeddings", wrong.sum(), len(queries), "samples")
        if self.judged:
            values = self._of_judgments(queries, items, labels, *self._judgments())
        else:
            values = self._of_labels(queries, items, labels)
        suffix = "" if self.dim is None else f"_dim{self.dim}"
        return {f"{self.prefix}{name}{suffix}": value for name, value in values.items()}

    def _judgments(self) -> tuple[Tensor, Tensor]:
        """Return the numbers of the relevant documents ``(N, R)``, then -1, and gains, NaN where there are none."""
        widths = dim_zero_cat(self.widths)
        there = torch.arange(int(widths.max()), device=widths.device) < widths[:, None]
        relevant = torch.full(there.shape, -1, device=there.device)
        gains = torch.full(there.shape, torch.nan, device=there.device)
        relevant[there], gains[there] = dim_zero_cat(self.relevant).to(relevant), dim_zero_cat(self.gains).to(gains)
        return relevant, gains

    def _of_labels(self, queries: Tensor, items: Tensor, labels: Tensor) -> dict[str, Tensor]:
        _, of_class, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        others = counts[of_class] - 1
        asked = others > 0
        names = [*(f"recall@{k}" for k in self.recall_at), "map@r"]
        if not asked.any() or len(counts) == 1:
            return dict.fromkeys(names, queries.new_tensor(torch.nan))
        most = int(others.max())
        k = min(max(*self.recall_at, most), len(items) - 1)
        found = search(queries[asked], items, k + 1, self.index)
        # The sample itself is nobody's answer: it goes behind the others, and then away.
        itself = found == asked.nonzero()
        found = found.gather(1, itself.long().argsort(dim=1, stable=True))[:, :k]
        right = (labels[found] == labels[asked][:, None]) & (found >= 0)
        rank = torch.arange(1, k + 1, device=right.device)
        precision = right.cumsum(1) / rank
        wanted = others[asked]
        average = (precision * right * (rank <= wanted[:, None])).sum(1) / wanted
        recalls = [right[:, :n].any(1).float().mean() for n in self.recall_at]
        return dict(zip(names, [*recalls, average.mean()], strict=True))

    def _of_judgments(
        self, queries: Tensor, items: Tensor, labels: Tensor, relevant: Tensor, gains: Tensor
    ) -> dict[str, Tensor]:
        names = [f"ndcg@{self.cutoff}", f"mrr@{self.cutoff}", *(f"recall@{k}" for k in self.recall_at)]
        graded = bool((~gains.isnan()).any())
        names += [f"ndcg_graded@{self.cutoff}"] if graded else []
        asked, document = (labels < 0) & (relevant >= 0).any(1), labels >= 0
        if not asked.any() or not document.any():
            return dict.fromkeys(names, queries.new_tensor(torch.nan))
        # Two processes that share data unevenly repeat some of it: a document is in the index once.
        numbers, place = torch.unique(labels[document], return_inverse=True)
        first = torch.empty_like(numbers).scatter_(0, place.flip(0), torch.arange(len(place) - 1, -1, -1).to(place))
        k = min(max(*self.recall_at, self.cutoff), len(numbers))
        found = search(queries[asked], items[document][first], k, self.index)
        ranked = torch.where(found >= 0, numbers[found], -2)
        relevant, gains = _once(relevant[asked], gains[asked])
        wanted = (relevant >= 0).sum(1)
        missing = ((relevant >= 0) & gains.isnan()).any(1)
        if graded and missing.any():
            raise ValueError(
                f"the judgments of {int(missing.sum())} of {len(missing)} queries have no gains, and others have: give "
                "gains in every batch in which something is relevant, 1 where there are no grades, or in none."
            )
        right = (ranked[:, :, None] == relevant[:, None, :]).any(2).float()
        rank = torch.arange(1, k + 1, device=right.device)
        reciprocal = (right * (rank <= self.cutoff) / rank).amax(1)
        recalls = [(right[:, :n].sum(1) / wanted).mean() for n in self.recall_at]
        ranked = ranked[:, : self.cutoff]
        values = [_ndcg(ranked, relevant, (relevant >= 0).float(), self.cutoff), reciprocal.mean(), *recalls]
        if graded:
            values.append(_ndcg(ranked, relevant, gains.where(relevant >= 0, 0.0), self.cutoff))
        return dict(zip(names, values, strict=True))


def _gains(relevant: Tensor, gains: Tensor) -> Tensor:
    """Return gains in float32, 0 where there is no judgment.

    Raises:
        ValueError: If they are not one positive number for each judgment.
    """
    if not isinstance(gains, Tensor) or gains.shape != relevant.shape:
        got = tuple(gains.shape) if isinstance(gains, Tensor) else type(gains).__name__
        raise ValueError(
            f"gains are numbers {tuple(relevant.shape)}, one in the place of each of relevant; got {got}. Pad both to "
            "one length, or leave gains out where judgments have no grades."
        )
    gains = torch.where(relevant >= 0, gains.float(), 0.0)
    if bad := gains[(relevant >= 0) & ~(gains > 0)].tolist():
        raise ValueError(
            f"gains of what is relevant are positive numbers, got {bad[0]}. Leave a document that is worth nothing out "
            "of relevant; of grades whose best is 1, gains are 5 - grade, say."
        )
    return gains


def _once(relevant: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """Return judgments in which each document of a row stands once, with the largest of its gains."""
    order = gains.argsort(dim=1, descending=True)
    relevant, gains = relevant.gather(1, order), gains.gather(1, order)
    relevant, order = relevant.sort(dim=1, stable=True)
    again = F.pad(relevant[:, 1:] == relevant[:, :-1], (1, 0))
    return relevant.masked_fill(again, -1), gains.gather(1, order)


def _ndcg(ranked: Tensor, relevant: Tensor, gains: Tensor, k: int) -> Tensor:
    """Return the mean of the discounted gains of documents ``(Q, n <= k)``, over those of the best k of ``(Q, R)``."""
    discount = 1 / torch.arange(2, k + 2, device=ranked.device).log2()
    gained = torch.where(ranked[:, :, None] == relevant[:, None, :], gains[:, None, :], 0.0).amax(2)
    best = gains.sort(dim=1, descending=True).values[:, :k]
    gained, best = (each * discount[: each.shape[1]] for each in (gained, best))
    return (gained.sum(1) / best.sum(1)).mean()
