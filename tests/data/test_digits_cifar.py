import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_kd.data import CIFAR10_CLASSES, Cifar10, Digits
from lightning_kd.data.tensor_images import random_shift


def test_digits_split_is_whole_disjoint_and_stratified() -> None:
    data = Digits(train_size=300)
    data.setup("fit")
    sizes = {name: len(split) for name, split in data.splits.items()}
    assert sizes == {"train": 300, "val": 200, "test": 1297}
    assert set(data.splits["train"].labels.bincount().tolist()) <= {29, 30, 31}
    again = Digits(train_size=300)
    again.setup("fit")
    assert torch.equal(data.splits["train"].images, again.splits["train"].images)


def test_digits_batches_are_normalised_images() -> None:
    data = Digits(batch_size=50)
    data.setup("fit")
    images, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert images.shape == (50, 1, 8, 8)
    assert labels.shape == (50,)
    assert images.min() == -1
    assert images.max() == 1


def test_without_scikit_learn_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from lightning_kd.data import Digits\n"
        "try: Digits().setup('fit')\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 'pip install "lightning-kd[classification]"' in told


@pytest.fixture
def tiny_cifar(tmp_path: Path) -> Path:
    """An archive of the true layout: 5,000 training images and 10 test images, a grey level per class."""
    folder = tmp_path / "cifar10_jpeg"
    folder.mkdir()
    with tarfile.open(folder / "cifar10_jpeg_all.tar.xz", "w:xz", preset=0) as tar:
        for k, kind in enumerate(CIFAR10_CLASSES):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (20 * k,) * 3).save(file, "jpeg")
            for split, count in (("train", 20), ("test", 1)):
                for i in range(count):
                    member = tarfile.TarInfo(f"{split}/{kind}/{i:04}.jpg")
                    member.size = file.getbuffer().nbytes
                    tar.addfile(member, io.BytesIO(file.getvalue()))
    return tmp_path


def test_cifar_is_decoded_once_with_the_right_labels(tiny_cifar: Path) -> None:
    cache = tiny_cifar / "cache"
    data = Cifar10(root=str(tiny_cifar), cache_dir=str(cache), train_subset=50)
    data.prepare_data()
    (cached,) = cache.iterdir()
    before = cached.stat().st_mtime_ns
    data.prepare_data()
    assert cached.stat().st_mtime_ns == before
    data.setup("fit")
    train, test = data.splits["train"], data.splits["test"]
    assert train.labels.bincount().tolist() == [5] * 10
    assert (train.images.float().mean((1, 2, 3)) / 20).round().tolist() == train.labels.tolist()
    assert (test.images.float().mean((1, 2, 3)) / 20).round().tolist() == list(range(10))


def test_a_missing_archive_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="LIGHTNING_KD_DATA"):
        Cifar10(root=str(tmp_path), cache_dir=str(tmp_path)).prepare_data()


@pytest.mark.parametrize("subset", [7, 15, 50_000])
def test_an_unbalanced_subset_is_refused(subset: int) -> None:
    with pytest.raises(ValueError, match="multiple of 10"):
        Cifar10(train_subset=subset)


def test_augmented_images_are_shifted_or_mirrored_originals() -> None:
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    windows = [padded[0, 0, r : r + 4, c : c + 4] for r in range(3) for c in range(3)]
    possible = {tuple(w.flatten().tolist()) for window in windows for w in (window, window.flip(1))}
    seen = {tuple(out.flatten().tolist()) for out in random_shift(image.expand(2000, 1, 4, 4), 1, mirror=True)}
    assert seen == possible
