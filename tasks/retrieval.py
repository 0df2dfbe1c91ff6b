"""Retrieval: embeddings by which samples of a class, or documents that answer a query, are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection

from lightning_kd.answers import answers
from lightning_kd.drawing import Drawing, palette, spread, tiled
from lightning_kd.metrics.retrieval import RetrievalQuality
from lightning_kd.numbers import is_whole
from lightning_kd.task import TaskAdapter

FIELDS = ("sentence_embedding", "embeddings", "embedding")
"""Where a model's output holds its embeddings, if it is not a tensor."""

DRAWN = 4
"""Images whose nearest are drawn."""

TOLD = 5000
"""Texts among which is searched once more, to show what is found."""


class Retrieval(TaskAdapter):
    """Retrieval with any model that returns embeddings ``(B, D)``, of images or of text.

    What a model takes is the first part of a batch; several inputs are a tuple. The second part is what is relevant:

    - ``relevance="labels"``: batches ``(inputs, labels)``. Each sample is a query among all others, those of its class
      are to be found. Metrics are ``recall@1``, ``recall@5`` (one of the k nearest is of the class) and ``map@r``.
    - ``relevance="judgments"``: in evaluation batches ``(inputs, numbers, relevant)``, documents and queries in any
      order: ``numbers`` ``(B,)`` are the documents', and -1 for a query; ``relevant`` ``(B, R)`` are the numbers of
      the documents that answer it, padded with -1, in each batch as far as it needs. Metrics are ``ndcg@10``,
      ``mrr@10`` and ``recall@100`` (the fraction of what is relevant that is found). Judgments with grades are
      ``(inputs, numbers, relevant, gains)``: ``gains`` ``(B, R)`` are how much each of ``relevant`` is worth, and
      ``ndcg_graded@10`` is measured by them, too. A batch of documents alone needs none.

    In tests with a teacher whose embeddings are as long as the student's the same metrics are computed for the
    student's queries in the teacher's index, ``asymmetric_recall@1`` and so on: a student that is aligned to its
    teacher needs no index of its own. Terms may name ``embedding``, and ``features.<i>`` of :class:`Embedder`.

    There is no loss in evaluation: what it is of a batch depends on how the batches are made.

    Args:
        criterion: The supervised loss, ``criterion(embeddings, labels)``: any of pytorch-metric-learning that has no
            parameters, or your own. None says that the student learns from its teacher alone.
        miner: A miner of pytorch-metric-learning, which chooses the pairs or triplets of the criterion.
        relevance: What is relevant to a query.
        recall_at: The numbers k of ``recall@k``; (1, 5) with labels and (100,) with judgments unless given.
        cosine: Whether embeddings are compared by their angle alone, or else by their inner product.
        index: A factory string of faiss, ``"HNSW32"`` say: metrics are then of what this index finds. Exact unless
            given.
        dims: Lengths to which embeddings are cut for the metrics once more, ``recall@1_dim16`` and so on: of a student
            that was taught to be cut short (``losses.Matryoshka``).

    Raises:
        ValueError: If the arguments contradict each other, or what a model or the data gives has another shape.

    Example:
        >>> import torch
        >>> from pytorch_metric_learning.losses import TripletMarginLoss
        >>> task = Retrieval(TripletMarginLoss(margin=0.1))
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> float(task.loss(embeddings, (None, torch.tensor([0, 0, 1]))))
        0.0
    """

    drawn_among = 400

    def __init__(
        self,
        criterion: nn.Module | None,
        miner: nn.Module | None = None,
        relevance: Literal["labels", "judgments"] = "labels",
        recall_at: Sequence[int] | None = None,
        cosine: bool = True,
        index: str | None = None,
        dims: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if relevance not in ("labels", "judgments"):
            raise ValueError(f"relevance is 'labels' or 'judgments', got {relevance!r}.")
        if recall_at is not None and not _positive(recall_at):
            raise ValueError(f"recall_at are positive whole numbers, [1, 5] for one; got {recall_at!r}.")
        if dims and not (_positive(dims) and len({*dims}) == len(dims)):
            raise ValueError(f"dims are different positive lengths of embeddings, [16, 32] for one; got {dims!r}.")
        if miner is not None and criterion is None:
            raise ValueError(
                "A miner chooses pairs for a criterion, and criterion=None has none: give both or neither."
            )
        if criterion is not None and any(True for _ in criterion.parameters()):
            raise ValueError(
                f"{type(criterion).__name__} has parameters of its own, and the optimizer has the student's alone, so "
                "it would never learn them. Take a loss of pairs or triplets, MultiSimilarityLoss() say; or train by "
                "the callback, in a LightningModule that holds the loss and gives its parameters to the optimizer."
            )
        self.criterion = criterion
        self.miner = miner
        self.relevance = relevance
        self.recall_at = recall_at
        self.cosine = cosine
        self.index_kind = index
        self.dims = tuple(dims)
        self.taught = False
        self.told_among = 0 if relevance == "labels" else TOLD
        self.main_metric = f"recall@{recall_at[0] if recall_at else 1}" if relevance == "labels" else "ndcg@10"

    def meet(self, student: nn.Module, teacher: nn.Module) -> None:
        """Learns that there is a teacher."""
        self.taught = True

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Calls the model; inputs that are a tuple are several arguments."""
        inputs = self.inputs(batch)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)

    def index(self, batch: Any) -> Any:
        """Returns the samples' indices in the data set; with judgments a third part is something else."""
        return None if self.relevance == "judgments" else super().index(batch)

    def target(self, batch: Any) -> Tensor:
        """Returns the labels, ``(B,)`` integers."""
        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
            got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"Retrieval wants batches (inputs, labels), labels integers (B,); got labels {got}.")
        return labels

    def loss(self, output: Any, batch: Any) -> Tensor | None:
        """Returns the supervised loss in training; 0 without a criterion, where a teacher was met."""
        if not self.training:
            return None
        embeddings = self.embeddings(output)
        if self.criterion is None:
            if not self.taught:
                raise ValueError(
                    "criterion=None says that the student learns from a teacher alone, and there is none. Give teacher "
                    "and terms, or a criterion; to compare with the student alone give a criterion and task_weight=0."
                )
            return embeddings.sum() * 0.0
        labels = self.target(batch)
        if labels.device.type == "cpu" and len(labels) and bool((labels == labels[0]).all()):
            raise ValueError(
                f"All {len(labels)} samples of a training batch are of one class, so there is nothing to tell apart. "
                "Let batches hold several samples of several classes: MPerClassSampler of pytorch-metric-learning."
            )
        chosen = (self.miner(embeddings, labels),) if self.miner is not None else ()
        loss: Tensor = self.criterion(embeddings, labels, *chosen)
        return loss

    def metrics(self) -> MetricCollection:
        """Returns the quality of the retrieval, by whole embeddings and by those that are cut."""
        cut = {f"retrieval_dim{dim}": self._quality(dim=dim) for dim in self.dims}
        return MetricCollection({"retrieval": self._quality(), **cut}, compute_groups=False)

    def _quality(self, prefix: str = "", dim: int | None = None) -> RetrievalQuality:
        return RetrievalQuality(
            self.relevance, self.recall_at, cosine=self.cosine, index=self.index_kind, prefix=prefix, dim=dim
        )

    def update(self, metrics: MetricCollection, output: Any, batch: Any) -> None:
        """Keeps the embeddings of a batch."""
        metrics.update(self.embeddings(output), self.target(batch), self._relevant(batch), gains=self._gains(batch))

    def _relevant(self, batch: Any) -> Tensor | None:
        return self._judged(batch) if self.relevance == "judgments" else None

    def _judged(self, batch: Any) -> Tensor:
        relevant = batch[2] if len(batch) > 2 else None
        if not isinstance(relevant, Tensor) or relevant.ndim != 2 or len(relevant) != len(batch[1]):
            got = tuple(relevant.shape) if isinstance(relevant, Tensor) else type(relevant).__name__
            raise ValueError(
                f"relevance='judgments' wants batches (inputs, numbers, relevant), relevant integers ({len(batch[1])}, "
                f"R) padded with -1; got {got}. For classes say relevance='labels'."
            )
        return relevant

    def _gains(self, batch: Any) -> Tensor | None:
        """Returns what stands behind the relevant documents; what it is not is told by the metric."""
        return batch[3] if self.relevance == "judgments" and len(batch) > 3 else None

    def agreement(self) -> Metric:
        """Returns the quality of the retrieval by the student's queries in the teacher's index."""
        return self._quality("asymmetric_")

    def update_agreement_batch(self, metric: Metric, student: Any, teacher: Any, batch: Any) -> None:
        """Keeps both models' embeddings, unless one is longer than the other."""
        queries, items = self.embeddings(student), self.embeddings(teacher)
        if queries.shape == items.shape:
            metric.update(queries, self.target(batch), self._relevant(batch), items, self._gains(batch))

    def predict(self, output: Any) -> Tensor:
        """Returns the embeddings in float32, of length 1 where they are compared by their angle."""
        embeddings = self.embeddings(output).float()
        return F.normalize(embeddings) if self.cosine else embeddings

    def draw(self, images: Sequence[Tensor], batch: Any, prediction: Any = None) -> Drawing | None:
        """Returns the four nearest of some images, by what was predicted, or the first of their class.

        None with judgments, which are of texts mostly, and where no image has another of its class.
        """
        return self._nearest(images, batch, None if prediction is None else prediction @ prediction.T)

    def draw_with_teacher(self, images: Sequence[Tensor], batch: Any, prediction: Any, teacher: Any) -> Drawing | None:
        """Returns the four nearest in the teacher's index; None where embeddings differ in length."""
        if prediction.shape != teacher.shape:
            return None
        drawn = self._nearest(images, batch, prediction @ teacher.T)
        return drawn and drawn._replace(title="in the teacher's index")

    def _nearest(self, images: Sequence[Tensor], batch: Any, similar: Tensor | None) -> Drawing | None:
        if self.relevance == "judgments":
            return None
        labels = self.target(batch).cpu()
        like = (labels[:, None] == labels).fill_diagonal_(False)
        (asked,) = torch.nonzero(like.any(1), as_tuple=True)
        if not len(asked):
            return None
        asked = asked[spread(len(asked), DRAWN)]
        near = like.float() if similar is None else similar.cpu().fill_diagonal_(-torch.inf)
        right, wrong = palette(4)[3], palette(1)[0]
        pictures = []
        for query in asked.tolist():
            found = near[query].sort(descending=True, stable=True).indices[:4].tolist()
            found = [i for i in found if similar is not None or like[query, i]]
            pictures.append(tiled([images[i] for i in found], [right if like[query, i] else wrong for i in found]))
        legend = {"of its class": right} if similar is None else {"of its class": right, "of another": wrong}
        return Drawing(pictures, legend, of=asked.tolist())

    def tell(
        self, names: Sequence[str], batches: Sequence[Any], predictions: Mapping[str, Sequence[Any]], teacher: str
    ) -> str | None:
        """Returns tables of what each model finds for some questions, in its own index and in the teacher's."""
        numbers = torch.cat([self.target(batch).cpu() for batch in batches])
        relevant = [set(row) - {-1} for batch in batches for row in self._judged(batch).tolist()]
        searches = {}
        for name, said in predictions.items():
            own = torch.cat(list(said))
            searches[name] = (own, own)
            index = torch.cat(list(predictions[teacher])) if teacher and name != teacher else own[:0]
            if index.shape == own.shape:
                searches[f"{name}, in the teacher's index"] = (own, index)
        return answers(names, numbers, relevant, searches)

    def knowledge(self, model: nn.Module) -> Mapping[str, str]:
        """Offers ``embedding``, and the stages of a backbone of timm."""
        model = getattr(model, "_orig_mod", model)
        libraries = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
        stages = getattr(getattr(model, "backbone", None), "feature_info", None)
        listed = [stage.get("module") for stage in stages] if isinstance(stages, list) else []
        output = "output.sentence_embedding" if "sentence_transformers" in libraries else "output"
        return {"embedding": output, **{f"features.{i}": f"backbone.{name}" for i, name in enumerate(listed) if name}}

    def embeddings(self, output: Any) -> Tensor:
        """Returns the embeddings ``(B, D)`` in what a model returned."""
        for name in FIELDS:
            if isinstance(output, Mapping) and name in output:
                output = output[name]
            elif not isinstance(output, Tensor) and isinstance(getattr(output, name, None), Tensor):
                output = getattr(output, name)
        if not isinstance(output, Tensor) or output.ndim != 2:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"Retrieval wants embeddings (B, D) from the model, a tensor or a field {' or '.join(FIELDS)}; got "
                f"{got}. For a model that returns something else, override Retrieval.embeddings."
            )
        return output


def _positive(numbers: object) -> bool:
    return isinstance(numbers, Sequence) and len(numbers) > 0 and all(is_whole(k) and k > 0 for k in numbers)
