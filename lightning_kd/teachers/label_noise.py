"""LabelNoise: the answer, made hard to read, beside the image."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kd.numbers import is_number, is_whole


class LabelNoise(nn.Module):
    """Puts a noised map of the labels beside an image: privileged information for a teacher of segmentation (LAD).

    With a value ``v`` for each class ``y`` of an image ``b``, and noise ``e ~ N(0, 1)`` of each pixel ``p``, one
    channel is added::

        scale * (v[b, y(p)] + noise * e(p))

    A network that is trained with ``values="drawn"``, anew for each image and class, cannot read a class off the value:
    it learns where classes begin and end, and must find in the image which they are. So a teacher no larger than its
    student is better than it, and knows nothing that an image does not show. It is trained with
    ``tasks.LabelAssisted``, and teaches with ``teacher_input=LabelNoise(...)``; the student sees the image alone.

    Args:
        num_classes: Number of classes C; every other label (ignored, unlabelled) is one class more.
        values: ``"drawn"`` from N(0, 1) for each image and class, as in training; or ``"spread"``, class ``k`` of every
            image at ``(2k - C - 1) / (C - 1)``, with which the authors' code distils.
        noise: Standard deviation of the noise of a pixel.
        scale: Factor of the channel: as large as the images' own deviation, 1 for images that are normalised. The
            authors' images are centred pixels in [0, 255], and their factor is 100.

    Returns:
        ``forward(images, target=target)`` with images (B, D, H, W) and labels (B, h, w), integers, repeated or
        thinned out to (H, W) where they differ; returns (B, D + 1, H, W).

    Raises:
        ValueError: If an argument is out of range, or the labels are no maps of classes.

    Source:
        Qiu et al., Make a Strong Teacher with Label Assistance, arXiv 2407.13254, as read in the authors' code
        (skyshoumeng/Label_Assisted_Distillation); the equations of the paper were not compared.

    Example:
        >>> images, target = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
        >>> LabelNoise(num_classes=5)(images, target=target).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        num_classes: int,
        values: Literal["drawn", "spread"] = "drawn",
        noise: float = 0.03,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if values not in ("drawn", "spread"):
            raise ValueError(f"values is 'drawn' or 'spread', got {values!r}.")
        if (
            not (is_whole(num_classes) and is_number(noise) and is_number(scale))
            or num_classes < 2
            or noise < 0
            or scale <= 0
        ):
            raise ValueError(
                f"LabelNoise takes at least two classes, noise that is not negative and a positive scale; got "
                f"{num_classes=}, {noise=} and {scale=}."
            )
        self.num_classes = num_classes
        self.values = values
        self.noise = noise
        self.scale = scale

    def forward(self, images: Tensor, *, target: Tensor) -> Tensor:
        """Returns the images with one channel more."""
        if target.ndim != 3 or target.is_floating_point() or images.ndim != 4 or len(target) != len(images):
            raise ValueError(
                f"LabelNoise takes images (B, C, H, W) and integer labels (B, H, W); got {tuple(images.shape)} and "
                f"{target.dtype} {tuple(target.shape)}."
            )
        classes = self.num_classes
        if self.values == "drawn":
            values = torch.randn(len(images), classes + 1, device=images.device)
        else:
            values = (2 * torch.arange(classes + 1, device=images.device) - classes - 1) / (classes - 1)
            values = values.expand(len(images), -1)
        known = (target >= 0) & (target < classes)
        labels = target.long().where(known, classes)
        channel = values.gather(1, labels.flatten(1)).view_as(labels).unsqueeze(1)
        if channel.shape[-2:] != images.shape[-2:]:
            channel = F.interpolate(channel, images.shape[-2:], mode="nearest-exact")
        channel = self.scale * (channel + self.noise * torch.randn_like(channel))
        return torch.cat([images, channel.to(images.dtype)], dim=1)
