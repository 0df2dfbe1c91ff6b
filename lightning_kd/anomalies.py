"""What detectors of anomalies say: a map and a score of each image; and how the difference of two networks says it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kd.extras import late_import
from lightning_kd.losses.stfpm import half_squared_distance
from lightning_kd.numbers import is_number
from lightning_kd.projectors import resize
from lightning_kd.taps import Record, Taps
from lightning_kd.teachers.base import made_by
from lightning_kd.wiring import Levels, Path, describe

Combine = Literal["product", "sum"]

Layers = Sequence[str] | Sequence[Sequence[str]]
"""Paths of layers; in lists, each list gives a map of its own."""

Weights = Sequence[float] | Sequence[Sequence[float]]
"""Of each level; in lists where the layers are."""


class AnomalyMaps(NamedTuple):
    """What is said of each image; the fields are called as anomalib calls them.

    Attributes:
        anomaly_map: ``(B, H, W)``, larger where something is less normal; of no certain scale.
        pred_score: ``(B,)``, of the whole image.
    """

    anomaly_map: Tensor
    pred_score: Tensor


def said(output: Any) -> AnomalyMaps | None:
    """Returns what a network said of the images; None where it says nothing of anomalies, but returns features, say.

    A map is a tensor ``(B, 1, H, W)`` or ``(B, H, W)``, or the field ``anomaly_map`` of what anomalib's models return.
    Without a field ``pred_score`` the score is the largest value of the map.

    Example:
        >>> said(torch.tensor([[[[1.0, 3.0]]]])).pred_score
        tensor([3.])
    """
    found = output if isinstance(output, Tensor) else getattr(output, "anomaly_map", None)
    if not isinstance(found, Tensor) or found.ndim not in (3, 4) or (found.ndim == 4 and found.shape[1] != 1):
        return None
    maps = found.flatten(1, 2) if found.ndim == 4 else found
    score = getattr(output, "pred_score", None)
    return AnomalyMaps(maps, score.flatten() if isinstance(score, Tensor) else maps.flatten(1).amax(1))


def difference(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    size: tuple[int, int],
    combine: Combine = "product",
    weights: Sequence[float] | None = None,
    align_corners: bool = False,
) -> AnomalyMaps:
    """Returns how student and teacher differ in the directions of their features.

    Of each level it is half the squared distance of the unit vectors of a position, interpolated to the image's size;
    the levels are multiplied (STFPM, arXiv 2103.04257, eq. 4) or added (RD4AD, arXiv 2201.10703, eq. 4, where it is
    written as one minus the cosine, which is the same).

    Args:
        student: Levels ``(B, C, H, W)``.
        teacher: The same levels of the teacher, of the same shapes.
        size: Height and width of the image.
        combine: How the levels become one map.
        weights: Of the levels in their sum; 1 unless given.
        align_corners: How levels are interpolated: False as in STFPM, True as in the code of RD4AD's authors.

    Raises:
        ValueError: If there are not as many weights as levels.

    Example:
        >>> x = torch.randn(2, 3, 4, 4)
        >>> bool(difference([x], [2 * x], (8, 8)).pred_score.max() < 1e-6)
        True
    """
    apart = (half_squared_distance(s, t).unsqueeze(1) for s, t in zip(student, teacher, strict=True))
    levels = [F.interpolate(a, size, mode="bilinear", align_corners=align_corners).squeeze(1) for a in apart]
    if weights is not None:
        if len(weights) != len(levels):
            raise ValueError(
                f"weights: {len(weights)} were given, and {len(levels)} levels are compared: one for each."
            )
        levels = [weight * level for weight, level in zip(weights, levels, strict=True)]
    stacked = torch.stack(levels)
    maps = stacked.prod(0) if combine == "product" else stacked.sum(0)
    return AnomalyMaps(maps, maps.flatten(1).amax(1))


class StudentTeacher(nn.Module):
    """A detector that is made of a student and its teacher: where their features differ, something is not normal.

    It is what runs when a student that was trained by :class:`~lightning_kd.tasks.AnomalyDetection` with
    ``difference`` is used: one network of images, which can be exported. In training mode it returns the student's
    output alone.

    Args:
        student: The student.
        teacher: Its teacher, which stands still; or the student, of which one part imitates another (reverse
            distillation): then it runs once.
        levels: Paths of what is compared, in both networks; or lists of them, whose maps are multiplied.
        teacher_levels: Paths in the teacher, where they are others.
        combine: ``"product"`` of the levels' maps, as STFPM has it, or ``"sum"``; in lists, of those in a list.
        smoothing: Standard deviation in pixels of a Gaussian that smooths the map: 4 in RD4AD.
        teacher_input: Makes what the teacher is called with out of the images: a tensor, a tuple of positional
            arguments or a dict of keyword arguments.
        weights: Of the levels in their sum, in lists where the levels are; 1 unless given.
        align_corners: How levels are interpolated: False as in STFPM, True as in the code of RD4AD's authors.

    Raises:
        ValueError: If a path is unknown, the two sides do not fit, smoothing is negative, or there are weights of
            what is no sum.
        ModuleNotFoundError: If the map is to be smoothed, without torchvision.

    Example:
        >>> detector = StudentTeacher(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), ["output"]).eval()
        >>> detector(torch.randn(2, 3, 16, 16)).anomaly_map.shape
        torch.Size([2, 16, 16])
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        levels: Layers,
        teacher_levels: Layers | None = None,
        combine: Combine = "product",
        smoothing: float = 0.0,
        teacher_input: Callable[..., Any] | None = None,
        weights: Weights | None = None,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher if teacher is student else teacher.eval()
        self.combine: Combine = combine
        self.smoothing = checked_smoothing(smoothing)
        self.teacher_input = teacher_input
        self.weights = checked_weights(weights, combine, levels)
        self.align_corners = align_corners
        self._levels, self._teacher_levels = (
            [[Path(text) for text in each] for each in grouped(side)] for side in (levels, teacher_levels or levels)
        )
        self._taps: tuple[Taps, Taps] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_taps": None}

    def train(self, mode: bool = True) -> StudentTeacher:
        """Sets the student's mode; the teacher's is always that of evaluation."""
        super().train(mode)
        if self.teacher is not self.student:
            self.teacher.eval()
        return self

    def forward(self, images: Tensor) -> Any:
        """Returns :class:`AnomalyMaps` of images ``(B, C, H, W)``; in training what the student returns."""
        if self.training:
            return self.student(images)
        size, found = (images.shape[-2], images.shape[-1]), []
        weights = grouped(self.weights) if self.weights is not None else [None] * len(self._levels)
        for student, teacher, weigh in zip(*self._read(images), weights, strict=True):
            shapes = [[tuple(level.shape[1:]) for level in side] for side in (student, teacher)]
            if len(shapes[0]) != len(shapes[1]) or any(s[0] != t[0] for s, t in zip(*shapes, strict=True)):
                raise ValueError(
                    f"what is compared has the shapes {shapes[0]} in the student and {shapes[1]} in the teacher: "
                    "expected the same number of levels, each with the same channels. Name levels that belong "
                    "together; a student with other channels needs a last layer of its own that has the teacher's."
                )
            fitted = [resize(s, (t.shape[-2], t.shape[-1])) for s, t in zip(student, teacher, strict=True)]
            differ = difference(fitted, teacher, size, self.combine, weigh, self.align_corners)
            found.append(differ.anomaly_map)
        maps = torch.stack(found).prod(0)
        if self.smoothing:
            functional = late_import("torchvision.transforms.v2.functional", "torchvision", "anomaly")
            width = 2 * math.ceil(4 * self.smoothing) + 1
            kernel, sigma = [width, width], [self.smoothing, self.smoothing]
            maps = functional.gaussian_blur(maps.unsqueeze(1), kernel, sigma).squeeze(1)  # of any number of images
        return AnomalyMaps(maps, maps.flatten(1).amax(1))

    def _read(self, images: Tensor) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Returns the levels of both sides, list by list."""
        sides = self._levels, self._teacher_levels
        ours, theirs = ({path.module for paths in side for path in paths} for side in sides)
        itself = self.teacher is self.student
        if self._taps is None:
            one = Taps(self.student, ours | theirs if itself else ours, "the student")
            self._taps = one, one if itself else Taps(self.teacher, theirs, "the teacher")
        record = answer = _record(self._taps[0], (images,), {})
        if not itself:
            with torch.no_grad():
                given: Any = (images,), {}
                args, kwargs = made_by(self.teacher_input, *given)
                answer = _record(self._taps[1], args, kwargs)
        return (
            [_maps(record, paths, "the student") for paths in self._levels],
            [_maps(answer, paths, self._taps[1].owner) for paths in self._teacher_levels],
        )


def grouped(levels: Sequence[Any]) -> list[list[Any]]:
    """Returns lists of paths, each of which gives a map of its own, or of their weights; of such alone, one list.

    Example:
        >>> grouped(["a", "b"]), grouped([["a"], ["b", "c"]]), grouped([1.0, 2.0])
        ([['a', 'b']], [['a'], ['b', 'c']], [[1.0, 2.0]])
    """
    if not any(_is_list(each) for each in levels):
        return [[*levels]]
    return [[*each] if _is_list(each) else [each] for each in levels]


def _is_list(level: object) -> bool:
    return isinstance(level, Sequence) and not isinstance(level, str)


def checked_weights(weights: Weights | None, combine: Combine, layers: Layers) -> Weights | None:
    """Returns weights of levels that are added, each a number that is not negative."""
    if weights is None:
        return None
    given: object = weights
    in_lists = any(map(_is_list, layers))
    fit = isinstance(given, Sequence) and all(isinstance(each, Sequence) == in_lists for each in given)
    lists = grouped(weights) if fit else []
    if (
        combine != "sum"
        or len(lists) != len(grouped(layers))
        or not all(each and all(is_number(w) and w >= 0 for w in each) for each in lists)
    ):
        raise ValueError(
            "weights are numbers, one for each level of a difference whose levels are added (combine='sum'); of lists "
            f"of layers a list for each; got {weights!r} with combine={combine!r} and the layers {[*layers]}."
        )
    return lists if in_lists else lists[0]


def checked_smoothing(smoothing: float) -> float:
    """Returns a standard deviation that is a number, and not negative."""
    if not (is_number(smoothing) and smoothing >= 0):
        raise ValueError(f"smoothing is a standard deviation in pixels, 0 for none; got {smoothing!r}.")
    return smoothing


def _record(taps: Taps, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Record:
    """Returns what was captured of a network that is called so."""
    # What is left by an exception has no graph.
    taps.stop_early = not (torch.compiler.is_exporting() or torch._C._get_tracing_state())
    taps.attach()
    try:
        return taps.run(*args, **kwargs)
    finally:
        taps.detach()


def _maps(record: Record, paths: Sequence[Path], owner: str) -> list[Tensor]:
    """Returns the maps at the paths, in their order."""
    levels: list[Any] = []
    for path in paths:
        found = path.select(record[path.module][-1])
        levels.extend(found if isinstance(found, Levels) else [found])
    for level in levels:
        if not isinstance(level, Tensor) or level.ndim != 4:
            raise ValueError(
                f"{', '.join(path.text for path in paths)} of {owner} is {describe(level)}: expected maps "
                "(B, C, H, W). Name convolutional layers, or a list of maps with [:] behind its name."
            )
    return levels
