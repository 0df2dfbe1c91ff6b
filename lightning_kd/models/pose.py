"""A network for poses: any backbone of timm, and one of three heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_kd.extras import late_import
from lightning_kd.keypoints import Coordinates, Heatmaps, Said, SimCC
from lightning_kd.teachers import load_weights


class PoseNet(nn.Module):
    """Finds keypoints: a backbone of timm with a head for heatmaps, SimCC or coordinates.

    - ``"heatmap"``: three transposed convolutions of stride 2, and a map for each joint (arXiv 1804.06208).
    - ``"simcc"``: a map for each joint, as a vector, through a hidden layer to logits of bins, two for each pixel, on
      each axis (arXiv 2107.03332; the hidden layer is in the place of RTMPose's attention, arXiv 2303.07399).
    - ``"coordinates"``: the mean over space, and a linear layer to x and y.

    Args:
        backbone: Name of a model of timm.
        num_keypoints: Number of joints K.
        image_size: Height and width of the images, in pixels; of SimCC, the only size that it takes.
        head: Which of the three.
        channels: Of the transposed convolutions, or the width of the hidden layer.
        stride: The last stage of the backbone that is used is that of this stride.
        bins_per_pixel: Of SimCC.
        pretrained: Whether timm downloads weights for the backbone.
        backbone_from: A checkpoint of such a network, whose backbone is taken and stands still: the head alone learns.

    Returns:
        ``forward(images)``, images ``(B, 3, H, W)``, returns :class:`~lightning_kd.keypoints.Heatmaps`,
        :class:`~lightning_kd.keypoints.SimCC` or :class:`~lightning_kd.keypoints.Coordinates`, whose fields are paths
        of terms: ``"output.simcc_x"``.

    Raises:
        ModuleNotFoundError: Without timm.
        ValueError: For another head, a stride that the backbone does not have, or with SimCC images of another size.

    Example:
        >>> net = PoseNet("resnet10t", num_keypoints=5, image_size=(32, 32), stride=8)
        >>> net(torch.rand(2, 3, 32, 32)).simcc_x.shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        backbone: str,
        num_keypoints: int,
        image_size: tuple[int, int],
        head: Literal["heatmap", "simcc", "coordinates"] = "simcc",
        channels: int = 256,
        stride: int = 32,
        bins_per_pixel: int = 2,
        pretrained: bool = False,
        backbone_from: str | None = None,
    ) -> None:
        super().__init__()
        if head not in ("heatmap", "simcc", "coordinates"):
            raise ValueError(f"head is 'heatmap', 'simcc' or 'coordinates', got {head!r}.")
        timm = late_import("timm", "timm", "pose")
        strides = timm.create_model(backbone, features_only=True, feature_cls="getter").feature_info.reduction()
        if stride not in strides:
            raise ValueError(f"{backbone} has stages of the strides {strides}, and none of stride={stride}.")
        stages = tuple(i for i, each in enumerate(strides) if each <= stride)
        self.backbone: nn.Module = timm.create_model(
            backbone, features_only=True, feature_cls="getter", out_indices=stages, pretrained=pretrained
        )  # the getter drops later stages, which others keep: DDP refuses what is never used
        self.image_size = tuple(image_size)
        with torch.no_grad():
            width, *size = self.backbone.eval()(torch.zeros(1, 3, *self.image_size))[-1].shape[1:]
        self.backbone.train()
        bins = [bins_per_pixel * side for side in self.image_size]
        heads: dict[str, Callable[[], nn.Module]] = {
            "heatmap": lambda: HeatmapHead(width, num_keypoints, channels),
            "simcc": lambda: SimCCHead(width, num_keypoints, (size[0], size[1]), (bins[0], bins[1]), channels),
            "coordinates": lambda: CoordinateHead(width, num_keypoints),
        }
        self.head: nn.Module = heads[head]()
        if backbone_from is not None:
            fresh = self.head
            self.head = heads[head]()
            load_weights(self, backbone_from)
            self.head = fresh
            self.backbone.requires_grad_(False)
            self.backbone.register_forward_pre_hook(_in_evaluation)

    def forward(self, images: Tensor) -> Said:
        """Finds the joints."""
        if isinstance(self.head, SimCCHead) and images.shape[-2:] != self.image_size:
            raise ValueError(
                f"PoseNet is for images of {self.image_size[0]} x {self.image_size[1]} pixels, and these have "
                f"{images.shape[-2]} x {images.shape[-1]}. Resize them in the data, or set image_size."
            )
        found: Said = self.head(self.backbone(images)[-1])
        return found


class HeatmapHead(nn.Module):
    """``(B, C, h, w)`` to heatmaps ``(B, K, 8 h, 8 w)``."""

    def __init__(self, in_channels: int, num_keypoints: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (in_channels, channels, channels):
            deconvolution = nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1, bias=False)
            layers += [deconvolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, num_keypoints, 1))

    def forward(self, x: Tensor) -> Heatmaps:
        """Returns a map for each joint."""
        return Heatmaps(self.layers(x))


class SimCCHead(nn.Module):
    """``(B, C, h, w)`` to the bins ``(B, K, bins)`` of x and y."""

    def __init__(
        self, in_channels: int, num_keypoints: int, size: tuple[int, int], bins: tuple[int, int], channels: int
    ) -> None:
        super().__init__()
        self.joints = nn.Conv2d(in_channels, num_keypoints, 3, padding=1)
        self.hidden = nn.Sequential(nn.Linear(size[0] * size[1], channels), nn.ReLU(inplace=True))
        self.y, self.x = (nn.Linear(channels, each) for each in bins)

    def forward(self, x: Tensor) -> SimCC:
        """Returns the logits of both axes."""
        hidden = self.hidden(self.joints(x).flatten(2))
        return SimCC(self.x(hidden), self.y(hidden))


class CoordinateHead(nn.Module):
    """``(B, C, h, w)`` to places ``(B, K, 2)`` in fractions of the image."""

    def __init__(self, in_channels: int, num_keypoints: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, 2 * num_keypoints)
        nn.init.constant_(self.linear.bias, 0.5)  # the centre

    def forward(self, x: Tensor) -> Coordinates:
        """Returns x and y of each joint."""
        return Coordinates(self.linear(x.mean((2, 3))).unflatten(1, (-1, 2)))


def _in_evaluation(backbone: nn.Module, _: object) -> None:
    """Stands still, whatever train() was called around it."""
    backbone.eval()
