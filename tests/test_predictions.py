import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning_kd.tasks import Detection, Segmentation
from PIL import Image
from project import QUIET
from pycocotools.coco import COCO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_kd import DistillationModule
from lightning_kd.cli.errors import UsageError
from lightning_kd.cli.save_predictions import SavePredictions
from lightning_kd.data import BoxScenes, CocoJson, ImageMaskFolder
from lightning_kd.predictions import LabelMaps


def predict(module: L.LightningModule, data: L.LightningDataModule, output: Path) -> None:
    run = L.Trainer(callbacks=[SavePredictions(output)], **QUIET)
    run.predict(module, datamodule=data, return_predictions=False)


class Brightness(nn.Module):
    """Says of each pixel whether it is bright."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([-images[:, 0], images[:, 0]], dim=1)


@pytest.fixture
def masks(tmp_path: Path) -> ImageMaskFolder:
    """Images of 12 x 20 pixels, padded to 32 x 32, whose class is their brightness."""
    rng = np.random.default_rng(0)
    for name in ("b", "a", "c"):
        mask = rng.integers(0, 2, (12, 20), dtype=np.uint8)
        for folder, pixels in (("test", mask * 255), ("testannot", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).convert("RGB" if folder == "test" else "L").save(tmp_path / folder / f"{name}.png")
    return ImageMaskFolder(str(tmp_path), 2, multiple=32, batch_size=2)


def test_label_maps_have_the_images_names_and_size(masks: ImageMaskFolder, tmp_path: Path) -> None:
    predict(DistillationModule(Segmentation(2), Brightness()), masks, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "c.png"]
    for name in "abc":
        found, truth = (np.array(Image.open(tmp_path / folder / f"{name}.png")) for folder in ("out", "testannot"))
        assert np.array_equal(found, truth)
    for wrong, told in (("a.json", "expected a folder"), ("file", "received the file")):
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match=told):
            predict(DistillationModule(Segmentation(2), Brightness()), masks, tmp_path / wrong)
    predict(DistillationModule(Segmentation(2), Brightness()), masks, tmp_path / "all.pt")
    assert torch.load(tmp_path / "all.pt", weights_only=True).shape == (3, 32, 32)


def test_labels_beyond_a_byte_and_several_labels(tmp_path: Path) -> None:
    maps = LabelMaps(["sky", "tree"])
    maps.open(tmp_path)
    many = torch.randint(1000, (1, 4, 5))
    maps.add(many, [7], [(4, 5)], None)
    several = torch.randint(2, (1, 2, 4, 5)).to(torch.uint8)
    maps.add(several, [8], [(4, 5)], None)
    assert np.array_equal(np.array(Image.open(tmp_path / "000007.png")), many[0].numpy())
    for k, name in enumerate(("sky", "tree")):
        assert np.array_equal(np.array(Image.open(tmp_path / f"000008_{name}.png")), several[0, k].numpy())


class Corner(nn.Module):
    """Finds the upper left quarter of each image."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        each = [image.shape[-2:] for image in images]
        boxes = [torch.tensor([[0.0, 0.0, width / 2, height / 2]]) for height, width in each]
        return [{"boxes": box, "scores": torch.tensor([0.5]), "labels": torch.tensor([1])} for box in boxes]


def test_boxes_are_cocos_results_in_pixels_of_the_files(tmp_path: Path) -> None:
    content: dict[str, Any] = {"info": {}, "images": [], "categories": [{"id": 18, "name": "cat"}], "annotations": []}
    for number, size in ((70, (80, 60)), (50, (40, 90))):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "images" / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png"})
        box = [0, 0, size[0] / 2, size[1] / 2]
        each = {"id": number, "image_id": number, "category_id": 18, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        content["annotations"].append(each)
    (tmp_path / "all.json").write_text(json.dumps(content))
    data = CocoJson(str(tmp_path), train="all.json", val="all.json", resize=32)
    predict(DistillationModule(Detection(1), Corner()), data, tmp_path / "found")
    results = COCO(tmp_path / "all.json").loadRes(str(tmp_path / "found.json"))
    for annotation in content["annotations"]:
        (found,) = results.loadAnns(results.getAnnIds(annotation["image_id"]))
        assert found["category_id"] == 18
        assert found["bbox"] == pytest.approx(annotation["bbox"], abs=1e-3)


def test_without_ids_images_are_counted(tmp_path: Path) -> None:
    data = BoxScenes(train_size=2, val_size=2, test_size=3, batch_size=2)
    predict(DistillationModule(Detection(10), Corner()), data, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(each["image_id"], each["category_id"], each["bbox"]) for each in found] == [
        (i, 0, [0.0, 0.0, 32.0, 32.0]) for i in range(3)
    ]


class OfDicts(Segmentation):
    """Knows what the model is called with, and not where images are to be looked for."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch["image"])

    def predict_batch(self, output: Any, batch: Any) -> Tensor:
        return self.predict(output)


def test_sizes_of_images_are_asked_for_where_they_are_written(tmp_path: Path) -> None:
    loader = DataLoader([{"image": torch.rand(3, 4, 5)} for _ in range(3)], batch_size=2)  # type: ignore[arg-type]
    module = DistillationModule(OfDicts(2), Brightness())
    run = L.Trainer(callbacks=[SavePredictions(tmp_path / "all.pt")], **QUIET)
    run.predict(module, loader, return_predictions=False)
    assert torch.load(tmp_path / "all.pt", weights_only=True).shape == (3, 4, 5)
    run = L.Trainer(callbacks=[SavePredictions(tmp_path / "maps")], **QUIET)
    with pytest.raises(ValueError, match=r"a dict with the keys 'image'\. .* override inputs\(\) of the task"):
        run.predict(module, loader, return_predictions=False)
