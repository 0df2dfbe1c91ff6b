"""Segmentation data in folders: images in one, masks of class numbers in another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_kd.data.splits import SplitDataModule, checked_fraction, labelled_count
from lightning_kd.data.tensor_images import normalized
from lightning_kd.extras import late_import
from lightning_kd.paths import expand_path
from lightning_kd.task import UNLABELLED

Sample = tuple[Tensor, Tensor]
Transform = Callable[..., Any]
ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


class ImagesAndMasks(Dataset[Sample]):
    """Pairs of an image file and a mask file of the same name, whatever their endings are.

    Args:
        images: Folder of the images.
        masks: Folder of the masks: pixels are class numbers (greyscale or palette files).
        num_classes: Number of classes; larger numbers, but ``ignore_index``, are refused.
        ignore_index: Number of pixels that do not count.
        transform: Of image and mask together: torchvision's v2, or an ``albumentations.Compose``.
        mask_suffix: What a mask's name has more than its image's: ``"_L"`` for ``a.png`` and ``a_L.png``.
        labelled: Fraction of the images whose masks are used; the pixels of the others are labelled -100.
        multiple: Pad at the right and below until height and width are multiples of it; that does not count.

    Raises:
        FileNotFoundError: If a folder or a mask is not there, or there is no image.
        ValueError: If a file cannot be read, or an image and its mask do not fit, naming the file.
    """

    def __init__(
        self,
        images: Path,
        masks: Path,
        num_classes: int,
        ignore_index: int | None = None,
        transform: Transform | None = None,
        mask_suffix: str = "",
        labelled: float = 1.0,
        multiple: int = 1,
    ) -> None:
        for folder in (images, masks):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"no folder {folder}: give root, and the names of the folders of images and masks"
                )
        found = {file.stem: file for file in sorted(masks.iterdir()) if file.suffix.lower() in ENDINGS}
        self.images = [file for file in sorted(images.iterdir()) if file.suffix.lower() in ENDINGS]
        if not self.images:
            raise FileNotFoundError(f"no images in {images}: expected files that end in {', '.join(sorted(ENDINGS))}")
        if missing := [file for file in self.images if file.stem + mask_suffix not in found]:
            raise FileNotFoundError(
                f"no mask for {missing[0]} ({len(missing)} of {len(self.images)} images have none): expected "
                f"{masks / (missing[0].stem + mask_suffix)}.png"
            )
        self.masks = [found[file.stem + mask_suffix] for file in self.images]
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.transform = transform
        self.multiple = multiple
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0)).tolist()
        self.unlabelled = set(order[labelled_count(labelled, len(order)) :])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """An image ``(3, H, W)``, uint8 unless a transform made it something else, and its mask ``(H, W)``, int64."""
        image, mask = self._padded(*self._sample(index))
        return image, torch.full_like(mask, UNLABELLED) if index in self.unlabelled else mask

    @property
    def names(self) -> list[str]:
        """The images' names, without their ending."""
        return [file.stem for file in self.images]

    def restored(self, labels: Tensor, index: int, size: tuple[int, int]) -> Tensor:
        """Labels ``(..., H, W)`` without the padding; at the size that the transforms gave."""
        if self.multiple == 1:
            return labels
        height, width = _size(self.images[index]) if self.transform is None else self._sample(index)[1].shape
        return labels[..., :height, :width]

    def _sample(self, index: int) -> Sample:
        image = _read(self.images[index], "RGB")
        mask = self._checked(_read(self.masks[index], None), index)
        if image.shape[-2:] != mask.shape[-2:]:
            raise ValueError(
                f"{self.images[index]} has {image.shape[-2]} x {image.shape[-1]} pixels and its mask "
                f"{self.masks[index]} {mask.shape[-2]} x {mask.shape[-1]}: expected the same"
            )
        if self.transform is not None:
            image, mask = _transformed(self.transform, image, mask)
        return image, mask.long()

    def _padded(self, image: Tensor, mask: Tensor) -> Sample:
        """Repeats the image's last row and column; in the mask these pixels do not count."""
        height, width = mask.shape
        below, right = -height % self.multiple, -width % self.multiple
        if not (below or right):
            return image, mask
        rows = torch.arange(height + below).clamp(max=height - 1)
        columns = torch.arange(width + right).clamp(max=width - 1)
        left_out = UNLABELLED if self.ignore_index is None else self.ignore_index
        return image[:, rows[:, None], columns], F.pad(mask, (0, right, 0, below), value=left_out)

    def _checked(self, mask: Tensor, index: int) -> Tensor:
        if mask.ndim != 2:
            raise ValueError(
                f"{self.masks[index]} is a colour image: expected class numbers, in a greyscale or palette file"
            )
        wrong = mask >= self.num_classes
        if self.ignore_index is not None:
            wrong &= mask != self.ignore_index
        if wrong.any():
            raise ValueError(
                f"{self.masks[index]} holds the class {int(mask[wrong].max())}: expected 0 to {self.num_classes - 1}, "
                f"or ignore_index={self.ignore_index}"
            )
        return mask


def _read(file: Path, mode: str | None) -> Tensor:
    """The pixels, ``(C, H, W)`` of a colour image and ``(H, W)`` of others."""
    pillow = late_import("PIL.Image", "Pillow", "segmentation")
    numpy = late_import("numpy", "numpy", "segmentation")
    try:
        with pillow.open(file) as opened:
            pixels = numpy.array(opened.convert(mode) if mode else opened)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for files that are cut short or damaged
        raise ValueError(f"{file} cannot be read as an image: {error}") from error
    if pixels.dtype not in ("uint8", "bool"):
        pixels = pixels.astype("int32")
    tensor = torch.from_numpy(pixels.astype("uint8") if pixels.dtype == "bool" else pixels)
    return tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor


def _size(file: Path) -> tuple[int, int]:
    """Height and width, as the file's beginning says."""
    with late_import("PIL.Image", "Pillow", "segmentation").open(file) as opened:
        width, height = opened.size
    return height, width


def _transformed(transform: Transform, image: Tensor, mask: Tensor) -> Sample:
    """Both, through one call, so that they are cropped and mirrored alike."""
    if type(transform).__module__.partition(".")[0] in ("albumentations", "albucore"):
        given = transform(image=image.permute(1, 2, 0).numpy(), mask=mask.numpy())
        image, mask = torch.as_tensor(given["image"]), torch.as_tensor(given["mask"])
        return (image.permute(2, 0, 1) if image.shape[0] != 3 else image).contiguous(), mask
    tv = late_import("torchvision.tv_tensors", "torchvision", "segmentation")
    image, mask = transform(tv.Image(image), tv.Mask(mask))
    return image.as_subclass(Tensor), mask.as_subclass(Tensor)


class ImageMaskFolder(SplitDataModule):
    """Images and masks in folders, like CamVid's: ``train/`` beside ``trainannot/``, and so ``val`` and ``test``.

    Batches are images ``(N, 3, H, W)`` float32 and masks ``(N, H, W)`` int64.

    Args:
        root: Folder that holds the others; ``$LIGHTNING_KD_DATA`` and ``~`` in it are filled in.
        num_classes: Number of classes. Linked to task, student and teacher.
        ignore_index: Number of pixels that do not count. Linked to the task.
        class_names: A name for each class. Linked to the task.
        train: Name of the folder of the training images.
        val: Of the validation images.
        test: Of the test images.
        masks: Name of a folder of masks, with ``{}`` for that of the images.
        mask_suffix: What a mask's name has more than its image's.
        train_transform: Of image and mask together, in training: of ``torchvision.transforms.v2``, or an
            ``albumentations.Compose``.
        transform: Likewise, elsewhere.
        batch_size: Images in a batch.
        num_workers: Processes that load.
        mean: Subtracted from the pixels in [0, 1], per channel. Images that a transform made floats are left alone.
        std: The pixels are then divided by it.
        labelled: Fraction of the training images whose masks are used; the pixels of the others are labelled -100.
        multiple: Pad at the right and below until height and width are multiples of it, 32 for most models of smp; what
            is padded does not count.

    Raises:
        FileNotFoundError: If a folder, an image or a mask is not there.
        ValueError: If a file cannot be read, or an image and its mask do not fit.
    """

    def __init__(
        self,
        root: str,
        num_classes: int,
        ignore_index: int | None = None,
        class_names: Sequence[str] | None = None,
        train: str = "train",
        val: str = "val",
        test: str = "test",
        masks: str = "{}annot",
        mask_suffix: str = "",
        train_transform: Transform | None = None,
        transform: Transform | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        labelled: float = 1.0,
        multiple: int = 1,
    ) -> None:
        super().__init__(batch_size, num_workers, _stacked)
        self.root = Path(expand_path(root))
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.class_names = list(class_names) if class_names is not None else None
        self.folders = {"train": train, "val": val, "test": test}
        self.masks = masks
        self.mask_suffix = mask_suffix
        self.transforms = {"train": train_transform, "val": transform, "test": transform}
        self.mean = mean
        self.std = std
        self.labelled = checked_fraction(labelled)
        self.multiple = multiple

    def setup(self, stage: str) -> None:
        """Find the files of the splits that the stage needs."""
        needed = {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",))
        for split in needed:
            folder = self.folders[split]
            self.splits[split] = ImagesAndMasks(
                self.root / folder,
                self.root / self.masks.format(folder),
                self.num_classes,
                self.ignore_index,
                self.transforms[split],
                self.mask_suffix,
                self.labelled if split == "train" else 1.0,
                self.multiple,
            )

    def on_after_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Normalise images of bytes; those that a transform made floats are left alone."""
        images, masks = batch
        if images.is_floating_point():
            return images, masks
        return normalized(images, self.mean, self.std), masks


def _stacked(samples: list[Sample]) -> Sample:
    sizes = sorted({tuple(image.shape[-2:]) for image, _ in samples})
    if len(sizes) > 1:
        raise ValueError(
            f"images of {sizes[0]} and of {sizes[1]} pixels cannot be one batch: give transforms that make them of one "
            "size, or batch_size=1"
        )
    images, masks = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(masks)
