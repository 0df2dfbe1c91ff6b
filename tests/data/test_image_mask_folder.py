from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lightning_kd.data import MaskScenes
from lightning_kd.data.image_mask_folder import ImageMaskFolder

CAMVID = {"num_classes": 11, "ignore_index": 11}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images whose mask is where they are bright."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}annot").mkdir()
        for i in range(4):
            mask = rng.integers(0, 2, (12, 16), dtype=np.uint8)
            Image.fromarray(mask * 255).convert("RGB").save(tmp_path / split / f"{i}.png")
            Image.fromarray(mask).save(tmp_path / f"{split}annot" / f"{i}.png")
    return tmp_path


def first(data: ImageMaskFolder, stage: str = "fit") -> Any:
    data.setup(stage)
    loader = data.train_dataloader() if stage == "fit" else data.test_dataloader()
    return data.on_after_batch_transfer(next(iter(loader)), 0)


@pytest.mark.slow
def test_camvid_is_read_whole(data_dir: Path) -> None:
    data = ImageMaskFolder(str(data_dir / "camvid_half"), **CAMVID, batch_size=4)  # type: ignore[arg-type]
    data.setup("fit")
    data.setup("test")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 367, "val": 101, "test": 233}
    images, masks = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert images.shape == (4, 3, 180, 240)
    assert masks.shape == (4, 180, 240)
    assert masks.dtype == torch.int64
    seen = torch.cat([torch.bincount(data.splits["val"][i][1].flatten(), minlength=12)[None] for i in range(101)])
    assert (seen.sum(0) > 0).all()


def test_image_and_mask_are_transformed_alike(folder: Path) -> None:
    transform = v2.Compose([v2.RandomCrop((8, 8)), v2.RandomHorizontalFlip(0.5)])
    data = ImageMaskFolder(str(folder), 2, train_transform=transform, mean=(0.5,) * 3, std=(0.5,) * 3, batch_size=4)
    images, masks = first(data)
    assert images.shape == (4, 3, 8, 8)
    assert torch.equal((images[:, 0] > 0).long(), masks)
    assert images.unique().tolist() == [-1.0, 1.0]


@pytest.fixture
def albumentations(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks the internet for a newer version
    return pytest.importorskip("albumentations")


def test_albumentations_transform_image_and_mask_alike(albumentations: Any, folder: Path) -> None:
    a = albumentations
    turned = a.Affine(rotate=(-40, 40), interpolation=0, mask_interpolation=0, p=1.0)
    transform = a.Compose([turned, a.HorizontalFlip(p=0.5), a.RandomCrop(8, 8), a.Normalize((0.5,) * 3, (0.5,) * 3)])
    data = ImageMaskFolder(str(folder), 2, train_transform=transform, batch_size=4)
    images, masks = first(data)
    assert images.shape == (4, 3, 8, 8)
    assert masks.dtype == torch.int64
    assert torch.equal((images[:, 0] > 0).long(), masks)
    assert 0 < masks.float().mean() < 1
    assert images.unique().tolist() == [-1.0, 1.0]  # normalised once, by the transform


def test_albumentations_change_what_is_there(albumentations: Any, folder: Path) -> None:
    transform = albumentations.Compose([albumentations.HorizontalFlip(p=1.0)])
    data = ImageMaskFolder(str(folder), 2, transform=transform, mean=(0.5,) * 3, std=(0.5,) * 3)
    images, masks = first(data, "test")
    plain, truth = first(ImageMaskFolder(str(folder), 2, mean=(0.5,) * 3, std=(0.5,) * 3), "test")
    assert torch.equal(images, plain.flip(-1))
    assert torch.equal(masks, truth.flip(-1))


def test_images_that_are_floats_already_are_left_alone(folder: Path) -> None:
    data = ImageMaskFolder(str(folder), 2, transform=v2.ToDtype(torch.float32, scale=True))
    assert first(data, "test")[0].unique().tolist() == [0.0, 1.0]


def test_other_names(folder: Path) -> None:
    (folder / "train").rename(folder / "images")
    (folder / "trainannot").rename(folder / "labels")
    for file in list((folder / "labels").iterdir()):
        file.rename(file.with_stem(f"{file.stem}_L"))
    data = ImageMaskFolder(str(folder), 2, train="images", val="images", masks="labels", mask_suffix="_L", batch_size=2)
    assert first(data)[1].shape == (2, 12, 16)


def test_what_is_padded_does_not_count(folder: Path) -> None:
    data = ImageMaskFolder(str(folder), 2, ignore_index=9, multiple=10, mean=(0.0,) * 3, std=(1.0,) * 3)
    images, masks = first(data, "test")
    assert images.shape == (4, 3, 20, 20)
    assert torch.equal(images[:, 0, :12, :16].round().long(), masks[:, :12, :16])
    assert torch.equal(images[:, :, 15, :16], images[:, :, 11, :16])
    assert (masks[:, 12:] == 9).all()
    assert (masks[:, :, 16:] == 9).all()


def test_some_masks_can_be_hidden(folder: Path) -> None:
    data = ImageMaskFolder(str(folder), 2, labelled=0.5, batch_size=4)
    hidden = (first(data)[1] == -100).flatten(1)
    assert hidden.all(1).sum() == 2
    assert hidden.any(1).sum() == 2
    data.setup("test")
    assert not data.splits["test"].unlabelled


def test_a_cut_image_is_named(folder: Path) -> None:
    file = folder / "train" / "2.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"train/2\.png cannot be read"):
        first(ImageMaskFolder(str(folder), 2, batch_size=4))


def test_a_file_that_is_no_image_is_named(folder: Path) -> None:
    (folder / "trainannot" / "1.png").write_text("mask")
    with pytest.raises(ValueError, match=r"trainannot/1\.png cannot be read"):
        first(ImageMaskFolder(str(folder), 2, batch_size=4))


def test_a_missing_mask_is_named(folder: Path) -> None:
    (folder / "trainannot" / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no mask for .*train/3\.png \(1 of 4"):
        ImageMaskFolder(str(folder), 2).setup("fit")


def test_a_mask_of_another_size_is_named(folder: Path) -> None:
    Image.new("L", (16, 10)).save(folder / "trainannot" / "0.png")
    with pytest.raises(ValueError, match=r"train/0\.png has 12 x 16 pixels .* 10 x 16"):
        first(ImageMaskFolder(str(folder), 2, batch_size=4))


def test_a_class_that_there_is_not_is_named(folder: Path) -> None:
    Image.new("L", (16, 12), 7).save(folder / "trainannot" / "0.png")
    with pytest.raises(ValueError, match=r"trainannot/0\.png holds the class 7"):
        first(ImageMaskFolder(str(folder), 2, batch_size=4))
    assert (first(ImageMaskFolder(str(folder), 2, ignore_index=7, batch_size=4))[1] == 7).any()


def test_a_mask_in_colours_is_refused(folder: Path) -> None:
    Image.new("RGB", (16, 12)).save(folder / "trainannot" / "0.png")
    with pytest.raises(ValueError, match=r"trainannot/0\.png is a colour image"):
        first(ImageMaskFolder(str(folder), 2, batch_size=4))


def test_images_of_two_sizes_are_no_batch(folder: Path) -> None:
    Image.new("RGB", (20, 12)).save(folder / "train" / "0.png")
    Image.new("L", (20, 12)).save(folder / "trainannot" / "0.png")
    with pytest.raises(ValueError, match="give transforms"):
        first(ImageMaskFolder(str(folder), 2, batch_size=4))


def test_missing_folders_and_empty_ones_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        ImageMaskFolder(str(tmp_path), 2).setup("fit")
    for name in ("train", "trainannot"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match="no images in"):
        ImageMaskFolder(str(tmp_path), 2).setup("fit")


def test_a_batch_that_is_larger_than_the_data_is_told(folder: Path) -> None:
    with pytest.raises(ValueError, match="Lower batch_size"):
        first(ImageMaskFolder(str(folder), 2, batch_size=5))


@pytest.mark.parametrize("make", [lambda x: ImageMaskFolder("x", 2, labelled=x), lambda x: MaskScenes(labelled=x)])
def test_a_fraction_of_labels_is_one(make: Any) -> None:
    with pytest.raises(ValueError, match="fraction of the training images"):
        make(0.0)


def test_scenes_are_data_for_a_segmentation() -> None:
    data = MaskScenes(batch_size=4, train_size=8, val_size=4, test_size=4, labelled=0.25)
    data.setup("fit")
    assert (data.splits["train"].labels == -100).all(dim=(1, 2)).tolist() == [False] * 2 + [True] * 6
    images, masks = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert images.shape == (4, 3, 64, 64)
    assert images.is_floating_point()
    assert masks.max() < data.num_classes == len(data.class_names)
