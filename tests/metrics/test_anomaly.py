import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from lightning_kd.metrics import AnomalyQuality
from lightning_kd.metrics.anomaly import aupro


def _example(size: int = 24, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    masks = torch.zeros(count, size, size, dtype=torch.bool)
    masks[0, 2:5, 2:5], masks[0, 12:20, 10:22], masks[2, 3, 3], masks[2, 4, 4] = True, True, True, True
    return masks + torch.randn(masks.shape), masks


def test_they_are_those_of_sklearn():
    maps, masks = _example()
    scores, labels = maps.flatten(1).amax(1), masks.flatten(1).any(1)
    metric = AnomalyQuality()
    for part in (slice(0, 2), slice(2, 6)):
        metric.update(maps[part], scores[part], masks[part], labels[part])
    found = metric.compute()
    assert float(found["image_auroc"]) == pytest.approx(roc_auc_score(labels, scores))
    assert float(found["pixel_auroc"]) == pytest.approx(roc_auc_score(masks.flatten(), maps.flatten()))
    best = max(f1_score(labels, scores >= threshold) for threshold in scores)
    assert float(found["image_f1"]) == pytest.approx(best)


def test_only_the_order_counts():
    """Scores beyond [0, 1] are not put through a sigmoid, which would make ties of large ones."""
    maps, masks = _example()
    labels = masks.flatten(1).any(1)
    first, second = AnomalyQuality(), AnomalyQuality()
    first.update(maps, maps.flatten(1).amax(1), masks, labels)
    second.update(1000 * maps + 500, 1000 * maps.flatten(1).amax(1) + 500, masks, labels)
    assert first.compute() == second.compute()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("steps", [None, 4])
def test_aupro_is_that_of_anomalib(limit: float, steps: int | None):
    """With few different values, too: all pixels of a threshold count at once."""
    metric = pytest.importorskip("anomalib.metrics.aupro")._AUPRO(fpr_limit=limit)
    maps, masks = _example()
    if steps:
        maps = (maps * steps).round() / steps
    metric.update(maps, masks)
    torch.testing.assert_close(aupro(maps, masks, limit), metric.compute(), rtol=1e-4, atol=1e-5)


def test_aupro_counts_small_regions_like_large_ones():
    masks = torch.zeros(1, 10, 10, dtype=torch.bool)
    masks[0, 0, 0], masks[0, 5:, 5:] = True, True
    found = torch.zeros(1, 10, 10)
    found[0, 5:, 5:] = 1.0  # all of the large one, before any false positive; the small one is found with the rest
    torch.testing.assert_close(aupro(found, masks, 1.0), torch.tensor(0.75))


def test_what_is_of_one_kind_is_not_a_number():
    metric = AnomalyQuality()
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    metric.update(masks.float(), torch.zeros(2), masks, torch.zeros(2, dtype=torch.bool))
    assert all(value.isnan() for value in metric.compute().values())


def test_sizes_that_differ_are_refused():
    metric = AnomalyQuality()
    masks, one = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(2)
    with pytest.raises(ValueError, match="must have one size"):
        metric.update(torch.zeros(2, 8, 8), one, masks, one)
    metric.update(torch.zeros(2, 4, 4), one, masks, one)
    with pytest.raises(ValueError, match="must have one size"):
        metric.update(torch.zeros(2, 8, 8), one, torch.zeros(2, 8, 8, dtype=torch.bool), one)


def test_what_is_not_a_number_is_refused_and_not_sorted_among_the_largest():
    """All maps not a number were an AUROC of 0.9 where the normal images came first."""
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[1:, 0, 0] = True
    for where in ("maps", "scores"):
        maps, scores = torch.rand(3, 4, 4), torch.rand(3)
        (maps[2] if where == "maps" else scores[2:])[...] = torch.nan
        metric = AnomalyQuality()
        metric.update(maps, scores, masks, masks.flatten(1).any(1))
        with pytest.raises(ValueError, match="of 1 of 3 images have values that are not numbers"):
            metric.compute()
