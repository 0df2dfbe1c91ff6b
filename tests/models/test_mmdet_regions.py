"""LD's regions, against mmdet's own assignment and against loops over anchors in plain numbers."""

import statistics

import pytest
import torch
from torch import Tensor, nn

from lightning_kd.models.mmdet import MMDetModel
from lightning_kd.models.mmdet_regions import Regions

Box = tuple[float, float, float, float]
NARROW = {
    "backbone": {"depth": 18, "base_channels": 8, "stem_channels": 8},
    "neck": {"in_channels": [8, 16, 32, 64], "out_channels": 32},
    "bbox_head": {"in_channels": 32, "feat_channels": 32, "stacked_convs": 1},
}
BOXES = [[[10.0, 12.0, 60.0, 50.0], [80.0, 20.0, 150.0, 120.0]], [[30.0, 8.0, 60.0, 110.0]], []]
TARGETS = [
    {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.zeros(len(boxes), dtype=torch.int64)}
    for boxes in BOXES
]
HEIGHT, WIDTH = 128, 160


def detector(config: str) -> nn.Module:
    return MMDetModel(config, num_classes=3, overrides=NARROW)


@pytest.fixture(scope="module")
def gfl() -> nn.Module:
    return detector("gfl/gfl_r50_fpn_1x_coco")


@pytest.fixture(scope="module")
def levels(gfl: nn.Module) -> list[Tensor]:
    regions = Regions.of(gfl)
    assert regions is not None
    return regions(TARGETS, HEIGHT, WIDTH)


def test_there_is_a_map_for_each_level(levels: list[Tensor]) -> None:
    assert [tuple(level.shape) for level in levels] == [
        (3, 16, 20), (3, 8, 10), (3, 4, 5), (3, 2, 3), (3, 1, 2)
    ]  # fmt: skip


def test_the_main_region_is_what_mmdet_assigns(gfl: nn.Module, levels: list[Tensor]) -> None:
    from mmengine.structures import InstanceData  # noqa: PLC0415

    head = gfl.bbox_head
    metas = [{"img_shape": (HEIGHT, WIDTH), "pad_shape": (HEIGHT, WIDTH)}] * len(TARGETS)
    anchors, flags = head.get_anchors([level.shape[1:] for level in levels], metas, device="cpu")
    things = [InstanceData(bboxes=t["boxes"], labels=t["labels"]) for t in TARGETS]
    labels = head.get_targets(anchors, flags, things, metas)[1]
    main = [(of_level != head.num_classes).reshape(level.shape) for of_level, level in zip(labels, levels, strict=True)]
    assert sum(int(m.sum()) for m in main) > 5
    assert all(torch.equal(level == 1, m) for level, m in zip(levels, main, strict=True))


def anchor(x: int, y: int, stride: int) -> Box:
    """Of GFL: a square of eight strides around the upper left corner of its cell."""
    return (x * stride - 4 * stride, y * stride - 4 * stride, x * stride + 4 * stride, y * stride + 4 * stride)


def overlap(a: Box, b: Box) -> float:
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(wide, 0.0) * max(tall, 0.0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def distance(a: Box, b: Box) -> float:
    """Squared, of the centres."""
    return sum(((a[i] + a[i + 2] - b[i] - b[i + 2]) / 2) ** 2 for i in (0, 1))


def test_the_valuable_region_is_around_it(levels: list[Tensor]) -> None:
    places = [
        [anchor(x, y, 8 * 2**i) for y in range(level.shape[1]) for x in range(level.shape[2])]
        for i, level in enumerate(levels)
    ]
    found = [0, 0]
    for image, boxes in enumerate(BOXES[:1]):
        limits = []
        for box in boxes:
            near = [sorted(of_level, key=lambda a, box=box: distance(a, box))[:9] for of_level in places]
            candidates = [overlap(a, box) for of_level in near for a in of_level]
            limits.append(statistics.mean(candidates) + statistics.stdev(candidates))
        for of_level, level in zip(places, levels, strict=True):
            for a, weight in zip(of_level, level[image].flatten().tolist(), strict=True):
                worth = 0.0
                for box, limit in zip(boxes, limits, strict=True):
                    around = [(max if i > 1 else min)(a[i], box[i]) for i in range(4)]
                    diagonal = (around[2] - around[0]) ** 2 + (around[3] - around[1]) ** 2
                    if limit / 4 <= overlap(a, box) - distance(a, box) / diagonal < limit:
                        worth = max(worth, overlap(a, box) / 4)
                assert weight == pytest.approx(1.0 if weight == 1 else worth, abs=1e-5)
                found[int(weight == 1)] += weight > 0
    assert min(found) > 3


def test_an_image_without_boxes_has_no_region(levels: list[Tensor]) -> None:
    assert not any(level[2].any() for level in levels)


def test_heads_that_assign_otherwise_have_none() -> None:
    assert Regions.of(detector("retinanet/retinanet_r18_fpn_1x_coco")) is None
    assert Regions.of(nn.Linear(1, 1)) is None
