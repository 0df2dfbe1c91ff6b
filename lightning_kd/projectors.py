"""Projectors: what bridges a student's tensor to the shape of its teacher's.

Three layouts are told apart by their number of dimensions: vectors ``(B, C)``, tokens ``(B, N, C)`` and
maps ``(B, C, H, W)``. Tokens of a vision transformer are a square grid of patches behind a few prefix
tokens (class, distillation, registers), which have no place in a map. Maps ``(B, H, W, C)`` and sequences
``(B, C, L)`` are for a projector that says so.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kd.sequences import between
from lightning_kd.teacher_layers import TeacherLayers as TeacherLayers  # noqa: PLC0414 - offered here

Align = Literal["none", "map", "size", "shape"]
"""What a loss needs of its two tensors: nothing, the same resolution if they are maps, the same resolution, or the same
shape."""

_PREFIX_TOKENS = (0, 1, 2, 4, 5, 8)  # none; class; class + distillation; class and/or registers


def grid_of(tokens: int) -> tuple[int, int]:
    """Returns (prefix tokens, side) of a square patch grid with ``tokens`` tokens in all.

    Where two readings fit, it is the one with fewer prefix tokens. That is so for 5, 6, 9 and 17 tokens only, whose
    other readings are grids of at most 2x2 behind registers, or 3x3 behind eight: not met in practice, while a class
    token and 4x4 patches are.

    Raises:
        ValueError: If no usual number of prefix tokens leaves a square.

    Example:
        >>> grid_of(197)
        (1, 14)
    """
    for prefix in _PREFIX_TOKENS:
        side = math.isqrt(max(tokens - prefix, 0))
        if side > 0 and side * side == tokens - prefix:
            return prefix, side
    raise ValueError(
        f"{tokens} tokens are not a square grid with {_PREFIX_TOKENS} prefix tokens. Give the term its projector, "
        "such as projectors.TokensToMap(in_channels, out_channels, size=(H, W), grid=(h, w))."
    )


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes a map ``(B, C, H, W)``: averages where it shrinks, interpolates bilinearly where it grows."""
    if tuple(x.shape[-2:]) == size:
        return x
    if x.shape[-2] >= size[0] and x.shape[-1] >= size[1]:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class MapToMap(nn.Module):
    """``(B, C, H, W)`` to ``(B, C', H', W')``: resize, then a 1x1 convolution where the channels differ.

    Args:
        in_channels: The student's channels.
        out_channels: The teacher's channels.
        size: The teacher's (H, W). A projector that a term has built follows the teacher's where images change size.
    """

    def __init__(self, in_channels: int, out_channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        same = in_channels == out_channels
        self.project = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Projects, at the smaller of the two resolutions."""
        size = size or self.size
        smaller = x.shape[-2] * x.shape[-1] < size[0] * size[1]
        out: Tensor = resize(self.project(x), size) if smaller else self.project(resize(x, size))
        return out


class TokensToMap(nn.Module):
    """``(B, N, C)`` to ``(B, C', H', W')``: the patch tokens as a map; prefix tokens are left out.

    Args:
        in_channels: The student's channels.
        out_channels: The teacher's channels.
        size: The teacher's (H, W).
        grid: The student's (h, w) of patches; a square one unless told.
    """

    def __init__(
        self, in_channels: int, out_channels: int, size: tuple[int, int], grid: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.grid = grid
        self.project = MapToMap(in_channels, out_channels, size)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Projects the patch tokens."""
        if self.grid is None:
            side = grid_of(x.shape[1])[1]
            height, width = side, side
        else:
            height, width = self.grid
        patches = x[:, x.shape[1] - height * width :]
        out: Tensor = self.project(patches.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width), size)
        return out


class MapToTokens(nn.Module):
    """``(B, C, H, W)`` to ``(B, h * w, C')``: the map as patch tokens.

    Args:
        in_channels: The student's channels.
        out_channels: The teacher's channels.
        grid: The teacher's (h, w) of patches.
    """

    def __init__(self, in_channels: int, out_channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.project = MapToMap(in_channels, out_channels, grid)

    def forward(self, x: Tensor) -> Tensor:
        """Projects and flattens the map."""
        out: Tensor = self.project(x).flatten(2).transpose(1, 2)
        return out


class TokensToTokens(nn.Module):
    """``(B, N, C)`` to ``(B, h * w, C')`` on another patch grid; prefix tokens are left out.

    Args:
        in_channels: The student's channels.
        out_channels: The teacher's channels.
        grid: The teacher's (h, w) of patches.
    """

    def __init__(self, in_channels: int, out_channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.project = TokensToMap(in_channels, out_channels, grid)

    def forward(self, x: Tensor) -> Tensor:
        """Projects the patch tokens."""
        out: Tensor = self.project(x).flatten(2).transpose(1, 2)
        return out


class PatchTokens(nn.Module):
    """``(B, N, C)`` without its first ``prefix`` tokens.

    Args:
        prefix: How many tokens to leave out.
    """

    def __init__(self, prefix: int = 1) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, x: Tensor) -> Tensor:
        """Returns the patch tokens."""
        return x[:, self.prefix :]


class ChannelsFirst(nn.Module):
    """``(B, H, W, C)`` to ``(B, C, H, W)``: before another projector, for a student such as a Swin transformer."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns a view with the channels in dimension 1."""
        return x.movedim(-1, 1)


class ChannelsLast(nn.Module):
    """``(B, C, H, W)`` to ``(B, H, W, C)``: behind another projector, for a teacher such as a Swin transformer."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns a view with the channels in the last dimension."""
        return x.movedim(1, -1)


class PerLevel(nn.Module):
    """One projector for each level of a pyramid: a list of tensors to a list of tensors.

    Args:
        projectors: The levels' projectors, in their order.

    Raises:
        ValueError: If there are not as many levels as projectors.

    Example:
        >>> import torch
        >>> levels = [torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 2, 2)]
        >>> [tuple(x.shape) for x in PerLevel([nn.Conv2d(8, 16, 1), nn.Identity()])(levels)]
        [(1, 16, 4, 4), (1, 8, 2, 2)]
    """

    def __init__(self, projectors: Iterable[nn.Module]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(projectors)

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Projects level by level."""
        if isinstance(x, Tensor) or len(x) != len(self.levels):
            what = f"one tensor {tuple(x.shape)}" if isinstance(x, Tensor) else f"{len(x)} levels"
            raise ValueError(f"PerLevel has projectors for {len(self.levels)} levels and got {what}.")
        return [projector(level) for projector, level in zip(self.levels, x, strict=True)]


def follow(projector: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    """Projects a student's tensor, a map to the resolution that the teacher's map has in this batch."""
    resizes = isinstance(projector, (MapToMap, TokensToMap)) and teacher.ndim == 4
    out: Tensor = projector(student, tuple(teacher.shape[-2:])) if resizes else projector(student)
    return out


def _channels_last(x: Tensor) -> bool:
    """Tells whether a map is square if its channels come last, and oblong if they come first."""
    return x.ndim == 4 and x.shape[1] == x.shape[2] != x.shape[3]


def _one_shape_of_image(a: Tensor, b: Tensor) -> bool:
    """Tells whether two maps, read with their channels first, are of images with one ratio of height to width."""
    return a.ndim == b.ndim == 4 and a.shape != b.shape and a.shape[2] * b.shape[3] == b.shape[2] * a.shape[3]


def _size(x: Tensor) -> tuple[int, ...]:
    """Returns the shape without batch and channels."""
    return tuple(x.shape[1:-1] if x.ndim == 3 else x.shape[2:])


def bridge(
    student: Tensor, teacher: Tensor, align: Align = "shape", sequences: tuple[bool, bool] = (False, False)
) -> tuple[nn.Module, nn.Module]:
    """Builds what brings a student's tensor to its teacher's shape.

    Args:
        student: A sample of the student's tensor.
        teacher: A sample of the teacher's tensor, for the same batch.
        align: ``"shape"`` for the same channels and resolution, ``"size"`` for the same resolution only, ``"map"`` for
            the same resolution of maps, and whatever else there is as it is.
        sequences: Which of the two is known to be ``(B, C, L)``.

    Returns:
        The student's projector, and what is to be done with the teacher's tensor (it never has parameters).

    Raises:
        ValueError: If the two shapes cannot be bridged; the message gives both and the remedy.

    Example:
        >>> import torch
        >>> projector, _ = bridge(torch.zeros(2, 8, 4, 4), torch.zeros(2, 16, 2, 2))
        >>> projector(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 16, 2, 2])
    """
    if align == "map" and not (student.ndim == teacher.ndim == 4 and student.shape[:2] == teacher.shape[:2]):
        align = "none"
    equal = student.shape == teacher.shape and (student.ndim != 4 or _channels_last(student))
    if align == "none" or (align == "shape" and equal):  # equal maps may differ in a later batch, of other images
        return nn.Identity(), nn.Identity()
    shapes = f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
    if student.shape[:1] != teacher.shape[:1]:
        raise ValueError(f"{shapes} differ in their batch size: the two models did not see the same samples.")
    if any(sequences):
        both = all(sequences)
        which = "these are" if both else f"the {'student' if sequences[0] else 'teacher'}'s is"
        raise ValueError(
            f"{shapes}: {which} (B, C, L), as one-dimensional convolutions return it, and three dimensions are bridged "
            f"as tokens (B, N, C). Give the term its projector{': ' + between(student, teacher, align) if both else ''}"
            f"{'' if both else ', a module that turns the first into the second'}."
        )
    if (_channels_last(student) or _channels_last(teacher)) and not _one_shape_of_image(student, teacher):
        raise ValueError(
            f"{shapes}: maps are (B, C, H, W), and one of these seems to be (B, H, W, C), as the layers of Swin return "
            "them. Give the term its projector: nn.Sequential(projectors.ChannelsFirst(), projectors.MapToMap(...)) "
            "for such a student, nn.Sequential(projectors.MapToMap(...), projectors.ChannelsLast()) for a teacher, "
            "nn.Linear(C, C') for both; nn.Identity() or MapToMap alone if the channels do come first."
        )
    layouts = (student.ndim, teacher.ndim)
    if layouts[0] == layouts[1] and _size(student) == _size(teacher):
        if align == "size" and student.ndim != 4:
            return nn.Identity(), nn.Identity()
        if student.ndim in (2, 3):
            return nn.Linear(student.shape[-1], teacher.shape[-1]), nn.Identity()
    channels_in = student.shape[1] if student.ndim == 4 else student.shape[-1]
    channels_out = teacher.shape[1] if teacher.ndim == 4 else teacher.shape[-1]
    if align == "size":
        channels_out = channels_in
    if layouts == (4, 4):
        return MapToMap(channels_in, channels_out, (teacher.shape[2], teacher.shape[3])), nn.Identity()
    if layouts == (3, 4):
        return TokensToMap(channels_in, channels_out, (teacher.shape[2], teacher.shape[3])), nn.Identity()
    if teacher.ndim == 3 and student.ndim in (3, 4):
        prefix, side = grid_of(teacher.shape[1])
        to_tokens = MapToTokens if student.ndim == 4 else TokensToTokens
        return to_tokens(channels_in, channels_out, (side, side)), PatchTokens(prefix)
    raise ValueError(
        f"{shapes} cannot be bridged automatically (vectors (B, C), tokens (B, N, C) and maps (B, C, H, W) can be, "
        "maps and tokens to each other). Tap other layers, or give the term a projector=nn.Module that turns the "
        "first into the second."
    )
