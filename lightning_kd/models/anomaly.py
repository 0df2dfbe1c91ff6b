"""Networks for the detection of anomalies: a small one that draws maps, and features that know ImageNet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kd.extras import late_import
from lightning_kd.models.cifar_resnet import _stage
from lightning_kd.numbers import is_whole
from lightning_kd.paths import expand_path
from lightning_kd.teachers import load_weights


class AnomalyNet(nn.Module):
    """Three residual stages, and a head that draws a map of anomalies of them.

    The stages have a half, a quarter and an eighth of the image's resolution, and ``width``, ``2 * width`` and
    ``4 * width`` channels. Levels to compare are ``level1``, ``level2`` and ``level3``: the stages themselves or, with
    ``level_channels``, linear maps of them.

    Args:
        width: Channels of the first stage.
        blocks: Residual blocks of each stage.
        in_channels: Channels of the images.
        level_channels: Channels of the levels: those of a wider teacher, whose features are to be imitated.

    Raises:
        ValueError: If there are not three levels.

    Example:
        >>> AnomalyNet(width=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 1, 32, 32])
    """

    def __init__(
        self,
        width: int = 16,
        blocks: int = 1,
        in_channels: int = 3,
        level_channels: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        if level_channels is not None and len(level_channels) != 3:
            raise ValueError(f"level_channels: expected three numbers, one for each level; got {level_channels!r}.")
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages = [1, 2, 4]
        self.layer1, self.layer2, self.layer3 = (
            _stage(width * max(factor // 2, 1), width * factor, blocks, min(factor, 2)) for factor in stages
        )
        self.level1, self.level2, self.level3 = (
            nn.Conv2d(width * factor, channels, 1) if channels else nn.Identity()
            for factor, channels in zip(stages, level_channels or (0, 0, 0), strict=True)
        )
        self.head = nn.ModuleList(nn.Conv2d(width * factor, 1, 1) for factor in stages)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, 1, H, W)``: logits, positive where an anomaly is rather than not."""
        x = self.stem(images)
        maps = []
        stages = (self.layer1, self.layer2, self.layer3)
        for stage, level, head in zip(stages, (self.level1, self.level2, self.level3), self.head, strict=True):
            x = stage(x)
            level(x)  # for who compares it
            maps.append(F.interpolate(head(x), images.shape[-2:], mode="bilinear", align_corners=False))
        return torch.stack(maps).sum(0)


class SqueezeNetFeatures(nn.Module):
    """The features of torchvision's SqueezeNet 1.1, without its classifier: 0.7 million parameters.

    Levels to compare are ``features.4`` (128 channels, a quarter of the image's resolution), ``features.7`` (256, an
    eighth) and ``features.12`` (512, a sixteenth).

    Args:
        weights: File with weights, by torchvision's names; read as data, never as code. ``$LIGHTNING_KD_DATA`` in it is
            expanded. Images are to be normalised as ImageNet's are.
        levels: Which of its 13 layers are returned, in a list, for who wants several: ``[2, 4, 7, 12]`` are four of
            64, 128, 256 and 512 channels. Layers behind the last of them are not run. What the last one makes is
            returned unless given.

    Raises:
        ModuleNotFoundError: Without torchvision.
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such layer.

    Example:
        >>> SqueezeNetFeatures()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 512, 3, 3])
    """

    def __init__(self, weights: str | os.PathLike[str] | None = None, levels: Sequence[int] | None = None) -> None:
        super().__init__()
        if levels is not None and not (levels and all(is_whole(k) and 0 <= k <= 12 for k in levels)):
            raise ValueError(f"levels are numbers of layers, 0 to 12, in a list: [4, 7, 12]; got {levels!r}.")
        self.levels = levels
        models = late_import("torchvision.models", "torchvision", "anomaly")
        self.features = models.squeezenet1_1(weights=None).features
        if weights is not None:
            path = expand_path(os.fspath(weights))
            if not os.path.isfile(path):
                raise FileNotFoundError(
                    f"No weights at {path!r}: set LIGHTNING_KD_DATA to the folder with "
                    f"{os.fspath(weights).removeprefix('$LIGHTNING_KD_DATA/')}"
                )
            load_weights(self, path)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """``(B, 3, H, W) -> (B, 512, H / 16, W / 16)``, or the levels that were asked for."""
        x, made = images, []
        for layer in self.features if self.levels is None else self.features[: max(self.levels) + 1]:
            x = layer(x)
            made.append(x)
        return x if self.levels is None else [made[k] for k in self.levels]


class Shrunk(nn.Module):
    """A network that sees images smaller than they are, each pixel the mean of a square of them.

    So a teacher that knows small images, as those of CIFAR-10, sees things of the size that it learned.

    Args:
        network: The network; its layers are called ``network.layer1`` and so on.
        factor: How many times smaller, in height and in width.

    Raises:
        ValueError: If the factor is no whole number from 1 on.

    Example:
        >>> Shrunk(nn.Identity(), factor=2)(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 3, 32, 32])
    """

    def __init__(self, network: nn.Module, factor: int = 2) -> None:
        super().__init__()
        if not (is_whole(factor) and factor >= 1):
            raise ValueError(f"factor is how many times smaller the images are, 1 or more; got {factor!r}.")
        self.network = network
        self.factor = factor

    def forward(self, images: Tensor) -> Any:
        """Returns what the network says of images ``(B, C, H / factor, W / factor)``."""
        return self.network(F.avg_pool2d(images, self.factor))
