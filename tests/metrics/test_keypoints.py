import math
from typing import Any

import pytest
import torch

from lightning_kd.metrics.keypoints import PCK, KeypointPrecision, NormalizedError


def test_error_and_fraction_are_those_of_a_loop_over_images_and_joints() -> None:
    points, predicted = 10 * torch.rand(6, 5, 2), 10 * torch.rand(6, 5, 2)
    counted, scale = torch.rand(6, 5) < 0.6, torch.tensor([3.0, 5.0, 7.0, 9.0, 11.0, 0.0])
    counted[1] = False
    points[~counted] = torch.nan
    error, pck = NormalizedError(), PCK(0.5)
    for part in (slice(0, 2), slice(2, None)):
        for metric in (error, pck):
            metric.update(predicted[part], points[part], counted[part], scale[part])
    images, joints = [], []
    for n in (0, 2, 3, 4):
        found = [math.dist(predicted[n, k], points[n, k]) / float(scale[n]) for k in range(5) if counted[n, k]]
        images += [sum(found) / len(found)] if found else []
        joints += found
    assert float(error.compute()) == pytest.approx(sum(images) / len(images), rel=1e-5)
    assert float(pck.compute()) == pytest.approx(sum(each <= 0.5 for each in joints) / len(joints))


def test_of_nothing_they_are_no_number() -> None:
    points, counted = torch.zeros(2, 3, 2), torch.zeros(2, 3, dtype=torch.bool)
    for metric in (NormalizedError(), PCK(0.1)):
        metric.update(points, points, counted, torch.ones(2))
        assert metric.compute().isnan()
    coco = KeypointPrecision([0.1] * 3)
    coco.update(points, points, counted, torch.ones(2, 3), torch.ones(2))
    assert all(value.isnan() for value in coco.compute().values())


@pytest.mark.parametrize(("similarity", "expected"), [(0.52, 0.1), (0.72, 0.5), (0.97, 1.0)])
def test_precision_counts_the_thresholds_below_the_similarity(similarity: float, expected: float) -> None:
    """With one person in each image, all of one similarity: OKS = exp(-d^2 / (2 area (2 sigma)^2))."""
    sigmas, area = torch.tensor([0.05, 0.1, 0.2]), torch.tensor([400.0, 900.0])
    distance = (-math.log(similarity) * 2 * area.unsqueeze(1) * (2 * sigmas) ** 2).sqrt()
    points, counted = 30 * torch.rand(2, 3, 2), torch.ones(2, 3, dtype=torch.bool)
    counted[1, 2] = False
    distance[1, 2] = 1e3
    predicted = points + torch.stack((distance, torch.zeros_like(distance)), dim=-1)
    metric = KeypointPrecision(sigmas.tolist())
    metric.update(predicted, points, counted, torch.rand(2, 3), area)
    found = metric.compute()
    assert float(found["oks_ap"]) == pytest.approx(expected)
    assert float(found["oks_ap50"]) == 1.0
    assert float(found["oks_ap75"]) == float(similarity > 0.75)


@pytest.mark.parametrize("area", [400.0, 0.0])
def test_images_with_nothing_to_find_are_no_false_positives(area: float) -> None:
    points, counted = 10 + 10 * torch.rand(4, 5, 2), torch.ones(4, 5, dtype=torch.bool)
    counted[2:] = False
    predicted, scores, areas = points.clone(), torch.full((4, 5), 0.5), torch.full((4,), 400.0)
    predicted[1] += 4.0  # so that there is a threshold that is not reached
    predicted[2:] += 500.0
    scores[2:], areas[2:] = 0.9, area
    metrics = KeypointPrecision([0.05] * 5), KeypointPrecision([0.05] * 5)
    for metric, part in zip(metrics, (slice(None), slice(0, 2)), strict=True):
        metric.update(predicted[part], points[part], counted[part], scores[part], areas[part])
    found, alone = (metric.compute() for metric in metrics)
    assert found == alone
    assert 0.5 < float(found["oks_ap"]) < 1


def test_an_image_without_an_area_is_not_measured() -> None:
    """One joint has no box around it, and a distance no unit."""
    points, counted = 10 * torch.rand(2, 3, 2), torch.ones(2, 3, dtype=torch.bool)
    metric = KeypointPrecision([0.1] * 3)
    metric.update(points + 1e-3, points, counted, torch.ones(2, 3), torch.tensor([0.0, 100.0]))
    assert float(metric.compute()["oks_ap"]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "metric", [NormalizedError(), PCK(0.1), KeypointPrecision([0.1] * 3)], ids=["nme", "pck", "oks"]
)
@pytest.mark.parametrize("wrong", ["counted", "uncounted"])
def test_places_that_are_no_numbers_are_not_measured(metric: Any, wrong: str) -> None:
    points, counted = 10 * torch.rand(2, 3, 2), torch.ones(2, 3, dtype=torch.bool)
    counted[1, 2] = False
    predicted = points.clone()
    predicted[1, 1 if wrong == "counted" else 2, 0] = torch.nan
    metric.reset()
    more = {"scores": torch.ones(2, 3), "area": torch.ones(2), "scale": torch.ones(2)}
    metric.update(predicted, points, counted, **metric._filter_kwargs(**more))
    if wrong == "counted":
        with pytest.raises(
            ValueError, match=r"the places.* of 1 of \d (images|joints) have values that are not numbers"
        ):
            metric.compute()
    else:
        value = metric.compute()  # of what does not count nobody asks
        value = value["oks_ap"] if isinstance(value, dict) else value
        assert float(value) == pytest.approx(float(metric.higher_is_better))


def test_a_threshold_is_positive() -> None:
    with pytest.raises(ValueError, match="positive fraction of the scale"):
        PCK(0.0)
