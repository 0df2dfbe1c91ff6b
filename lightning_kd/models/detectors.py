"""Torchvision's detectors by numbers and names: what a configuration can write, for small images too.

Each of these makes torchvision's own class, whose checkpoints load wherever torchvision is.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_kd.extras import late_import

_RESNET = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}
_STRIDES = (4, 8, 16, 32)


def pyramid(backbone: str = "resnet18", channels: int = 64, strides: tuple[int, ...] = (4, 8, 16)) -> nn.Module:
    """Makes a backbone of torchvision with a feature pyramid on top; nothing is downloaded.

    Behind the levels of the strides comes a last one, of twice the deepest stride, by pooling.

    Args:
        backbone: ``resnet18`` and its like, or ``mobilenet_v2``, ``mobilenet_v3_small``, ``mobilenet_v3_large``.
        channels: Channels of every level.
        strides: Of the levels, in pixels, some of 4, 8, 16 and 32. What lies behind the deepest is cut off.

    Returns:
        A module with ``out_channels`` that returns a dict of levels, ``"0"``, ``"1"``, ... from fine to coarse, and
        ``"pool"``.

    Raises:
        ValueError: If the strides are others, or the backbone is.
        ModuleNotFoundError: Without torchvision.

    Example:
        >>> import torch
        >>> levels = pyramid("mobilenet_v3_small", channels=32)(torch.zeros(1, 3, 64, 64))
        >>> [tuple(level.shape) for level in levels.values()]
        [(1, 32, 16, 16), (1, 32, 8, 8), (1, 32, 4, 4), (1, 32, 2, 2)]
    """
    if not strides or list(strides) != sorted({*strides} & {*_STRIDES}):
        raise ValueError(f"strides: expected some of 4, 8, 16, 32 in rising order, received {tuple(strides)}")
    models = late_import("torchvision.models", "torchvision", "detection")
    utils = late_import("torchvision.models.detection.backbone_utils", "torchvision", "detection")
    if backbone not in models.list_models(models) or not backbone.startswith(("resne", "wide_resnet", "mobilenet")):
        raise ValueError(
            f"backbone: expected a ResNet or MobileNet of torchvision (resnet18, mobilenet_v3_small), received "
            f"{backbone!r}"
        )
    whole = models.get_model(backbone, weights=None)
    if backbone.startswith("mobilenet"):
        whole = whole.features
        layers = _last_of_each_stride(whole)
        widths = {name: whole[int(name)].out_channels for name in layers}
    else:
        layers = dict(_RESNET)
        widths = {name: whole.fc.in_features * stride // 32 for name, stride in layers.items()}
    chosen = {name: str(strides.index(stride)) for name, stride in layers.items() if stride in strides}
    made: nn.Module = utils.BackboneWithFPN(whole, chosen, [widths[name] for name in chosen], channels)
    return made


def _last_of_each_stride(features: Any) -> dict[str, int]:
    """Returns the last block of MobileNet's that has each stride, without the classifier's own convolution."""
    stride, found = 1, {}
    for name, block in list(features.named_children())[:-1]:
        stride *= max(m.stride[0] for m in block.modules() if isinstance(m, nn.Conv2d))
        found[stride] = name
    return {name: stride for stride, name in found.items() if stride in _STRIDES}


class FCOS(nn.Module):
    """Torchvision's FCOS on a :func:`pyramid`: without anchors, fully convolutional.

    Args:
        num_classes: Number of classes, without the background, which torchvision counts too.
        backbone: See :func:`pyramid`, like the next two.
        channels: A multiple of 32.
        strides: What a level of stride s has to find are boxes that reach 4s to 8s from its points.
        convs: Convolutions of each head.
        min_size: Images are resized to this shorter side, unless the longer one would exceed ``max_size``.
        max_size: Longest side, in pixels.
        score_thresh: What is found with a lower score is not reported.

    Example:
        >>> type(FCOS(num_classes=3, backbone="mobilenet_v3_small", channels=32)).__module__
        'torchvision.models.detection.fcos'

    Source: Tian et al., FCOS, arXiv 1904.01355.
    """

    def __new__(  # type: ignore[misc]  # noqa: D102 - what is made is torchvision's
        cls,
        num_classes: int,
        backbone: str = "resnet18",
        channels: int = 64,
        strides: tuple[int, ...] = (4, 8, 16),
        convs: int = 4,
        min_size: int = 800,
        max_size: int = 1333,
        score_thresh: float = 0.05,
    ) -> nn.Module:
        fcos = late_import("torchvision.models.detection.fcos", "torchvision", "detection")
        anchors = _anchors([(stride,) for stride in _all(strides)], (1.0,))
        made: nn.Module = fcos.FCOS(
            pyramid(backbone, channels, strides),
            num_classes + 1,
            anchor_generator=anchors,
            head=fcos.FCOSHead(channels, 1, num_classes + 1, convs),
            min_size=min_size,
            max_size=max_size,
            score_thresh=score_thresh,
        )
        return made


class RetinaNet(nn.Module):
    """Torchvision's RetinaNet on a :func:`pyramid`: nine anchors at every place, and the focal loss.

    Args:
        num_classes: Number of classes, without the background, which torchvision counts too.
        backbone: See :func:`pyramid`, like the next two.
        channels: Of every level.
        strides: The anchors of a level of stride s are 4s, 5s and 6.3s wide, in three shapes.
        min_size: Images are resized to this shorter side, unless the longer one would exceed ``max_size``.
        max_size: Longest side, in pixels.
        score_thresh: What is found with a lower score is not reported.

    Example:
        >>> type(RetinaNet(num_classes=3, backbone="mobilenet_v3_small", channels=32)).__module__
        'torchvision.models.detection.retinanet'

    Source: Lin et al., Focal Loss for Dense Object Detection, arXiv 1708.02002.
    """

    def __new__(  # type: ignore[misc]  # noqa: D102 - what is made is torchvision's
        cls,
        num_classes: int,
        backbone: str = "resnet18",
        channels: int = 64,
        strides: tuple[int, ...] = (4, 8, 16),
        min_size: int = 800,
        max_size: int = 1333,
        score_thresh: float = 0.05,
    ) -> nn.Module:
        retinanet = late_import("torchvision.models.detection.retinanet", "torchvision", "detection")
        sizes = [tuple(round(4 * stride * 2 ** (i / 3)) for i in range(3)) for stride in _all(strides)]
        made: nn.Module = retinanet.RetinaNet(
            pyramid(backbone, channels, strides),
            num_classes + 1,
            anchor_generator=_anchors(sizes, (0.5, 1.0, 2.0)),
            min_size=min_size,
            max_size=max_size,
            score_thresh=score_thresh,
        )
        return made


class FasterRCNN(nn.Module):
    """Torchvision's Faster R-CNN on a :func:`pyramid`: what a first head proposes, a second one looks at.

    Args:
        num_classes: Number of classes, without the background, which torchvision counts too.
        backbone: See :func:`pyramid`, like the next two.
        channels: Of every level.
        strides: The anchors of a level of stride s are 4s wide, in three shapes.
        hidden: Width of the second head.
        min_size: Images are resized to this shorter side, unless the longer one would exceed ``max_size``.
        max_size: Longest side, in pixels.
        score_thresh: What is found with a lower score is not reported.

    Example:
        >>> type(FasterRCNN(num_classes=3, backbone="mobilenet_v3_small", channels=32)).__module__
        'torchvision.models.detection.faster_rcnn'

    Source: Ren et al., Faster R-CNN, arXiv 1506.01497; Lin et al., Feature Pyramid Networks, arXiv 1612.03144.
    """

    def __new__(  # type: ignore[misc]  # noqa: D102 - what is made is torchvision's
        cls,
        num_classes: int,
        backbone: str = "resnet18",
        channels: int = 64,
        strides: tuple[int, ...] = (4, 8, 16),
        hidden: int = 256,
        min_size: int = 800,
        max_size: int = 1333,
        score_thresh: float = 0.05,
    ) -> nn.Module:
        rcnn = late_import("torchvision.models.detection.faster_rcnn", "torchvision", "detection")
        ops = late_import("torchvision.ops", "torchvision", "detection")
        names = [str(i) for i in range(len(strides))]
        made: nn.Module = rcnn.FasterRCNN(
            pyramid(backbone, channels, strides),
            rpn_anchor_generator=_anchors([(4 * stride,) for stride in _all(strides)], (0.5, 1.0, 2.0)),
            box_roi_pool=ops.MultiScaleRoIAlign(featmap_names=names, output_size=7, sampling_ratio=2),
            box_head=rcnn.TwoMLPHead(channels * 49, hidden),
            box_predictor=rcnn.FastRCNNPredictor(hidden, num_classes + 1),
            min_size=min_size,
            max_size=max_size,
            box_score_thresh=score_thresh,
        )
        return made


def _all(strides: tuple[int, ...]) -> list[int]:
    return [*strides, 2 * strides[-1]]


def _anchors(sizes: list[tuple[int, ...]], shapes: tuple[float, ...]) -> Any:
    utils = late_import("torchvision.models.detection.anchor_utils", "torchvision", "detection")
    return utils.AnchorGenerator(tuple(sizes), (shapes,) * len(sizes))
