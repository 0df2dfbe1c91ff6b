"""Images that have nothing to do with a task: photographs, of a folder or of scikit-image."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lightning_kd.data.image_mask_folder import ENDINGS
from lightning_kd.data.tensor_images import normalized
from lightning_kd.extras import late_import
from lightning_kd.paths import expand_path

BUNDLED = ("astronaut", "coffee", "chelsea")
"""Photographs that scikit-image brings along."""

GREY = 0.3
"""Fraction that loses its colours, as in EfficientAD."""


class UnrelatedImages:
    """Makes pieces of photographs, of the shape of images that it is given.

    Where they are taken from torch's generator of random numbers says. ImageNet in EfficientAD's paper.

    Args:
        folder: Of images, with those in its folders; ``$LIGHTNING_KD_DATA`` and ``~`` in it are filled in. Without it
            three photographs of scikit-image are taken, which are few.
        mean: Subtracted from the pixels in [0, 1], per channel; ImageNet's unless given.
        std: The pixels are then divided by it.

    Raises:
        FileNotFoundError: If there are no images in the folder.
        ModuleNotFoundError: Without scikit-image, where there is no folder.

    Example:
        >>> UnrelatedImages()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 3, 64, 64])
    """

    def __init__(
        self,
        folder: str | None = None,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    ) -> None:
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.files: list[Path] = []
        self._photographs: list[Tensor] = []
        if folder is not None:
            root = Path(expand_path(folder))
            self.files = sorted(each for each in root.rglob("*") if each.suffix.lower() in ENDINGS)
            if not self.files:
                raise FileNotFoundError(f"no images in {root}: expected files that end in {', '.join(sorted(ENDINGS))}")

    def __call__(self, images: Tensor) -> Tensor:
        """Returns as many of them as there are images ``(B, 3, H, W)``, on their device."""
        pieces = torch.stack([self._piece(images.shape[-2], images.shape[-1]) for _ in images])
        return normalized(pieces.to(images.device), self.mean, self.std).to(images.dtype)

    def _piece(self, height: int, width: int) -> Tensor:
        """Returns the piece of a photograph, of which it is about a quarter."""
        functional = late_import("torchvision.transforms.v2.functional", "torchvision", "anomaly")
        photograph = functional.resize(self._photograph(), [2 * height, 2 * width], antialias=True)
        y, x = (int(torch.randint(size + 1, ())) for size in (height, width))
        piece: Tensor = photograph[:, y : y + height, x : x + width]
        return functional.rgb_to_grayscale(piece, 3) if float(torch.rand(())) < GREY else piece

    def _photograph(self) -> Tensor:
        if not self.files:
            if not self._photographs:
                library = late_import("skimage.data", "scikit-image", "anomaly")
                self._photographs = [torch.from_numpy(getattr(library, name)()).permute(2, 0, 1) for name in BUNDLED]
            return self._photographs[int(torch.randint(len(BUNDLED), ()))]
        file = self.files[int(torch.randint(len(self.files), ()))]
        v2 = late_import("torchvision.transforms.v2.functional", "torchvision", "anomaly")
        with late_import("PIL.Image", "Pillow", "anomaly").open(file) as opened:
            pixels: Tensor = v2.pil_to_tensor(opened.convert("RGB"))
        return pixels
