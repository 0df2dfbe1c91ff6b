import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_kd.tasks import Detection
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lightning_kd.data import BoxScenes, CocoJson, VocFolder, scenes

OBJECTS = {
    "a": [("cat", (2, 3, 20, 30), 0), ("dog", (5, 5, 60, 40), 1)],
    "b": [("cat", (7, 7, 7, 7), 0), ("cat", (0, 0, 10, 10), 0)],  # a point
    "c": [],
}


def picture(path: Path, size: tuple[int, int] = (80, 60)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    for name, objects in OBJECTS.items():
        picture(tmp_path / "JPEGImages" / f"{name}.{'png' if name == 'a' else 'jpg'}")
        root = ET.Element("annotation")
        for kind, corners, difficult in objects:
            each = ET.SubElement(root, "object")
            ET.SubElement(each, "name").text = kind
            ET.SubElement(each, "difficult").text = str(difficult)
            box = ET.SubElement(each, "bndbox")
            for side, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
                ET.SubElement(box, side).text = str(value)
        (tmp_path / "Annotations").mkdir(exist_ok=True)
        ET.ElementTree(root).write(tmp_path / "Annotations" / f"{name}.xml")
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for split, names in {"train": "a\nb\nc\n", "val": "a  1\nb -1\n\n", "test": "c\n"}.items():
        (lists / f"{split}.txt").write_text(names)
    return tmp_path


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    annotations, names = [], {"cat": 18, "dog": 3}
    for number, objects in enumerate(OBJECTS.values()):
        for kind, (x1, y1, x2, y2), crowd in objects:
            annotations.append(
                {"image_id": number, "category_id": names[kind], "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": crowd}
            )
    for name in OBJECTS:
        picture(tmp_path / "images" / f"{name}.jpg")
    content = {
        "images": [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate(OBJECTS)],
        "categories": [{"id": number, "name": name} for name, number in names.items()],
        "annotations": annotations,
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    return tmp_path


def first_batch(loader: DataLoader[Any]) -> Any:
    return next(iter(loader))


def test_pascal_voc(voc: Path) -> None:
    data = VocFolder(str(voc), batch_size=2)
    assert data.classes == ["cat", "dog"]
    assert data.num_classes == 2
    data.setup("fit")
    images, targets = first_batch(data.val_dataloader())
    assert [tuple(image.shape) for image in images] == [(3, 60, 80)] * 2
    assert type(images[0]) is torch.Tensor
    expected = np.asarray(Image.open(voc / "JPEGImages" / "a.png"), dtype=np.float32) / 255
    np.testing.assert_allclose(images[0].permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert type(targets[0]["boxes"]) is torch.Tensor
    assert targets[0]["boxes"].tolist() == [[2, 3, 20, 30], [5, 5, 60, 40]]
    assert targets[0]["labels"].tolist() == [0, 1]
    assert targets[0]["ignore"].tolist() == [False, True]
    assert targets[1]["boxes"].tolist() == [[0, 0, 10, 10]]  # without the point
    (images, targets) = first_batch(data.test_dataloader())
    assert targets[0]["boxes"].shape == (0, 4)


def test_coco(coco: Path) -> None:
    data = CocoJson(str(coco), train="all.json", val="all.json", batch_size=3)
    assert data.classes == ["dog", "cat"]  # by their ids
    data.setup("fit")
    _, targets = first_batch(data.val_dataloader())
    assert targets[0]["boxes"].tolist() == [[2, 3, 20, 30], [5, 5, 60, 40]]
    assert targets[0]["labels"].tolist() == [1, 0]
    assert targets[0]["ignore"].tolist() == [False, True]
    assert [len(target["boxes"]) for target in targets] == [2, 1, 0]
    named = CocoJson(str(coco), train="all.json", val="all.json", classes=["cat", "dog"])
    named.setup("test")
    assert first_batch(named.test_dataloader())[1][0]["labels"].tolist() == [0, 1]


def test_boxes_without_an_area_are_counted(voc: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = VocFolder(str(voc))
    for name in ("lightning.pytorch", "lightning.fabric"):  # a comparison before silences them
        caplog.set_level("INFO", logger=name)
    data.setup("fit")
    data.setup("test")
    said = [record.message for record in caplog.records if "without an area" in record.message]
    assert said == [
        "train: boxes without an area are left out: 1 (b.jpg)",
        "val: boxes without an area are left out: 1 (b.jpg)",
    ]


def test_boxes_follow_the_transforms(voc: Path) -> None:
    crop = v2.Lambda(lambda image: image)
    data = VocFolder(str(voc), resize=(30, 80), transforms=[v2.RandomHorizontalFlip(p=1.0), crop], batch_size=3)
    data.setup("fit")
    image, target = data.splits["train"][0]
    assert image.shape == (3, 30, 80)
    torch.testing.assert_close(target["boxes"], torch.tensor([[60.0, 1.5, 78.0, 15.0], [20.0, 2.5, 75.0, 20.0]]))
    assert data.splits["val"][0][1]["boxes"][0].tolist() == [2, 1.5, 20, 15]  # only training images are flipped


def test_what_a_crop_leaves_out_is_gone(voc: Path) -> None:
    class Corner(torch.nn.Module):
        def forward(self, image: Any, target: Any) -> Any:
            boxes = v2.functional.crop(target["boxes"], 0, 0, 60, 4)
            return v2.functional.crop(image, 0, 0, 60, 4), {**target, "boxes": boxes}

    data = VocFolder(str(voc), transforms=[Corner()])
    data.setup("fit")
    _, target = data.splits["train"][0]
    assert target["boxes"].tolist() == [[2, 3, 4, 30]]
    assert target["labels"].tolist() == [0]


# What is wrong with files


def test_an_unknown_class_is_named_with_its_file(voc: Path, coco: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.xml, object 1: the class 'dog' is none of classes: cat, bird"):
        VocFolder(str(voc), classes=["cat", "bird"]).setup("fit")
    with pytest.raises(ValueError, match=r"all\.json, annotations\[1\]: the class 'dog' is none of classes: cat"):
        CocoJson(str(coco), train="all.json", val="all.json", classes=["cat"]).setup("fit")


def test_a_truncated_image_is_named(voc: Path) -> None:
    whole = (voc / "JPEGImages" / "b.jpg").read_bytes()
    (voc / "JPEGImages" / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (voc / "JPEGImages" / "c.jpg").write_text("no image at all")
    data = VocFolder(str(voc))
    data.setup("fit")
    for index in (1, 2):
        with pytest.raises(ValueError, match=rf"{'abc'[index]}\.jpg cannot be read as an image"):
            data.splits["train"][index]


def test_missing_files_are_named(voc: Path, coco: Path) -> None:
    (voc / "JPEGImages" / "c.jpg").unlink()
    data = VocFolder(str(voc))
    data.setup("fit")
    with pytest.raises(FileNotFoundError, match=r"no image at .*c\.jpg"):
        data.splits["train"][2]
    with pytest.raises(FileNotFoundError, match=r"no list of images at .*minival\.txt"):
        VocFolder(str(voc), splits=("train", "minival", "test")).setup("fit")
    (voc / "Annotations" / "c.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"no annotation at .*c\.xml"):
        VocFolder(str(voc)).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"no annotations at .*other\.json"):
        CocoJson(str(coco), train="other.json", val="all.json").setup("fit")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<xmin>2</xmin>", "<xmin>two</xmin>", r"a\.xml, object 0: expected numbers in bndbox"),
        ("<xmin>2</xmin>", "", r"a\.xml, object 0: there is no bndbox/xmin"),
        ("<name>cat</name>", "<name> </name>", r"a\.xml, object 0: there is no name"),
        ("</annotation>", "", r"a\.xml is not XML"),
    ],
)
def test_broken_xml(voc: Path, old: str, new: str, message: str) -> None:
    path = voc / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        VocFolder(str(voc), classes=["cat", "dog"]).setup("fit")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("annotations", [{"image_id": 0, "category_id": 3}], r"annotations\[0\]: there is no bbox"),
        ("annotations", [{"image_id": 7, "category_id": 3, "bbox": [0, 0, 1, 1]}], "no image with the id 7"),
        ("annotations", [{"image_id": 0, "category_id": 4, "bbox": [0, 0, 1, 1]}], "no category with the id 4"),
        ("annotations", [{"image_id": 0, "category_id": 3, "bbox": [0, 0, 1]}], "a bbox of four numbers"),
        ("annotations", {}, "annotations is missing"),
        ("images", [{"id": 0}], r"images\[0\]: there is no file_name"),
        ("categories", [3], r"categories\[0\]: there is no id"),
    ],
)
def test_broken_json(coco: Path, key: str, value: Any, message: str) -> None:
    path = coco / "all.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        CocoJson(str(coco), train="all.json", val="all.json").setup("fit")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"all\.json is not JSON"):
        CocoJson(str(coco), train="all.json", val="all.json").setup("fit")


def test_arguments(voc: Path, coco: Path) -> None:
    with pytest.raises(ValueError, match="expected different names"):
        VocFolder(str(voc), classes=["cat", "cat"])
    with pytest.raises(ValueError, match="one folder, or those of train, val and test"):
        CocoJson(str(coco), train="all.json", val="all.json", images=["a", "b"])
    few = VocFolder(str(voc), batch_size=4)
    few.setup("fit")
    with pytest.raises(ValueError, match=r"gives no batch: 3 images.*Lower batch_size"):
        few.train_dataloader()


# Scenes


def test_digit_scenes_are_those_of_the_composition() -> None:
    data = BoxScenes(train_size=3, val_size=2, test_size=2, size=48, batch_size=2)
    data.setup("fit")
    assert set(data.splits) == {"train", "val"}  # composed when they are needed
    images, targets = first_batch(data.val_dataloader())
    composed = scenes.compose(2, 1, "val", 48)
    assert torch.equal((images[1] * 255).round().to(torch.uint8), composed.images[1])
    assert torch.equal(targets[1]["boxes"], composed.boxes[1])
    assert torch.equal(targets[1]["labels"], composed.labels[1])
    data.setup("test")
    assert len(first_batch(data.test_dataloader())[0]) == 2


# Real blood cells


@pytest.mark.slow
def test_bccd(data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = data_dir / "bccd" / "BCCD"
    data = VocFolder(str(root), resize=(120, 160), batch_size=4)
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert data.classes == ["Platelets", "RBC", "WBC"]
    assert [len(data.splits[split]) for split in ("train", "val", "test")] == [205, 87, 72]
    dropped = [record.message for record in caplog.records if "without an area" in record.message]
    assert sum(int(message.split(": ")[2].split()[0]) for message in dropped) == 2
    named = " ".join(dropped)
    assert "BloodImage_00338" in named
    assert "BloodImage_00343" in named
    boxes = [record.boxes for split in data.splits.values() for record in split.records]
    assert sum(map(len, boxes)) == 4888 - 2
    task = Detection(data.num_classes)
    images, targets = first_batch(data.test_dataloader())
    perfect = [
        {**target, "labels": target["labels"] + 1, "scores": torch.ones(len(target["labels"]))} for target in targets
    ]
    metrics = task.metrics()
    task.update(metrics, perfect, (images, targets))
    assert float(metrics.compute()["mAP"]) == pytest.approx(1.0)
