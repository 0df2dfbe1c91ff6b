"""Textures and folders of anomalies."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data as skimage_data

from lightning_kd.data import AnomalyFolder, Textures
from lightning_kd.data.synthetic_anomalies import Kind, spoiled


@pytest.mark.slow  # the import of anomalib
def test_anomalib_draws_too_and_takes_no_random_number_of_others():
    image = torch.randint(80, 120, (3, 64, 48), dtype=torch.uint8)
    state = torch.random.get_rng_state()
    made = [spoiled(image, "perlin", torch.Generator().manual_seed(seed)) for seed in (0, 1, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    for changed, mask in made:
        assert changed.dtype == torch.uint8
        assert torch.equal(changed[:, ~mask], image[:, ~mask])
        assert mask.any()
        assert not mask.all()
    assert not torch.equal(made[0][1], made[1][1])
    assert torch.equal(made[1][0], made[2][0])


@pytest.mark.parametrize("kinds", ["shade", [], ["foreign"], ["crack"]])
def test_kinds_are_some_that_can_be_drawn(kinds, tmp_path: Path):
    for make in (lambda: Textures(kinds=kinds), lambda: AnomalyFolder(str(tmp_path), (8, 8), kinds=kinds)):
        with pytest.raises(ValueError, match="kinds: expected a list of some of shade, noise, scratch, perlin, rec"):
            make()


@pytest.mark.parametrize("kind", ["shade", "noise", "foreign", "scratch"])
def test_what_is_drawn_is_inside_of_its_mask(kind: Kind):
    image = torch.randint(80, 120, (3, 64, 48), dtype=torch.uint8)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        changed, mask = spoiled(image, kind, generator, foreign=255 - image)
        assert changed.dtype == torch.uint8
        assert torch.equal(changed[:, ~mask], image[:, ~mask])
        assert (changed != image).any(0)[mask].float().mean() > 0.9
        assert 0.002 < mask.float().mean() < 0.15


def test_textures_are_cut_out_and_half_of_the_test_is_spoiled():
    module = Textures(train_size=8, test_size=20, batch_size=4, synthetic=0.25)
    module.setup("fit")
    module.setup("test")
    train, test = module.splits["train"], module.splits["test"]
    assert train.labels.sum() == 2
    assert test.labels.sum() == 10
    assert torch.equal(test.masks.flatten(1).any(1), test.labels)
    texture = torch.from_numpy(skimage_data.brick())
    windows = texture[352:].unfold(0, 64, 1).unfold(1, 64, 1).flatten(0, 1)
    normal = test.images[~test.labels][0, 0]
    assert (windows == normal).flatten(1).all(1).any()  # of the rows that are the test's alone
    images, target = module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)
    assert images.shape == (4, 3, 64, 64)
    assert images.abs().mean() < 3
    assert target["mask"].dtype == torch.bool


def test_textures_are_the_same_each_time():
    one, other = Textures(test_size=6), Textures(test_size=6)
    one.setup("test")
    other.setup("test")
    assert torch.equal(one.splits["test"].images, other.splits["test"].images)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({"texture": "wood"}, "brick, grass, gravel"), ({"size": 200}, "16 to 96"), ({"synthetic": 2.0}, "fraction")],
)
def test_textures_that_cannot_be_are_refused(arguments: dict, told: str):
    with pytest.raises(ValueError, match=told):
        Textures(**arguments)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("train/good", "test/good", "test/crack", "ground_truth/crack"):
        (tmp_path / folder).mkdir(parents=True)
    grey = Image.new("L", (40, 60), 90)
    for i in range(10):
        grey.save(tmp_path / "train/good" / f"{i}.png")
    grey.save(tmp_path / "test/good/a.png")
    grey.save(tmp_path / "test/crack/b.png")
    grey.save(tmp_path / "test/crack/c.png")
    mask = Image.new("L", (40, 60), 100)  # grey is not an anomaly
    mask.paste(255, (0, 0, 20, 60))
    mask.save(tmp_path / "ground_truth/crack/b_mask.png")
    Image.new("L", (40, 60), 0).save(tmp_path / "ground_truth/crack/c.png")
    return tmp_path


def test_folders_are_read_with_their_masks(root: Path):
    module = AnomalyFolder(str(root), (32, 32), validation=0.2, batch_size=4)
    module.setup("fit")
    module.setup("test")
    assert len(module.splits["train"]) == 8
    images, target = module.on_after_batch_transfer(next(iter(module.test_dataloader())), 0)
    assert images.shape == (3, 3, 32, 32)
    assert target["label"].tolist() == [True, True, False]  # an anomaly may have an empty mask
    assert target["mask"].flatten(1).float().mean(1).tolist() == [0.5, 0.0, 0.0]
    assert not next(iter(module.train_dataloader()))[1]["label"].any()
    _, target = next(iter(module.val_dataloader()))
    assert target["label"].tolist() == [False, True]
    drawn = AnomalyFolder(str(root), (32, 32), validation=0.2, batch_size=8, synthetic=0.25, kinds=["scratch"])
    drawn.setup("fit")
    _, target = next(iter(drawn.train_dataloader()))
    assert int(target["label"].sum()) == 2
    assert torch.equal(target["mask"].flatten(1).any(1), target["label"])
    with pytest.raises(ValueError, match="synthetic: expected a fraction of the training images"):
        AnomalyFolder(str(root), (32, 32), synthetic=1.5)
    assert torch.equal(target["mask"].flatten(1).any(1), target["label"])


def test_an_anomaly_in_the_training_folder_is_an_error(root: Path):
    (root / "train/crack").mkdir()
    Image.new("L", (40, 60)).save(root / "train/crack/x.png")
    with pytest.raises(ValueError, match="an anomaly in the training folder"):
        AnomalyFolder(str(root), (32, 32)).setup("fit")


def test_masks_of_normal_images_are_an_error(root: Path):
    (root / "ground_truth/good").mkdir()
    Image.new("L", (40, 60)).save(root / "ground_truth/good/x.png")
    with pytest.raises(ValueError, match="masks of normal images"):
        AnomalyFolder(str(root), (32, 32)).setup("fit")


def test_what_is_missing_is_told(root: Path):
    (root / "ground_truth/crack/c.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no mask for .*c\.png"):
        AnomalyFolder(str(root), (32, 32)).setup("test")
    with pytest.raises(FileNotFoundError, match="expected the normal images in it"):
        AnomalyFolder(str(root / "nowhere"), (32, 32)).setup("fit")
    with pytest.raises(FileNotFoundError, match="a folder for each kind"):
        AnomalyFolder(str(root / "nowhere"), (32, 32)).setup("test")
    (root / "test/a_kind").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in"):
        AnomalyFolder(str(root), (32, 32)).setup("test")
    with pytest.raises(ValueError, match="fraction of the training images"):
        AnomalyFolder(str(root), (32, 32), validation=1.0)


def test_a_mask_of_another_size_and_a_damaged_file_are_told(root: Path):
    Image.new("L", (10, 10)).save(root / "ground_truth/crack/c.png")
    (root / "test/good/a.png").write_bytes(b"no image")
    module = AnomalyFolder(str(root), (32, 32))
    module.setup("test")
    with pytest.raises(ValueError, match="60 x 40 pixels and its mask"):
        module.splits["test"][1]
    with pytest.raises(ValueError, match="cannot be read as an image"):
        module.splits["test"][2]


@pytest.mark.slow
def test_magnetic_tiles_are_read(data_dir: Path):
    module = AnomalyFolder(str(data_dir / "magnetic_tile"), (64, 64))
    module.setup("fit")
    module.setup("test")
    test = module.splits["test"]
    assert len(module.splits["train"]) + len(module.splits["val"]) == 240
    assert len(test) == 464
    assert sum(test.labels) == 392
    number = next(i for i, (file, _) in enumerate(test.files) if file.stem == "exp3_num_45042")
    _, target = test[number]
    assert target["label"]
    assert not target["mask"].any()
