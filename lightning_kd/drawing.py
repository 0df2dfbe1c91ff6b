"""What tasks draw with: images as they look, colours of classes, and what becomes of both."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_kd.extras import late_import

Colour = tuple[int, int, int]
"""Red, green, blue, from 0 to 255."""

FIRST: tuple[Colour, ...] = (
    (230, 85, 60), (40, 120, 200), (245, 185, 40), (45, 160, 95), (160, 85, 185), (65, 195, 205),
    (240, 130, 175), (140, 95, 60), (165, 200, 60), (95, 100, 215), (20, 115, 115), (150, 30, 60),
)  # fmt: skip
GREY: Colour = (110, 110, 110)
LEFT_OUT = "does not count"
"""Colour and name of what is in no metric."""

HEAT: tuple[Colour, ...] = ((40, 60, 150), (140, 60, 160), (225, 70, 70), (250, 160, 40), (255, 240, 110))
"""From nothing to the most."""

SMALLEST_SIDE = 320
"""Pixels; of a smaller image lines and letters would hide what they are about."""


class Drawing(NamedTuple):
    """Pictures of some images.

    Attributes:
        images: Of each, ``(3, H, W)`` uint8.
        legend: Names, and the colours in which they were drawn.
        captions: A line for each image; none where the picture says all.
        of: Which of the given images these are; all of them unless said.
        title: What is drawn, where it is not what one network predicts by itself.
    """

    images: Sequence[Tensor]
    legend: Mapping[str, Colour] = {}
    captions: Sequence[str] = ()
    of: Sequence[int] | None = None
    title: str = ""


def looks(images: Any, mean: Any = None, std: Any = None) -> list[Tensor] | None:
    """Returns images as a person sees them, ``(3, H, W)`` uint8 each; None where they are none.

    Bytes and floats in [0, 1] are as they are. Others were normalised: that is undone by ``mean`` and ``std`` of the
    pixels in [0, 1], or, where these are not known, by stretching what there is from 0 to 1.

    Args:
        images: ``(B, C, H, W)``, or a list of ``(C, H, W)``, grey or RGB.
        mean: Of each channel.
        std: Of each channel.

    Example:
        >>> looks(torch.tensor([[[[-1.0]], [[0.0]], [[1.0]]]]), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))[0].flatten()
        tensor([  0, 128, 255], dtype=torch.uint8)
    """
    listed = list(images) if isinstance(images, (Tensor, list, tuple)) else []
    if not listed or not all(isinstance(i, Tensor) and i.ndim == 3 and i.shape[0] in (1, 3) for i in listed):
        return None
    return [_looks(image.detach().cpu(), mean, std).expand(3, -1, -1) for image in listed]


def _looks(image: Tensor, mean: Any, std: Any) -> Tensor:
    if image.dtype == torch.uint8:
        return image
    image = image.float()
    if image.min() < 0 or image.max() > 1:
        if mean is not None and std is not None:
            mean, std = (torch.as_tensor(each, dtype=torch.float32).view(-1, 1, 1) for each in (mean, std))
            image = image * std + mean
        else:
            image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)
    return image.clamp(0, 1).mul(255).round().to(torch.uint8)


def palette(count: int) -> list[Colour]:
    """Returns that many colours: a chosen dozen, then hues at the golden angle.

    Example:
        >>> len(set(palette(150)))
        150
    """
    more = (colorsys.hsv_to_rgb(k * 0.618034 % 1, (0.85, 0.6)[k % 2], (0.95, 0.7)[k // 2 % 2]) for k in range(count))
    found = [*FIRST, *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in more)]
    return found[:count]


def in_order(legend: Mapping[str, Colour]) -> dict[str, Colour]:
    """Returns a legend in the order of the classes that ``palette`` gave the colours to; others follow.

    Example:
        >>> first, second = palette(2)
        >>> list(in_order({"does not count": GREY, "b": second, "a": first}))
        ['a', 'b', 'does not count']
    """
    rank = {colour: k for k, colour in enumerate(palette(1000))}
    return dict(sorted(legend.items(), key=lambda entry: rank.get(entry[1], len(rank))))


def spread(length: int, count: int) -> list[int]:
    """Returns places in a sequence, evenly spread: ``count`` of them, or all.

    Example:
        >>> spread(12, 4), spread(2, 4)
        ([1, 4, 7, 10], [0, 1])
    """
    count = min(count, length)
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def enlarged(image: Tensor, factor: int | None = None) -> tuple[Tensor, int]:
    """Returns an image ``(..., H, W)`` whose pixels are repeated, until a drawing on it is legible, and how often.

    Example:
        >>> enlarged(torch.zeros(3, 64, 80))[0].shape
        torch.Size([3, 320, 400])
    """
    factor = factor or -(-SMALLEST_SIDE // min(image.shape[-2:]))
    return image.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1), factor


def coloured(image: Tensor, masks: Tensor, colours: Sequence[Colour], left_out: Tensor | None = None) -> Tensor:
    """Returns an image, grey, under masks; what is left out is striped.

    Args:
        image: ``(3, H, W)`` uint8.
        masks: ``(K, h, w)`` bool.
        colours: K of them.
        left_out: ``(h, w)`` bool.
    """
    draw = late_import("torchvision.utils", "torchvision", "segmentation").draw_segmentation_masks
    image, _ = enlarged(image)
    height, width = image.shape[-2:]
    layers = masks if left_out is None else torch.cat([masks, left_out[None]])
    layers = F.interpolate(layers[None].float(), size=(height, width), mode="nearest")[0].bool()
    masks = layers[: len(masks)]
    # Grey and soft, or the image's colours would mix with those of the masks.
    image = image.float().mean(dim=0).mul(0.7).add(55).to(torch.uint8).expand(3, -1, -1)
    if masks.any():
        image = draw(image, masks, alpha=0.78, colors=list(colours))
    if left_out is not None and layers[-1].any():
        stripe = (torch.arange(height)[:, None] + torch.arange(width)) // max(4, min(height, width) // 60) % 3 == 0
        image = draw(image, layers[-1:], alpha=0.7, colors=[GREY])
        image = draw(image, (layers[-1] & stripe)[None], alpha=0.9, colors=[(225, 225, 225)])
    return image


def heated(image: Tensor, heat: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns an image, grey, under a heat map: blue where it is 0, then red, to yellow where it is 1.

    Args:
        image: ``(3, H, W)`` uint8.
        heat: ``(H, W)``, in [0, 1].
        mask: ``(H, W)`` bool; its outline is drawn in white.

    Example:
        >>> heated(torch.zeros(3, 2, 2, dtype=torch.uint8), torch.eye(2)).shape
        torch.Size([3, 320, 320])
    """
    image, factor = enlarged(image)
    heat = F.interpolate(heat[None, None].float(), image.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
    colours = torch.tensor(HEAT, device=heat.device).float()
    place = heat.clamp(0, 1) * (len(HEAT) - 1)
    low = place.floor().long().clamp(max=len(HEAT) - 2)
    share = (place - low).unsqueeze(-1)
    colour = ((1 - share) * colours[low] + share * colours[low + 1]).movedim(-1, 0)
    strength = (0.25 + 0.45 * heat.clamp(0, 1)).to(image.device)
    drawn = (1 - strength) * image.float().mean(0) + strength * colour.to(image.device)
    if mask is not None and mask.any():
        wide = enlarged(mask, factor)[0][None, None].float()
        radius = max(2, min(image.shape[-2:]) // 160)
        outline = F.max_pool2d(wide, 2 * radius + 1, stride=1, padding=radius)[0, 0].bool() & ~wide[0, 0].bool()
        drawn = torch.where(outline.to(drawn.device), 255.0, drawn)
    return drawn.round().to(torch.uint8)


def framed(image: Tensor, boxes: Tensor, texts: Sequence[str], colours: Sequence[Colour]) -> Tensor:
    """Returns an image with boxes, and texts at them where there are any.

    Args:
        image: ``(3, H, W)`` uint8.
        boxes: ``(n, 4)``, x1 y1 x2 y2 in pixels of the image.
        texts: n of them.
        colours: n of them.
    """
    draw = late_import("torchvision.utils", "torchvision", "detection").draw_bounding_boxes
    font = late_import("matplotlib.font_manager", "matplotlib", "detection").findfont("DejaVu Sans")
    image, factor = enlarged(image)
    if not len(boxes):
        return image
    side = min(image.shape[-2:])
    return draw(  # type: ignore[no-any-return]
        image, boxes * factor, [text or None for text in texts], list(colours), width=max(2, side // 130), font=font,
        font_size=max(10, side // 26), label_colors=["white"] * len(boxes), label_background_colors=list(colours),
        fill_labels=True,
    )  # fmt: skip


def tiled(images: Sequence[Tensor], colours: Sequence[Colour]) -> Tensor:
    """Returns up to four images of one size as the quarters of a larger one, each in a frame of its colour.

    Args:
        images: ``(3, H, W)`` uint8; the quarters of those that are missing are white.
        colours: One for each.

    Example:
        >>> tiled([torch.zeros(3, 160, 160, dtype=torch.uint8)], [GREY]).shape
        torch.Size([3, 688, 688])
    """
    quarters = []
    for image, colour in zip(images, colours, strict=True):
        large, _ = enlarged(image)
        width = max(4, min(large.shape[-2:]) // 40)
        height, breadth = (side + 2 * width for side in large.shape[1:])
        quarter = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).repeat(1, height, breadth)
        quarter[:, width:-width, width:-width] = large
        quarters.append(F.pad(quarter, [width // 2] * 4, value=255))
    quarters += [torch.full_like(quarters[0], 255)] * (4 - len(quarters))
    return torch.cat([torch.cat(quarters[:2], dim=2), torch.cat(quarters[2:], dim=2)], dim=1)


def dotted(image: Tensor, points: Tensor, colour: Colour, radius: int = 2, joined: Tensor | None = None) -> Tensor:
    """Returns an image with dots, each with a line to another point if that is given.

    Args:
        image: ``(3, H, W)`` uint8.
        points: ``(n, 2)``, x and y in pixels of the image.
        colour: Of dots and lines.
        radius: Of a dot, in pixels.
        joined: ``(n, 2)``, where the lines end.
    """
    draw = late_import("torchvision.utils", "torchvision", "pose").draw_keypoints
    if not len(points):
        return image
    if joined is not None:
        pairs = torch.stack((points, joined), dim=1)
        image = draw(image, pairs, connectivity=[(0, 1)], colors=colour, radius=0, width=max(1, radius // 2))
    return draw(image, points.unsqueeze(0), colors=colour, radius=radius)  # type: ignore[no-any-return]
