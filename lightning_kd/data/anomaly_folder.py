"""Images in folders, as the MVTec sets have them: what is normal, and tests of each kind of anomaly with masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lightning_kd.data.image_mask_folder import ENDINGS
from lightning_kd.data.splits import SplitDataModule
from lightning_kd.data.synthetic_anomalies import DRAWN, Kind, checked_kinds, spoiled
from lightning_kd.data.tensor_images import normalized
from lightning_kd.data.textures import Batch
from lightning_kd.extras import late_import
from lightning_kd.paths import expand_path

NORMAL = "good"
"""The folder of normal images."""


class AnomalyFiles(Dataset[Batch]):
    """Image files, each with its mask file if it shows an anomaly.

    Args:
        files: The images, each with its mask file, or None.
        labels: Whether they are anomalous.
        image_size: Height and width that images and masks are resized to.
        drawn: Fraction of the images that get a synthetic anomaly, evenly spread.
        kinds: Of which kinds, in turns.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a file cannot be read, or an image and its mask are of different sizes.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, Path | None]],
        labels: Sequence[bool],
        image_size: tuple[int, int],
        drawn: float = 0.0,
        kinds: Sequence[Kind] = DRAWN,
    ) -> None:
        self.files = list(files)
        chosen = [i for i in range(len(self.files)) if int((i + 1) * drawn) > int(i * drawn)]
        self.drawn = {i: kinds[rank % len(kinds)] for rank, i in enumerate(chosen)}
        self.labels = [label or i in self.drawn for i, label in enumerate(labels)]
        self.image_size = image_size
        self._read: dict[int, tuple[Tensor, Tensor]] = {}  # resized, as bytes: small, and decoded once

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        """An image ``(3, H, W)``, uint8, and a dict of ``mask``, bool ``(H, W)``, and ``label``, bool."""
        if index not in self._read:
            self._read[index] = self._made(index)
        image, mask = self._read[index]
        return image, {"mask": mask, "label": torch.tensor(self.labels[index])}

    def _made(self, index: int) -> tuple[Tensor, Tensor]:
        v2 = late_import("torchvision.transforms.v2.functional", "torchvision", "anomaly")
        file, mask_file = self.files[index]
        pixels = _opened(file, "RGB")
        image = v2.resize(pixels, list(self.image_size), antialias=True)
        if index in self.drawn:
            return spoiled(image, self.drawn[index], torch.Generator().manual_seed(index))
        if mask_file is None:
            return image, torch.zeros(self.image_size, dtype=torch.bool)
        mask = _opened(mask_file, "L")
        if mask.shape[-2:] != pixels.shape[-2:]:
            raise ValueError(
                f"{file} has {pixels.shape[-2]} x {pixels.shape[-1]} pixels and its mask {mask_file} "
                f"{mask.shape[-2]} x {mask.shape[-1]}: expected the same"
            )
        return image, v2.resize((mask > 127).float(), list(self.image_size), antialias=True)[0] > 0.5


class AnomalyFolder(SplitDataModule):
    """Folders as the MVTec sets have them.

    ``train/good`` holds normal images, ``test/good`` and ``test/<kind>`` those of the test, and
    ``ground_truth/<kind>`` a mask of each anomalous one: a file of the same name, or with ``_mask`` behind it, with
    values above 127 where the anomaly is. A mask may be empty: the image is anomalous, and no pixel is. An anomaly in
    the training folder is an error: what is to be found would be learned. Validation is the last part of the normal
    training images, of which every other one has an anomaly that is drawn into it: test images choose nothing.
    Batches are images ``(B, 3, H, W)`` float32 and a dict of ``mask``, bool ``(B, H, W)``, and ``label``, bool
    ``(B,)``. The resized images are kept in memory.

    Args:
        root: Folder that holds the three; ``$LIGHTNING_KD_DATA`` and ``~`` in it are filled in.
        image_size: Height and width that images and masks are resized to.
        validation: Fraction of the training images that validate, at least one of them.
        batch_size: Images in a batch.
        num_workers: Processes that load.
        mean: Subtracted from the pixels in [0, 1], per channel.
        std: The pixels are then divided by it.
        synthetic: Fraction of the training images into which an anomaly is drawn, with its mask, once: for networks
            that draw maps.
        kinds: What is drawn, there and in the validation, in turns: ``shade``, ``noise``, ``scratch``, ``perlin``,
            which is anomalib's.

    Raises:
        FileNotFoundError: If a folder, its images or a mask are not there.
        ValueError: If there is an anomaly in the training folder, or a file cannot be read.
    """

    def __init__(
        self,
        root: str,
        image_size: tuple[int, int],
        validation: float = 0.1,
        batch_size: int = 32,
        num_workers: int = 0,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        synthetic: float = 0.0,
        kinds: Sequence[Kind] = DRAWN,
    ) -> None:
        super().__init__(batch_size, num_workers, default_collate)
        if not 0.0 < validation < 1.0:
            raise ValueError(f"validation: expected a fraction of the training images in (0, 1), received {validation}")
        self.root = Path(expand_path(root))
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.validation = validation
        if not 0.0 <= synthetic <= 1.0:
            raise ValueError(f"synthetic: expected a fraction of the training images in [0, 1], received {synthetic}")
        self.synthetic = synthetic
        self.kinds = checked_kinds(kinds)
        self.mean = mean
        self.std = std

    def setup(self, stage: str) -> None:
        """Lists the files that the stage needs."""
        if stage in ("fit", "validate"):
            files: list[tuple[Path, Path | None]] = [(file, None) for file in self._normal()]
            held = max(1, int(self.validation * len(files)))
            for split, chosen, drawn in (("train", files[:-held], self.synthetic), ("val", files[-held:], 0.5)):
                self.splits[split] = AnomalyFiles(chosen, [False] * len(chosen), self.image_size, drawn, self.kinds)
        else:
            found = self._tested()
            self.splits["test"] = AnomalyFiles(
                [(image, mask) for image, mask, _ in found], [label for *_, label in found], self.image_size
            )

    def _normal(self) -> list[Path]:
        folder = self.root / "train"
        if not (folder / NORMAL).is_dir():
            raise FileNotFoundError(f"no folder {folder / NORMAL}: expected the normal images in it; see root")
        others = [each.name for each in sorted(folder.iterdir()) if each.is_dir() and each.name != NORMAL]
        masks = self.root / "ground_truth" / NORMAL
        if others and any(_images(folder / name) for name in others):
            raise ValueError(
                f"an anomaly in the training folder: {folder / others[0]}. What is to be found would be learned as "
                f"normal; expected {folder / NORMAL} alone. Move the others to {self.root / 'test'}"
            )
        if masks.is_dir() and any(_images(masks)):
            raise ValueError(f"masks of normal images in {masks}: expected none, as nothing of them is anomalous")
        return _some(folder / NORMAL)

    def _tested(self) -> list[tuple[Path, Path | None, bool]]:
        folder = self.root / "test"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no folder {folder}: expected {NORMAL} and a folder for each kind of anomaly in it"
            )
        found: list[tuple[Path, Path | None, bool]] = []
        for kind in sorted(each for each in folder.iterdir() if each.is_dir()):
            masks = {file.stem: file for file in _images(self.root / "ground_truth" / kind.name)}
            for image in _some(kind):
                mask = None
                if kind.name != NORMAL:
                    mask = masks.get(image.stem) or masks.get(f"{image.stem}_mask")
                    if mask is None:
                        raise FileNotFoundError(
                            f"no mask for {image}: expected {self.root / 'ground_truth' / kind.name / image.stem}.png"
                        )
                found.append((image, mask, kind.name != NORMAL))
        return found

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalise the images."""
        images, target = batch
        return normalized(images, self.mean, self.std), target


def _images(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.suffix.lower() in ENDINGS] if folder.is_dir() else []


def _some(folder: Path) -> list[Path]:
    found = _images(folder)
    if not found:
        raise FileNotFoundError(f"no images in {folder}: expected files that end in {', '.join(sorted(ENDINGS))}")
    return found


def _opened(file: Path, mode: str) -> Tensor:
    pillow = late_import("PIL.Image", "Pillow", "anomaly")
    v2 = late_import("torchvision.transforms.v2.functional", "torchvision", "anomaly")
    try:
        with pillow.open(file) as opened:
            pixels: Tensor = v2.pil_to_tensor(opened.convert(mode))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises of a damaged file
        raise ValueError(f"{file} cannot be read as an image: {error}") from error
    return pixels
