import subprocess
import sys

import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.ops import box_iou, masks_to_boxes

from lightning_kd.data import BoxScenes, MaskScenes
from lightning_kd.data.scenes import SPLITS, compose


def test_scenes_are_decided_by_their_arguments() -> None:
    first, again, other = compose(4, seed=1), compose(4, seed=1), compose(4, seed=2)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.masks, again.masks)
    assert not torch.equal(first.images, other.images)


def test_shapes_and_types() -> None:
    scenes = compose(5, seed=0, size=48)
    assert (scenes.images.shape, scenes.images.dtype) == ((5, 3, 48, 48), torch.uint8)
    assert (scenes.masks.shape, scenes.masks.dtype) == ((5, 48, 48), torch.uint8)
    for boxes, labels in zip(scenes.boxes, scenes.labels, strict=True):
        assert boxes.shape == (len(labels), 4)
        assert boxes.dtype == torch.float32
        assert labels.dtype == torch.int64


def test_boxes_are_tight_around_the_visible_ink() -> None:
    scenes = compose(60, seed=3, overlap=0.0)
    for mask, boxes, labels in zip(scenes.masks, scenes.boxes, scenes.labels, strict=True):
        alone = [i for i in range(len(labels)) if (labels == labels[i]).sum() == 1]
        assert set((labels + 1).tolist()) == set(mask.unique().tolist()) - {0}
        for i in alone:
            box = masks_to_boxes((mask == labels[i] + 1)[None])[0]
            assert torch.equal(boxes[i], box + torch.tensor([0, 0, 1, 1]))  # torchvision names the last pixel


def test_digits_hardly_overlap_and_the_bound_is_kept() -> None:
    for boxes in compose(80, seed=4, overlap=0.1).boxes:
        assert (box_iou(boxes, boxes).fill_diagonal_(0) <= 0.1).all()


def test_every_digit_is_in_exactly_one_split() -> None:
    indices = [i for part in SPLITS.values() for i in range(1797)[part]]
    assert sorted(indices) == list(range(len(load_digits().target)))
    assert {int(k) for labels in compose(200, 0, "val").labels for k in labels} == set(range(10))


def test_ink_stands_out_of_its_background() -> None:
    scenes = compose(50, seed=5, noise=0.0)
    for image, mask in zip(scenes.images.float() / 255, scenes.masks, strict=True):
        ink = mask > 0
        away = (image[:, ink].mean(dim=1) - image[:, ~ink].mean(dim=1)).abs().mean()
        assert away > 0.1


def test_a_scene_without_digits_has_no_boxes() -> None:
    scenes = compose(2, seed=0, digits=(0, 0))
    assert scenes.boxes[0].shape == (0, 4)
    assert scenes.labels[0].shape == (0,)
    assert not scenes.masks.any()


def test_fewer_kinds_are_the_first_ones_and_the_data_say_so() -> None:
    scenes = compose(40, 0, digits=(5, 8), scale=(1.5, 2.5), kinds=3)
    assert {int(k) for labels in scenes.labels for k in labels} == {0, 1, 2}
    masks = MaskScenes(4, 12, 4, 4, kinds=3, digits=(5, 8), scale=(1.5, 2.5))
    boxes = BoxScenes(12, 4, 4, kinds=3, digits=(5, 8), scale=(1.5, 2.5))
    assert (masks.num_classes, masks.class_names) == (4, ("background", "0", "1", "2"))
    assert (boxes.num_classes, boxes.class_names) == (3, ("0", "1", "2"))
    for data in (masks, boxes):
        data.setup("fit")
    (_, of_masks), (_, of_boxes) = next(iter(masks.val_dataloader())), next(iter(boxes.val_dataloader()))
    for mask, target in zip(of_masks, of_boxes, strict=True):
        assert set(mask.unique().tolist()) == {0, *(target["labels"] + 1).tolist()}
        assert 5 <= len(target["labels"]) <= 8


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"split": "dev"}, "expected one of train, val, test"),
        ({"size": 24}, "fit into size=24"),
        ({"digits": (3, 2)}, "fewest"),
        ({"scale": (4.0, 2.0)}, "smallest <= largest"),
        ({"kinds": 11}, "kinds: expected from 1 to 10"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        compose(1, 0, **wrong)  # type: ignore[arg-type]


def test_without_scikit_learn_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from lightning_kd.data.scenes import compose\n"
        "try: compose(1, 0)\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 'pip install "lightning-kd[segmentation]"' in told
