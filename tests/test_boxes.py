import math
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from lightning_kd import boxes

Images = list[dict[str, Tensor]]


def some_images(count: int = 12) -> tuple[Images, Images]:
    """Truth, and detections of it: moved, missed, of another class, invented."""
    found, targets = [], []
    for i in range(count):
        corner = 60 * torch.rand(i % 5, 2)
        truth = torch.cat([corner, corner + 5 + 140 * torch.rand(i % 5, 1) * (1 - torch.rand(i % 5, 2) / 4)], dim=1)
        labels = torch.randint(3, (i % 5,))
        targets.append({"boxes": truth, "labels": labels, "ignore": torch.rand(i % 5) < 0.2})
        moved = torch.cat([truth + 3 * torch.randn(i % 5, 4), torch.tensor([[1.0, 2.0, 30.0, 40.0]])])
        said = torch.cat([labels, torch.tensor([i % 3])])
        found.append({"boxes": moved, "labels": said, "scores": torch.rand(len(said))})
    return found, targets


def by_pycocotools(found: Images, targets: Images) -> dict[str, float]:
    """COCO's own evaluation, on dicts in its own format."""
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, (one, target) in enumerate(zip(found, targets, strict=True)):
        truth, said = ({key: value.tolist() for key, value in image.items()} for image in (target, one))
        for box, label, crowd in zip(truth["boxes"], truth["labels"], truth["ignore"], strict=True):
            x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": label, "bbox": [x, y, w, h]}
                | {"area": w * h, "iscrowd": int(crowd)}
            )
        for box, label, score in zip(said["boxes"], said["labels"], said["scores"], strict=True):
            x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
            results.append({"image_id": number, "category_id": label, "bbox": [x, y, w, h], "score": score})
    coco = COCO()
    categories = [{"id": i, "name": str(i)} for i in range(3)]
    images = [{"id": i} for i in range(len(targets))]
    coco.dataset = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
    coco.createIndex()
    judge = COCOeval(coco, coco.loadRes(results), iouType="bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    names = ("mAP", "mAP50", "mAP75", "mAP/small", "mAP/medium", "mAP/large")
    return dict(zip(names, judge.stats[:6].tolist(), strict=True))


def test_average_precision_is_that_of_pycocotools() -> None:
    found, targets = some_images()
    metrics = boxes.metrics()
    for i in range(0, len(found), 5):
        metrics.update(found[i : i + 5], targets[i : i + 5])
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert 0.05 < values["mAP"] < values["mAP50"] < 1.0
    assert len({*values.values()}) == 6
    assert values == pytest.approx(by_pycocotools(found, targets), abs=1e-6)


def test_what_is_to_be_ignored_counts_neither_as_missed_nor_as_wrong() -> None:
    box, other = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 90.0, 90.0]
    target = {"boxes": torch.tensor([box, other]), "labels": torch.tensor([0, 0])}
    missed = {"boxes": torch.tensor([box]), "labels": torch.tensor([0]), "scores": torch.tensor([0.9])}
    both = {key: torch.cat([missed[key]] * 2) for key in missed} | {"boxes": torch.tensor([other, box])}
    ignored = {**target, "ignore": torch.tensor([False, True])}
    for found, truth, expected in ((missed, target, 0.5), (missed, ignored, 1.0), (both, ignored, 1.0)):
        metric = boxes.AveragePrecision()
        metric.update([found], [truth])
        assert float(metric.compute()["mAP"]) == pytest.approx(expected, abs=0.01)


def test_sizes_that_are_not_there_have_no_score() -> None:
    box = {"boxes": torch.tensor([[0.0, 0.0, 50.0, 50.0]]), "labels": torch.tensor([0])}
    metric = boxes.AveragePrecision()
    metric.update([{**box, "scores": torch.tensor([0.9])}], [box])
    values = {name: float(value) for name, value in metric.compute().items()}
    assert values.pop("mAP/medium") == pytest.approx(1.0, abs=1e-6)
    assert [name for name, value in values.items() if math.isnan(value)] == ["mAP/small", "mAP/large"]


def test_without_a_box_to_find_it_is_not_a_number_and_a_reset_forgets() -> None:
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    metrics = boxes.metrics()
    metrics.update([{**nothing, "scores": torch.zeros(0)}], [nothing])
    assert all(value.isnan() for value in metrics.compute().values())
    metrics.reset()
    found, targets = some_images()
    metrics.update(found, targets)
    first = metrics.compute()
    fresh = boxes.metrics()
    fresh.update(found, targets)
    assert first == fresh.compute()


@pytest.mark.parametrize(
    ("shape", "labels"), [((3,), (3,)), ((3, 5), (3,)), ((3, 4), (2,)), ((0,), (0,)), ((3, 4), (3, 1))]
)
def test_targets_of_another_shape_are_refused(shape: tuple[int, ...], labels: tuple[int, ...]) -> None:
    target = {"boxes": torch.zeros(shape), "labels": torch.zeros(labels, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"boxes \(n, 4\) and labels \(n,\)"):
        boxes.checked(target, num_classes=3)


def test_labels_of_floats_and_boxes_of_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"whole numbers, also where there are none.*got torch\.float32"):
        boxes.checked({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}, num_classes=3)
    broken = {"boxes": torch.tensor([[0.0, 0.0, 5.0, math.nan]]), "labels": torch.tensor([1])}
    with pytest.raises(ValueError, match=r"boxes that are no numbers: \[\[0\.0, 0\.0, 5\.0, nan\]\]"):
        boxes.checked(broken, num_classes=3)


@pytest.mark.parametrize("wrong", [-1, 3, 90])
def test_unknown_classes_are_refused_by_number(wrong: int) -> None:
    target = {"boxes": torch.tensor([[0.0, 0.0, 5.0, 5.0]] * 2), "labels": torch.tensor([0, wrong])}
    with pytest.raises(ValueError, match=rf"has the classes \[{wrong}\], and the task num_classes=3"):
        boxes.checked(target, num_classes=3)


def test_fractions_are_of_the_padded_batch() -> None:
    targets = [
        {"boxes": torch.tensor([[10.0, 20.0, 30.0, 40.0]])},  # of an image that is halved
        {"boxes": torch.tensor([[0.0, 0.0, 70.0, 500.0]])},  # reaches out of its image and of the batch
        {"boxes": torch.zeros(0, 4)},
    ]
    found = boxes.fractions(targets, [(100, 80), (60, 70), (9, 9)], [(50, 40), (60, 70), (9, 9)], divisor=32)
    torch.testing.assert_close(found[0], torch.tensor([[5 / 96, 10 / 64, 15 / 96, 20 / 64]]))
    torch.testing.assert_close(found[1], torch.tensor([[0.0, 0.0, 70 / 96, 1.0]]))
    assert found[2].shape == (0, 4)
