"""Image embedders: any backbone of timm with a linear layer, and a small residual network for small images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kd.extras import late_import
from lightning_kd.models.cifar_resnet import CifarResNet


class Embedder(nn.Module):
    """Images to embeddings: a backbone of timm, pooled, and a linear layer.

    Args:
        backbone: Name of a model of timm, such as ``"resnet18"``.
        dim: Length of the embeddings, ``D``.
        in_channels: Channels of the images: 3 for RGB, 1 for grey.
        pretrained: Whether to start from timm's weights, which are downloaded.
        normalize: Whether embeddings are scaled to length 1.
        options: What else the backbone takes, such as ``{"img_size": 96}``.

    Raises:
        ModuleNotFoundError: Without timm.
        ValueError: If the backbone is for images of another size, as most vision transformers are for one.

    Example:
        >>> import torch
        >>> Embedder("mobilenetv3_small_050", dim=32, in_channels=1)(torch.zeros(2, 1, 64, 64)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        backbone: str,
        dim: int = 128,
        in_channels: int = 3,
        pretrained: bool = False,
        normalize: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        timm = late_import("timm", "timm", "retrieval")
        given = {**(options or {}), "in_chans": in_channels, "num_classes": 0}
        self.backbone: nn.Module = timm.create_model(backbone, pretrained=pretrained, **given)
        # What a pooled image has may be more than num_features, behind the last convolution of a MobileNet say.
        features = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features
        self.embed = nn.Linear(int(features), dim)
        self.normalize = normalize

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, in_channels, H, W)`` to embeddings ``(B, D)``."""
        try:
            features = self.backbone(images)
        except AssertionError as error:  # of timm, which says what it has and not what to do
            size = getattr(getattr(self.backbone, "patch_embed", None), "img_size", None) or ("other", "other")
            raise ValueError(
                f"{type(self.backbone).__name__} is for images of {size[0]} x {size[1]} pixels, and these are "
                f"{tuple(images.shape)}: {error} Resize them in the data, or make the backbone for them: "
                f"options={{'img_size': {list(images.shape[-2:])}}}; a vision transformer of timm takes any size of "
                "whole patches with options={'dynamic_img_size': True}."
            ) from error
        embeddings: Tensor = self.embed(features)
        return F.normalize(embeddings) if self.normalize else embeddings


class SmallEmbedder(CifarResNet):
    """Small images to embeddings: a :class:`CifarResNet` whose last layer makes embeddings of length 1.

    Args:
        depth: Number of weighted layers: 8, 14, 20, ...
        dim: Length of the embeddings, ``D``.
        in_channels: Channels of the images: 3 for RGB, 1 for grey.
        width: Channels of the first stage.

    Raises:
        ValueError: If ``depth`` is not ``6n + 2``.

    Example:
        >>> import torch
        >>> SmallEmbedder(depth=8, dim=32, in_channels=1, width=4)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 32])
    """

    def __init__(self, depth: int, dim: int = 64, in_channels: int = 3, width: int = 16) -> None:
        super().__init__(depth, num_classes=dim, in_channels=in_channels, width=width)

    def forward(self, image: Tensor) -> Tensor:
        """Images ``(B, in_channels, H, W)`` to embeddings ``(B, D)``."""
        return F.normalize(super().forward(image))
