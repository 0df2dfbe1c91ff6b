import pytest
import torch
from scipy.ndimage import binary_dilation
from torch import Tensor

from lightning_kd.metrics.boundary_f1 import BoundaryF1, boundaries

SQUARE = torch.ones(3, 3).numpy()


def by_hand(preds: Tensor, target: Tensor, classes: int, tolerance: int) -> float:
    """Class by class with scipy's morphology; for images without ignored pixels."""

    def edge(mask: Tensor) -> Tensor:
        return torch.from_numpy(mask.numpy() & binary_dilation(~mask.numpy(), SQUARE))

    def grown(mask: Tensor) -> Tensor:
        return torch.from_numpy(binary_dilation(mask.numpy(), SQUARE, iterations=tolerance)) if tolerance else mask

    scores = []
    for k in range(classes):
        said = [edge(p == k) for p in preds]
        true = [edge(t == k) for t in target]
        n_said, n_true = sum(int(s.sum()) for s in said), sum(int(t.sum()) for t in true)
        if n_said + n_true == 0:
            continue
        right = sum(int((s & grown(t)).sum()) for s, t in zip(said, true, strict=True))
        found = sum(int((t & grown(s)).sum()) for s, t in zip(said, true, strict=True))
        precision, recall = right / max(n_said, 1), found / max(n_true, 1)
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return sum(scores) / len(scores)


def blobs(n: int, classes: int, size: int = 24) -> Tensor:
    coarse = torch.rand(n, classes, 4, 5)
    return torch.nn.functional.interpolate(coarse, size=(size, size + 6), mode="bilinear").argmax(1)


@pytest.mark.parametrize("tolerance", [0, 1, 3])
def test_boundary_f1_is_scipys_morphology(tolerance: int) -> None:
    target, preds = blobs(5, 4), blobs(5, 4)
    metric = BoundaryF1(4, tolerance)
    for i in (slice(0, 2), slice(2, 5)):
        metric.update(preds[i], target[i])
    assert float(metric.compute()) == pytest.approx(by_hand(preds, target, 4, tolerance))


def test_the_truth_is_perfect_and_a_shift_within_the_tolerance_is_too() -> None:
    target = torch.zeros(1, 16, 16, dtype=torch.long)
    target[:, 4:10, 4:10] = 1
    for shift, tolerance in ((0, 0), (2, 2)):
        metric = BoundaryF1(2, tolerance)
        metric.update(target.roll(shift, dims=2), target)
        assert float(metric.compute()) == 1.0
    strict = BoundaryF1(2, 1)
    strict.update(target.roll(3, dims=2), target)
    assert float(strict.compute()) < 0.8


def test_ignored_pixels_make_no_boundary_and_hide_none() -> None:
    target = torch.zeros(1, 8, 8, dtype=torch.long)
    target[:, :, 4:] = 255
    assert not boundaries(target, 2, target != 255).any()
    metric = BoundaryF1(2, 1, ignore_index=255)
    preds = torch.zeros_like(target)
    preds[:, :, 6:] = 1  # inside of what does not count
    metric.update(preds, target)
    assert metric.counts.sum() == 0
    assert metric.compute().isnan()


def test_a_negative_tolerance_is_refused() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        BoundaryF1(2, -1)
