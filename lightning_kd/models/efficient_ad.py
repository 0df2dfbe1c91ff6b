"""EfficientAD's networks: a describer of patches, a student with an autoencoder beside it, and the detector of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kd.anomalies import AnomalyMaps
from lightning_kd.numbers import is_whole
from lightning_kd.teachers.base import made_by
from lightning_kd.wiring import describe

BORDER = 4
"""Positions that the describer loses at each side where its convolutions have no padding."""

RISE = 0.1
"""What the larger quantile of a map becomes; the smaller becomes 0."""


class Imitations(NamedTuple):
    """What :class:`EfficientADStudent` returns, each ``(B, C, h, w)``.

    Attributes:
        local: What imitates the teacher.
        autoencoder: What imitates it through a bottleneck.
        second: What imitates the autoencoder.
    """

    local: Tensor
    autoencoder: Tensor
    second: Tensor


class PatchDescriber(nn.Module):
    """The small patch description network: each position describes 33 x 33 pixels (Batzner et al., table 5).

    Its layers are called as in anomalib, so that the weights of its pretrained teachers load. Images are to be
    normalised as ImageNet's are.

    Args:
        channels: Of the description.
        width: Channels of the first layer; 128 in the paper.
        padding: Whether patches at the border are described, too, by the zeros of the paper's table. Without, 16 pixels
            at each side are the centre of no patch.

    Example:
        >>> PatchDescriber(channels=8, width=4)(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 8, 8, 8])

    Source: Batzner et al., EfficientAD, arXiv 2303.14535.
    """

    def __init__(self, channels: int = 384, width: int = 128, padding: bool = False) -> None:
        super().__init__()
        self.padding = padding
        self.conv1 = nn.Conv2d(3, width, 4, padding=3 * padding)
        self.conv2 = nn.Conv2d(width, 2 * width, 4, padding=3 * padding)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1 * padding)
        self.conv4 = nn.Conv2d(2 * width, channels, 4)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W) -> (B, C, H / 4 - 8, W / 4 - 8)``; with padding ``(B, C, H / 4, W / 4)``."""
        x = F.avg_pool2d(self.conv1(images).relu(), 2, padding=1 * self.padding)
        x = F.avg_pool2d(self.conv2(x).relu(), 2, padding=1 * self.padding)
        described: Tensor = self.conv4(self.conv3(x).relu())
        return described


class FeatureDescriber(nn.Module):
    """A describer of patches made of any network of features, for who has no :class:`PatchDescriber` with weights.

    A position of a level describes the patch around it. The map is brought to a quarter of the images' height and
    width, where a student with ``padding=True`` describes them.

    Args:
        network: Returns a map ``(B, C, h, w)``, or a list with one: ``SqueezeNetFeatures(weights, levels=[7])``.
        every: Which of its channels are taken: each, each second one, and so on. Fewer are sooner learned.

    Raises:
        ValueError: If the network returns something else, or ``every`` is no whole number from 1 on.

    Example:
        >>> FeatureDescriber(nn.Conv2d(3, 8, 8, stride=8), every=4)(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 2, 16, 16])
    """

    def __init__(self, network: nn.Module, every: int = 1) -> None:
        super().__init__()
        if not (is_whole(every) and every >= 1):
            raise ValueError(f"every is a step through the channels, 1 or more; got {every!r}.")
        self.network = network
        self.every = every

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W) -> (B, C / every, H / 4, W / 4)``."""
        found = self.network(images)
        maps = found[0] if isinstance(found, (list, tuple)) and len(found) == 1 else found
        if not isinstance(maps, Tensor) or maps.ndim != 4:
            raise ValueError(
                f"FeatureDescriber wants one map (B, C, h, w) of its network; got {describe(found)}. Of several levels "
                "name one: SqueezeNetFeatures(levels=[7])."
            )
        return _brought(maps[:, :: self.every], (images.shape[-2] // 4, images.shape[-1] // 4))


class Autoencoder(nn.Module):
    """What draws a description of a whole image through a bottleneck of 64 numbers (Batzner et al., table 6).

    Args:
        channels: Of the description.
        image_size: Height and width of the images, at least 64 pixels: what the bottleneck sees. 256 in the paper.
        padding: Whether the description has the border, as a :class:`PatchDescriber` with padding has.

    Raises:
        ValueError: If the images are smaller.

    Example:
        >>> Autoencoder(channels=8, image_size=(64, 64))(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 8, 8, 8])
    """

    def __init__(self, channels: int = 384, image_size: tuple[int, int] = (256, 256), padding: bool = False) -> None:
        super().__init__()
        self.border = 0 if padding else BORDER
        if min(image_size) < 64:
            raise ValueError(f"EfficientAD takes images of at least 64 x 64 pixels, got {tuple(image_size)}.")
        bottleneck = image_size[0] // 32, image_size[1] // 32
        halving = zip((3, 32, 32, 64, 64), (32, 32, 64, 64, 64), strict=True)
        self.encoder = nn.ModuleList(nn.Conv2d(given, made, 4, stride=2, padding=1) for given, made in halving)
        self.bottleneck = nn.Conv2d(64, 64, bottleneck)
        self.decoder = nn.ModuleList(nn.Conv2d(64, 64, 4, padding=2) for _ in range(6))
        self.last = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, channels, 3, padding=1))
        self.dropout = nn.Dropout(0.2)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W) -> (B, C, H / 4 - 8, W / 4 - 8)``; with padding ``(B, C, H / 4, W / 4)``."""
        height, width = images.shape[-2:]
        x = images
        for layer in self.encoder:
            x = layer(x).relu()
        x = self.bottleneck(x)
        for layer, (part, less) in zip(self.decoder, ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1)), strict=True):
            x = self.dropout(layer(_brought(x, (max(height // part - less, 1), max(width // part - less, 1)))).relu())
        described: Tensor = self.last(_brought(x, (height // 4 - 2 * self.border, width // 4 - 2 * self.border)))
        return described


def _brought(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class EfficientADStudent(nn.Module):
    """A student that describes patches twice, like its teacher and like the autoencoder beside it.

    What is local the teacher's description tells from what is normal; what is wrong with the whole of an image, each
    part of which is normal, the autoencoder's. The quantiles by which the two maps become comparable are kept here, so
    that a checkpoint has them.

    Args:
        channels: Of the teacher's description.
        image_size: Height and width of the images.
        width: Channels of the describer's first layer.
        padding: Whether patches at the border are described, too; then the teacher's description has them, as a
            :class:`PatchDescriber` with padding makes it. Without, nothing is found in 16 pixels at each side, which of
            small images is much: 44 % of 128 x 128 pixels.

    Returns:
        ``forward(images)`` returns :class:`Imitations`.

    Example:
        >>> EfficientADStudent(channels=8, image_size=(64, 64), width=4)(torch.zeros(1, 3, 64, 64)).local.shape
        torch.Size([1, 8, 8, 8])

    Source: Batzner et al., EfficientAD, arXiv 2303.14535, sections 3.2 to 3.4.
    """

    quantiles: Tensor

    def __init__(
        self,
        channels: int = 384,
        image_size: tuple[int, int] = (256, 256),
        width: int = 128,
        padding: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.border = 0 if padding else BORDER
        self.describer = PatchDescriber(2 * channels, width, padding)
        self.autoencoder = Autoencoder(channels, image_size, padding)
        self.register_buffer("quantiles", torch.zeros(2, 2))  # of either map the smaller and the larger

    def forward(self, images: Tensor) -> Imitations:
        """Describes images ``(B, 3, H, W)``."""
        described = self.describer(images)
        return Imitations(described[:, : self.channels], self.autoencoder(images), described[:, self.channels :])


class EfficientADDetector(nn.Module):
    """What runs in the end: maps of what the student's halves do not share with teacher and autoencoder.

    Of each the map is the mean over channels of the squared difference, at the image's size; the two are brought to a
    common scale by quantiles over normal images, of which one becomes 0 and the other 0.1, and their mean is the map.
    Without quantiles they are taken as they are.

    Args:
        student: The student.
        teacher: Its teacher, which returns the description.
        teacher_input: Makes what the teacher is called with out of the images.

    Raises:
        ValueError: If student and teacher describe other channels or positions.

    Source: Batzner et al., EfficientAD, arXiv 2303.14535, section 3.4.
    """

    def __init__(
        self, student: EfficientADStudent, teacher: nn.Module, teacher_input: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.eval()
        self.teacher_input = teacher_input

    def train(self, mode: bool = True) -> EfficientADDetector:
        """Sets the student's mode; the teacher's is always that of evaluation."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor) -> Any:
        """Returns :class:`~lightning_kd.anomalies.AnomalyMaps`; in training what the student returns."""
        return self.student(images) if self.training else self.combined(self.raw(images))

    def raw(self, images: Tensor) -> Tensor:
        """Returns both maps, ``(2, B, H, W)``, each in its own scale."""
        found = self.student(images)
        args, kwargs = made_by(self.teacher_input, (images,), {})
        with torch.no_grad():
            described = self.teacher(*args, **kwargs)
        if described.shape != found.local.shape:
            raise ValueError(
                f"EfficientAD's student describes {tuple(found.local.shape[1:])} of an image, and its teacher "
                f"{tuple(described.shape[1:])}: expected the same channels and positions. With padding=True a student "
                "describes a quarter of the height and width, without 8 less; a PatchDescriber likewise."
            )
        apart = torch.stack(
            [(found.local - described).square().mean(1), (found.autoencoder - found.second).square().mean(1)]
        )
        size = images.shape[-2], images.shape[-1]
        return _brought(F.pad(apart, (self.student.border,) * 4), size)

    def combined(self, raw: Tensor) -> AnomalyMaps:
        """Returns one map of both."""
        low, high = self.student.quantiles.to(raw.dtype).unbind(1)
        spread = high - low
        known = spread > 0
        scale = torch.where(known, RISE / torch.where(known, spread, 1.0), 1.0)
        maps = ((raw - low.view(2, 1, 1, 1)) * scale.view(2, 1, 1, 1)).mean(0)
        return AnomalyMaps(maps, maps.flatten(1).amax(1))


class Standardized(nn.Module):
    """A teacher whose channels have mean 0 and variance 1 over normal images.

    In training mode it takes the figures of what it is called with, and of all before it; afterwards it is frozen.
    Otherwise the loudest channels would be most of a squared difference. On the command line an epoch of
    ``teacher_fit`` takes them, at the task :class:`~lightning_kd.tasks.EfficientAD`.

    Args:
        network: Returns maps ``(B, C, h, w)``.
        channels: C.

    Example:
        >>> teacher = Standardized(nn.Conv2d(3, 4, 1), channels=4)
        >>> images = torch.randn(8, 3, 16, 16)
        >>> round(teacher.standardize([images])(images).std().item(), 2)
        1.0
    """

    count: Tensor
    sums: Tensor
    squares: Tensor

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.idle = nn.Parameter(torch.zeros(()))
        """Without a parameter there is nothing to train; it stays 0."""
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        for name in ("sums", "squares"):
            self.register_buffer(name, torch.zeros(channels, dtype=torch.float64))

    def standardize(self, batches: Iterable[Tensor]) -> Standardized:
        """Takes the figures of batches of images ``(B, 3, H, W)``, of which some may be empty; returns itself."""
        self.train()
        for images in batches:
            if len(images):
                self(images)
        return self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Returns the network's maps, standardized by all that it saw in training mode."""
        with torch.no_grad():
            maps: Tensor = self.network.eval()(images)
        if self.training:
            values = maps.double()
            self.count += values.numel() / values.shape[1]
            self.sums += values.sum((0, 2, 3))
            self.squares += values.square().sum((0, 2, 3))
        count = self.count.clamp_min(1)
        mean = self.sums / count
        deviation = (self.squares / count - mean.square()).clamp_min(0).sqrt()
        deviation = torch.where(deviation > 0, deviation, 1.0)
        mean, deviation = (each.to(maps.dtype).view(1, -1, 1, 1) for each in (mean, deviation))
        standardized = (maps - mean) / deviation
        return standardized + self.idle if self.training else standardized
