import math
from typing import Any, Literal

import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.datasets import load_digits
from sklearn.metrics import ndcg_score
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.retrieval import (
    retrieval_normalized_dcg,
    retrieval_recall,
    retrieval_reciprocal_rank,
)
from torchmetrics.utilities import dim_zero_cat

from lightning_kd.metrics import RetrievalQuality
from lightning_kd.metrics.retrieval import search


def embeddings(count: int = 40, dim: int = 8) -> Tensor:
    return torch.randn(count, dim)


def measured(quality: RetrievalQuality, *batches: tuple[Tensor, ...]) -> dict[str, float]:
    for batch in batches:
        quality.update(*batch)
    return {name: float(value) for name, value in quality.compute().items()}


def judged(documents: int = 30, queries: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings, numbers and relevant documents; the last query has nothing that answers it."""
    numbers = torch.cat([torch.arange(documents) * 3 + 1, torch.full((queries,), -1)])
    relevant = torch.full((documents + queries, 5), -1)
    for i in range(queries - 1):
        relevant[documents + i, : i + 1] = torch.randperm(documents)[: i + 1] * 3 + 1
    order = torch.randperm(len(numbers))
    return embeddings(len(numbers))[order], numbers[order], relevant[order]


# Among classes


def test_real_digits_as_pytorch_metric_learning_measures_them() -> None:
    bunch = load_digits()
    images, labels = torch.from_numpy(bunch.data[:600]).float(), torch.from_numpy(bunch.target[:600])
    of = AccuracyCalculator(include=("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count")
    expected = of.get_accuracy(F.normalize(images), labels)
    found = measured(RetrievalQuality(), (images[:250], labels[:250]), (images[250:], labels[250:]))
    assert found["recall@1"] == pytest.approx(expected["precision_at_1"], abs=1e-6)
    assert found["map@r"] == pytest.approx(expected["mean_average_precision_at_r"], abs=1e-6)
    assert found["recall@1"] < found["recall@5"] < 1


def test_embeddings_that_are_cut_are_measured_as_shorter_ones() -> None:
    whole, labels = embeddings(), torch.arange(40) % 7
    cut, short = (
        measured(RetrievalQuality(dim=3), (whole, labels)),
        measured(RetrievalQuality(), (whole[:, :3], labels)),
    )
    assert cut == {f"{name}_dim3": value for name, value in short.items()}


def test_queries_of_one_model_in_the_index_of_another() -> None:
    queries, items, labels = embeddings(), embeddings(), torch.arange(40) % 7
    similar = F.normalize(queries) @ F.normalize(items).T
    similar.fill_diagonal_(-2)  # its own embedding is no answer, even where another one is nearer
    nearest = labels[similar.argmax(1)] == labels
    quality = RetrievalQuality(prefix="asymmetric_")
    quality.update(queries, labels, items=items)
    assert float(quality.compute()["asymmetric_recall@1"]) == pytest.approx(float(nearest.float().mean()))


def test_a_class_of_one_asks_nothing_and_stays_in_the_index() -> None:
    points = torch.tensor([[1.0, 0.0], [0.9, 0.4], [0.99, 0.1]])
    found = measured(RetrievalQuality(recall_at=(1, 2)), (points, torch.tensor([0, 0, 1])))
    assert found == {"recall@1": 0.0, "recall@2": 1.0, "map@r": 0.0}


@pytest.mark.parametrize("kind", ["labels", "judgments"])
@pytest.mark.parametrize("side", ["queries", "items"])
@pytest.mark.parametrize(("value", "cosine"), [(math.nan, True), (math.inf, True), (math.inf, False)])
def test_embeddings_that_are_no_numbers_are_not_measured(
    kind: Literal["labels", "judgments"], side: str, value: float, cosine: bool
) -> None:
    points, numbers, relevant = judged()
    quality, wrong = RetrievalQuality(kind, cosine=cosine), points.clone()
    wrong[2:5, 1] = value
    both = {"queries": points, "items": points} | {side: wrong}
    quality.update(both["queries"], numbers, relevant if kind == "judgments" else None, both["items"])
    with pytest.raises(ValueError, match="the embeddings of 3 of 36 samples have values that are not numbers"):
        quality.compute()


@pytest.mark.parametrize("labels", [torch.arange(5), torch.zeros(5, dtype=torch.long)], ids=["lone", "one class"])
def test_what_cannot_be_told_is_nan(labels: Tensor) -> None:
    found = measured(RetrievalQuality(), (embeddings(5), labels))
    assert found.keys() == {"recall@1", "recall@5", "map@r"}
    assert all(math.isnan(value) for value in found.values())


def test_angles_or_inner_products() -> None:
    points = torch.tensor([[1.0, 0.0], [0.9, 0.1], [5.0, 5.0], [4.0, 6.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert measured(RetrievalQuality(recall_at=(1,)), (points, labels))["recall@1"] == 1.0
    assert measured(RetrievalQuality(recall_at=(1,), cosine=False), (points, labels))["recall@1"] == 0.5


def test_embeddings_of_half_precision_are_measured_in_full() -> None:
    points, labels = embeddings().half(), torch.arange(40) % 4
    assert measured(RetrievalQuality(), (points, labels)) == measured(RetrievalQuality(), (points.float(), labels))


# Among documents


def test_judgments_as_torchmetrics_measures_each_query() -> None:
    points, numbers, relevant = judged()
    found = measured(RetrievalQuality("judgments", recall_at=(3, 100)), (points, numbers, relevant))
    unit, documents = F.normalize(points), numbers >= 0
    expected: dict[str, list[Tensor]] = {"ndcg@10": [], "mrr@10": [], "recall@3": [], "recall@100": []}
    for query in torch.nonzero((numbers < 0) & (relevant >= 0).any(1)).flatten():
        scores = unit[documents] @ unit[query]
        answers = torch.isin(numbers[documents], relevant[query][relevant[query] >= 0])
        expected["ndcg@10"].append(retrieval_normalized_dcg(scores, answers, top_k=10))
        expected["mrr@10"].append(retrieval_reciprocal_rank(scores, answers, top_k=10))
        expected["recall@3"].append(retrieval_recall(scores, answers, top_k=3))
        expected["recall@100"].append(torch.tensor(1.0))  # there are thirty documents
    assert len(expected["ndcg@10"]) == 5
    assert found == {name: pytest.approx(float(torch.stack(each).mean())) for name, each in expected.items()}


def test_a_document_that_two_processes_loaded_is_in_the_index_once() -> None:
    points, numbers, relevant = judged()
    once = measured(RetrievalQuality("judgments"), (points, numbers, relevant))
    again = torch.nonzero(numbers >= 0).flatten()[:7]
    twice = tuple(torch.cat([x, x[again]]) for x in (points, numbers, relevant))
    assert measured(RetrievalQuality("judgments"), twice) == once


@pytest.mark.parametrize("kind", ["labels", "judgments"])
def test_what_two_processes_have_kept_is_measured_together(kind: Literal["labels", "judgments"]) -> None:
    points, numbers, relevant = judged()
    kept = (points, numbers, relevant) if kind == "judgments" else (points, numbers % 4)
    expected = measured(RetrievalQuality(kind), kept, kept)
    quality = RetrievalQuality(kind)
    quality.distributed_available_fn = lambda: True
    quality.dist_sync_fn = lambda state, group: [state, state]
    assert measured(quality, kept) == expected  # and nothing of grades, which neither process has


def in_batches(batch: tuple[Tensor, ...], size: int = 9) -> list[tuple[Tensor, ...]]:
    """Return batches whose judgments, and what stands beside them, are as wide as each needs, and at least one."""
    found = []
    for points, numbers, relevant, *gains in zip(*(each.split(size) for each in batch), strict=True):
        width = max(1, int((relevant >= 0).sum(1).max()))
        found.append((points, numbers, *(each[:, :width] for each in (relevant, *gains))))
    assert len({batch[2].shape[1] for batch in found}) > 1
    return found


@pytest.mark.parametrize("with_gains", [False, True])
def test_judgments_are_as_wide_as_each_batch_and_process_needs(with_gains: bool) -> None:
    points, numbers, relevant = judged()
    gains = torch.randint(1, 5, relevant.shape).float()
    batches = in_batches((points, numbers, relevant, gains))
    whole, parts, others = (RetrievalQuality("judgments") for _ in range(3))
    kept = [(*batch[:3], None, batch[3] if with_gains else None) for batch in batches]
    whole.update(points, numbers, relevant, gains=gains if with_gains else None)
    for quality, mine in ((parts, kept[:2]), (others, kept[2:])):
        for batch in mine:
            quality.update(*batch)
    # Each process concatenates what it has, and gets what all have.
    ends = {
        name: [dim_zero_cat(getattr(q, name)) for q in (parts, others) if getattr(q, name)] for name in parts._defaults
    }
    for name, gathered in ends.items():
        setattr(parts, name, gathered)
    assert {k: float(v) for k, v in parts.compute().items()} == {k: float(v) for k, v in whole.compute().items()}


def test_a_document_that_is_named_twice_counts_once() -> None:
    points, numbers, relevant = judged()
    twice, gains = torch.cat([relevant, relevant[:, :2]], dim=1), torch.randint(2, 5, relevant.shape)
    assert measured(RetrievalQuality("judgments"), (points, numbers, twice)) == measured(
        RetrievalQuality("judgments"), (points, numbers, relevant)
    )
    less = torch.cat([gains, gains[:, :2] - 1], dim=1)  # the largest gain counts
    assert graded((points, numbers, twice), less) == graded((points, numbers, relevant), gains)


def test_the_best_ranking_does_not_end_with_a_small_index() -> None:
    """Two documents are left of five, three were judged to answer and none of the others was ever to be found."""
    points, missing = torch.eye(6)[[0, 1, 0]], torch.tensor([0, 1, 7, 8, 9])
    relevant = torch.full((3, 5), -1)
    relevant[2] = missing
    found = measured(RetrievalQuality("judgments"), (points, torch.tensor([0, 1, -1]), relevant))
    best = sum(1 / math.log2(i + 2) for i in range(5))
    assert found["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3)) / best)
    with_gains = graded((points, torch.tensor([0, 1, -1]), relevant), torch.full((3, 5), 2))
    assert with_gains["ndcg_graded@10"] == pytest.approx(found["ndcg@10"])


def test_a_relevant_document_that_is_not_in_the_index_counts_as_missed() -> None:
    points = torch.eye(3)[[0, 1, 0]]
    relevant = torch.tensor([[-1, -1], [-1, -1], [0, 99]])
    found = measured(RetrievalQuality("judgments"), (points, torch.tensor([0, 1, -1]), relevant))
    assert found == {"ndcg@10": pytest.approx(1 / (1 + 1 / math.log2(3))), "mrr@10": 1.0, "recall@100": 0.5}


@pytest.mark.parametrize("left", ["documents", "queries", "judged"])
def test_no_documents_or_no_judged_queries_are_nan(left: str) -> None:
    points, numbers, relevant = judged()
    keep = {"documents": numbers >= 0, "queries": numbers < 0, "judged": (relevant < 0).all(1)}[left]
    found = measured(RetrievalQuality("judgments"), (points[keep], numbers[keep], relevant[keep]))
    assert all(math.isnan(value) for value in found.values())


# Grades


def graded(batch: tuple[Tensor, Tensor, Tensor], gains: Tensor, **settings: Any) -> dict[str, float]:
    quality = RetrievalQuality("judgments", **settings)
    quality.update(*batch, gains=gains)
    return {name: float(value) for name, value in quality.compute().items()}


def test_gains_of_one_query_by_hand() -> None:
    """The documents are found in the order of their numbers; the best one is the third, the next best the first."""
    points = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [1.0, 0.0]])
    relevant = torch.full((5, 3), -1)
    relevant[4, :2] = torch.tensor([0, 2])
    gains = torch.full((5, 3), 9)  # what stands where there is no judgment is not read
    gains[4, :2] = torch.tensor([1, 4])
    batch = (points, torch.tensor([0, 1, 2, 3, -1]), relevant)
    found = graded(batch, gains)
    # 1 at the first rank and 4 at the third, over 4 at the first and 1 at the second
    assert found.pop("ndcg_graded@10") == pytest.approx((1 + 4 / 2) / (4 + 1 / math.log2(3)))
    assert found == measured(RetrievalQuality("judgments"), batch)  # the others are of what is relevant or not
    assert found["ndcg@10"] == pytest.approx((1 + 1 / 2) / (1 + 1 / math.log2(3)))
    assert graded(batch, gains, cutoff=2)["ndcg_graded@2"] == pytest.approx(1 / (4 + 1 / math.log2(3)))


def test_gains_as_torchmetrics_and_sklearn_measure_each_query() -> None:
    points, numbers, relevant = judged()
    gains = torch.randint(1, 5, relevant.shape)
    found = graded((points, numbers, relevant), gains)
    unit, documents = F.normalize(points), numbers >= 0
    by_torchmetrics, by_sklearn = [], []
    for query in torch.nonzero((numbers < 0) & (relevant >= 0).any(1)).flatten():
        scores = unit[documents] @ unit[query]
        worth = torch.zeros(int(documents.sum()), dtype=torch.long)
        for number, gain in zip(relevant[query].tolist(), gains[query].tolist(), strict=True):
            worth[numbers[documents] == number] = gain
        by_torchmetrics.append(float(retrieval_normalized_dcg(scores, worth, top_k=10)))
        by_sklearn.append(ndcg_score(worth[None].numpy(), scores[None].numpy(), k=10))
    assert len(by_sklearn) == 5
    assert found["ndcg_graded@10"] == pytest.approx(sum(by_torchmetrics) / 5)
    assert found["ndcg_graded@10"] == pytest.approx(sum(by_sklearn) / 5)
    assert found["ndcg_graded@10"] != pytest.approx(found["ndcg@10"])


def test_gains_that_are_all_alike_are_no_grades() -> None:
    batch = judged()
    found = graded(batch, torch.full_like(batch[2], 3))
    assert found["ndcg_graded@10"] == pytest.approx(found["ndcg@10"])


def test_gains_with_nothing_to_find_are_nan() -> None:
    points, numbers, relevant = (each[:3] for each in judged())
    found = graded((points, torch.full_like(numbers, -1), relevant), torch.ones_like(relevant))
    assert math.isnan(found["ndcg_graded@10"])


def test_documents_need_no_gains_and_queries_all_or_none() -> None:
    points, numbers, relevant = judged()
    gains, query = torch.randint(1, 5, relevant.shape), numbers < 0
    quality = RetrievalQuality("judgments")
    quality.update(points[~query], numbers[~query], relevant[~query, :1])
    quality.update(points[query], numbers[query], relevant[query], gains=gains[query])
    of_all = graded((points, numbers, relevant), gains)
    assert {k: float(v) for k, v in quality.compute().items()} == {k: pytest.approx(v) for k, v in of_all.items()}
    quality.update(points[query][:2], numbers[query][:2], relevant[query][:2].clamp(min=1))
    with pytest.raises(ValueError, match="the judgments of 2 of 7 queries have no gains, and others have"):
        quality.compute()


@pytest.mark.parametrize("gains", [torch.ones(36), torch.ones(36, 4), [1.0] * 36], ids=["flat", "short", "list"])
def test_gains_are_in_the_places_of_what_is_relevant(gains: Any) -> None:
    with pytest.raises(ValueError, match=r"gains are numbers \(36, 5\), one in the place of each of relevant; got"):
        graded(judged(), gains)


@pytest.mark.parametrize("gain", [0.0, -1.0, math.nan])
def test_gains_of_what_is_relevant_are_positive(gain: float) -> None:
    batch = judged()
    with pytest.raises(ValueError, match=r"gains of what is relevant are positive numbers, got"):
        graded(batch, torch.full(batch[2].shape, gain))


# Search


def test_an_exact_index_of_faiss_finds_what_torch_finds() -> None:
    queries, items = embeddings(11, 16), embeddings(300, 16)
    assert torch.equal(search(queries, items, 5, index="Flat"), search(queries, items, 5))


@pytest.mark.parametrize("index", ["HNSW16", "IVF4,Flat"])
def test_metrics_are_of_what_an_approximate_index_finds(index: str) -> None:
    points, labels = embeddings(400, 16), torch.arange(400) % 10
    exact = measured(RetrievalQuality(), (points, labels))["recall@5"]
    assert 0.3 * exact < measured(RetrievalQuality(index=index), (points, labels))["recall@5"] <= 1
