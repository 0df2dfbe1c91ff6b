"""Images of some classes to train on, and of others to retrieve among."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lightning_kd.data.tensor_images import Batch, TensorDataModule, TensorImages
from lightning_kd.extras import late_import
from lightning_kd.paths import data_root, expand_path

TRAINING_ALPHABETS = ("images_background_small1.zip", None)
UNSEEN_ALPHABETS = (
    "images_background_small2.zip",
    ("Japanese_(katakana)", "Sanskrit", "Tagalog"),  # Greek and Latin are in the other file, too
)


class UnseenClasses(TensorDataModule):
    """Batches of several images of several classes to train on; ``val`` has the same classes, ``test`` has others.

    A subclass fills ``splits``. Batches are as :class:`TensorDataModule` makes them, and in training balanced:
    ``per_class`` images of each of ``batch_size / per_class`` classes, by the sampler of pytorch-metric-learning.

    Args:
        batch_size: Images in a batch.
        per_class: Images of each class in a training batch.
        num_workers: Processes that load; 0 is fastest for tensors in memory.
        padding: Largest random shift of a training image, in pixels.

    Raises:
        ValueError: If the batches cannot be balanced.
        ModuleNotFoundError: Without pytorch-metric-learning.
    """

    def __init__(self, batch_size: int, per_class: int, num_workers: int, padding: int) -> None:
        super().__init__(batch_size, num_workers, mean=(0.5,), std=(0.5,), padding=padding)
        if per_class < 2 or batch_size % per_class:
            raise ValueError(
                f"batch_size={batch_size} is not a multiple of per_class={per_class}, which is at least 2: a training "
                "batch holds so many images of each of its classes."
            )
        self.per_class = per_class

    def train_dataloader(self) -> DataLoader[Batch]:
        """Balanced batches of the training split."""
        split = self.splits["train"]
        assert isinstance(split, TensorImages)
        known, needed = len(torch.unique(split.labels)), self.batch_size // self.per_class
        if known < max(needed, 2):
            raise ValueError(
                f"the training data has {known} classes, and a batch of batch_size={self.batch_size} with per_class="
                f"{self.per_class} is of {max(needed, 2)}. Raise per_class, or lower batch_size"
            )
        samplers = late_import("pytorch_metric_learning.samplers", "pytorch-metric-learning", "retrieval")
        sampler = Anew(partial(samplers.MPerClassSampler, split.labels, self.per_class, self.batch_size, len(split)))
        return DataLoader(
            split, self.batch_size, sampler=sampler, drop_last=True, num_workers=self.num_workers,
            collate_fn=self._collate, persistent_workers=self.num_workers > 0,
        )  # fmt: skip


class Anew(Sampler[int]):
    """A sampler that is made anew for every epoch: one that shuffles in place would go on otherwise in a resumed run.

    Args:
        make: Makes it.
    """

    def __init__(self, make: Callable[[], Sampler[int]]) -> None:
        self.make = make
        self.length = len(make())  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(self.make())

    def __len__(self) -> int:
        return self.length


class UnseenDigits(UnseenClasses):
    """scikit-learn's handwritten digits, 8x8: some to train on, and others to retrieve among.

    Batches are ``(N, 1, 8, 8)`` float32, pixels in [-1, 1]. A fifth of the images of the digits that are trained on is
    for validation.

    Args:
        batch_size: Images in a batch.
        per_class: Images of each digit in a training batch.
        unseen: The digits of the test.
        num_workers: Processes that load; 0 is fastest for tensors in memory.

    Raises:
        ValueError: If fewer than two digits are left on one side.
        ModuleNotFoundError: Without scikit-learn or pytorch-metric-learning.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998.
    """

    def __init__(
        self, batch_size: int = 60, per_class: int = 10, unseen: Sequence[int] = (6, 7, 8, 9), num_workers: int = 0
    ) -> None:
        super().__init__(batch_size, per_class, num_workers, padding=1)
        if not 2 <= len(set(unseen) & set(range(10))) <= 8 or not set(unseen) <= set(range(10)):
            raise ValueError(f"unseen are two to eight of the digits 0 to 9, got {list(unseen)}.")
        self.unseen = tuple(unseen)

    def setup(self, stage: str) -> None:
        """Read the images and split them."""
        bunch = late_import("sklearn.datasets", "scikit-learn", "retrieval").load_digits()
        images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(bunch.target).long()
        unseen = torch.isin(labels, torch.tensor(self.unseen))
        self.splits["test"] = TensorImages(images[unseen], labels[unseen])
        images, labels = images[~unseen], labels[~unseen]
        held = torch.arange(len(labels)) % 5 == 0  # the images are in no order
        self.splits["train"] = TensorImages(images[~held], labels[~held])
        self.splits["val"] = TensorImages(images[held], labels[held])


class Omniglot(UnseenClasses):
    """Handwritten characters: 136 of five alphabets to train on, 106 of three others to retrieve among.

    Batches are ``(N, 1, size, size)`` float32, ink 1 and paper -1. Each character was drawn by twenty people. The
    drawings of the last four are for validation; in the test all are of characters that were never seen.

    Args:
        root: Folder that holds ``omniglot/images_background_small1.zip`` and ``2``; default:
            ``$LIGHTNING_KD_DATA``, else ``../shared/data``.
        size: Height and width, in pixels; the files have 105.
        batch_size: Images in a batch.
        per_class: Images of each character in a training batch.
        num_workers: Processes that load; 0 is fastest for tensors in memory.

    Raises:
        FileNotFoundError: Without the files.
        ModuleNotFoundError: Without Pillow or pytorch-metric-learning.

    Source: Lake et al., Human-level concept learning through probabilistic program induction, Science 350, 2015;
    https://github.com/brendenlake/omniglot.
    """

    def __init__(
        self,
        root: str | None = None,
        size: int = 28,
        batch_size: int = 128,
        per_class: int = 4,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, per_class, num_workers, padding=max(1, size // 14))
        self.root = Path(expand_path(root)) if root else data_root()
        self.size = size

    def setup(self, stage: str) -> None:
        """Read the drawings."""
        if self.splits:
            return
        images, labels, drawer = self._read(*TRAINING_ALPHABETS)
        held = drawer > 16
        self.splits["train"] = TensorImages(images[~held], labels[~held])
        self.splits["val"] = TensorImages(images[held], labels[held])
        self.splits["test"] = TensorImages(*self._read(*UNSEEN_ALPHABETS)[:2])

    def _read(self, name: str, alphabets: Iterable[str] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Images ``(N, 1, size, size)``, the characters' numbers, and the drawers' from 1."""
        file = self.root / "omniglot" / name
        if not file.is_file():
            raise FileNotFoundError(
                f"no drawings at {file}: set LIGHTNING_KD_DATA (or --data.init_args.root) to the folder that holds "
                f"omniglot/{name}"
            )
        pillow = late_import("PIL.Image", "Pillow", "retrieval")
        images, characters, drawers = [], [], []
        with zipfile.ZipFile(file) as archive:
            for member in sorted(archive.namelist()):
                path = PurePosixPath(member)
                if path.suffix != ".png" or (alphabets is not None and path.parts[-3] not in alphabets):
                    continue
                drawing = pillow.open(io.BytesIO(archive.read(member))).convert("L")
                pixels = drawing.resize((self.size, self.size), pillow.Resampling.BOX).tobytes()
                images.append(torch.frombuffer(bytearray(pixels), dtype=torch.uint8))
                characters.append("/".join(path.parts[-3:-1]))
                drawers.append(int(path.stem.rpartition("_")[2]))
        numbers = {character: i for i, character in enumerate(dict.fromkeys(characters))}
        stacked = 255 - torch.stack(images).view(-1, 1, self.size, self.size)
        return stacked, torch.tensor([numbers[c] for c in characters]), torch.tensor(drawers)
