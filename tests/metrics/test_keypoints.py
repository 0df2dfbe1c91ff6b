import math

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


def test_a_threshold_is_positive() -> None:
    with pytest.raises(ValueError, match="positive fraction of the scale"):
        PCK(0.0)
