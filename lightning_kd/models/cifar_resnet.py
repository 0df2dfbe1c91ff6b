"""A small residual network, big enough to teach and small enough to learn on 8x8 digits; torchvision's by name."""

from __future__ import annotations

import os

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kd.numbers import is_number, is_whole
from lightning_kd.paths import expand_path
from lightning_kd.teachers import load_weights


class ResidualBlock(nn.Module):
    r"""Two 3x3 convolutions with a parameter-free shortcut: ``relu(conv(relu(conv(x))) + shortcut(x))``.

    Where the shape changes, the shortcut takes every second pixel and pads the new channels with zeros
    (option A of the paper).

    Args:
        channels_in: Channels of the input, ``C``.
        channels: Channels of the output, ``D >= C``.
        stride: Step of the first convolution, in pixels.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.missing = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, D, H / stride, W / stride)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x
        if self.missing:
            front = self.missing // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, front, self.missing - front))
        return F.relu(out + shortcut)


class CifarResNet(nn.Module):
    """The residual network for small images: three stages of ``n`` blocks, ``depth = 6n + 2`` layers.

    Stages ``layer1``, ``layer2``, ``layer3`` have ``width``, ``2 * width`` and ``4 * width`` channels; each
    halves the resolution of the one before. With ``depth=56`` it has 0.86 million parameters, with ``depth=8``
    0.08 million.

    Args:
        depth: Number of weighted layers: 8, 14, 20, ..., 56, 110.
        num_classes: Length of the logits, ``K``.
        in_channels: Channels of the image: 3 for RGB, 1 for grey.
        width: Channels of the first stage.
        weights: File with the weights to start from: a state dict, also inside a checkpoint. Read as data, never
            as code; ``$LIGHTNING_KD_DATA`` in it is expanded.

    Raises:
        ValueError: If ``depth`` is not ``6n + 2``.
        FileNotFoundError: If the file ``weights`` is not there.

    Example:
        >>> import torch
        >>> CifarResNet(depth=8, in_channels=1, width=4)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Source: He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2. Names of the
    modules follow the widespread https://github.com/akamaster/pytorch_resnet_cifar10, whose files load here.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if not is_whole(depth) or depth < 8 or (depth - 2) % 6:
            nearest = max(8, round((depth - 2) / 6) * 6 + 2) if is_number(depth) else 20
            raise ValueError(
                f"expected a depth of 6n + 2 (8, 14, 20, 26, ...), received {depth!r}; the nearest is {nearest}"
            )
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        if weights is not None:
            path = expand_path(weights)
            name = weights.partition("LIGHTNING_KD_DATA")[2].lstrip("}/")
            if "LIGHTNING_KD_DATA" in weights and not os.path.isfile(path):
                raise FileNotFoundError(f"No weights at {path!r}: set LIGHTNING_KD_DATA to the folder with {name}")
            load_weights(self, path)

    def forward(self, image: Tensor) -> Tensor:
        """Images ``(N, in_channels, H, W)`` to logits ``(N, K)``."""
        x = F.relu(self.bn1(self.conv1(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(channels_in, channels, stride)
    return nn.Sequential(first, *(ResidualBlock(channels, channels, 1) for _ in range(blocks - 1)))
