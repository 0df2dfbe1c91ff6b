"""Keypoints of one person, face or thing in an image, with any network that finds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_kd import keypoints
from lightning_kd.drawing import Drawing, dotted, enlarged, palette
from lightning_kd.metrics.keypoints import PCK, KeypointPrecision, NormalizedError
from lightning_kd.numbers import is_number, is_whole
from lightning_kd.task import UNLABELLED, TaskAdapter, check_given


class Labelled(NamedTuple):
    """What is known of a batch.

    Attributes:
        points: ``(B, K, 2)``, x and y in pixels of the input.
        visible: ``(B, K)``.
        area: ``(B,)`` in square pixels, or None.
    """

    points: Tensor
    visible: Tensor
    area: Tensor | None


class Pose(TaskAdapter):
    """Keypoints: K joints in each image, by heatmaps, SimCC or coordinates.

    A batch is images ``(B, 3, H, W)`` and ``(B, K, 3)`` of x, y and visibility, as COCO has it; or points ``(B, K, 2)``
    and visibilities ``(B, K)``; or a dict of ``points``, ``visible`` and, where known, ``area (B,)``. Points are pixels
    of the input, from its left upper corner.

    Which joints count: those with ``visible > 0`` (1 is hidden, 2 is seen: both have a place) that lie inside of the
    image. A joint with 0 has no label, and counts nowhere: neither in the loss and the metrics nor in any term. A joint
    with -100 was not looked for, and its place is not read: terms use what is said of it, unless they ask for the true
    ``points`` (``losses.ALoss``). Terms on what is said of joints need ``losses.Jointwise``.

    Networks may return :class:`~lightning_kd.keypoints.Heatmaps`, :class:`~lightning_kd.keypoints.SimCC` or
    :class:`~lightning_kd.keypoints.Coordinates` (``models.PoseNet``), anything with such fields (Hugging Face's
    ``VitPoseForPoseEstimation``), or the bare tensors.

    Terms may name, of ``PoseNet``, ``heatmaps``, ``simcc`` (both axes), ``simcc_x``, ``simcc_y``, ``coordinates`` and
    ``features.<i>``, the stages of the backbone; of Hugging Face ``heatmaps`` and, if its configuration says
    ``output_hidden_states=True``, ``features.<i>``.

    Metrics: ``nme`` (mean distance in units of the image's scale), ``pck`` (the fraction of joints within ``threshold``
    of the scale), and with ``oks_sigmas`` ``oks_ap``, ``oks_ap50``, ``oks_ap75``.

    Args:
        num_keypoints: Number of joints K.
        scale: What distances are measured by: two joints, such as the outer corners of the eyes (36, 45) of 68 points,
            or ``"box"``, the square root of the area of the box around the joints that count.
        threshold: Of ``pck``.
        sigma: Of the Gaussian around a joint, as a fraction of the side; see :func:`lightning_kd.keypoints.loss`.
        oks_sigmas: Of each joint, COCO's constants; the area is the batch's, or that of the box around the joints.

    Raises:
        ValueError: If the arguments are out of range, or the batch or the output does not fit.

    Example:
        >>> task = Pose(num_keypoints=2)
        >>> target = torch.tensor([[[8.0, 8.0, 2.0], [0.0, 0.0, 0.0]]])
        >>> round(float(task.loss(torch.full((1, 2, 2), 0.75), (torch.zeros(1, 3, 16, 16), target))), 4)
        0.5
    """

    main_metric = "nme"

    def __init__(
        self,
        num_keypoints: int,
        scale: Literal["box"] | tuple[int, int] = "box",
        threshold: float = 0.1,
        sigma: float | None = None,
        oks_sigmas: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_given(num_keypoints, "num_keypoints")
        if num_keypoints < 1:
            raise ValueError(f"num_keypoints is the number of joints, 1 or more; got {num_keypoints}.")
        pair = None if scale == "box" else tuple(scale)
        known = pair is None or all(is_whole(joint) and 0 <= joint < num_keypoints for joint in pair)
        if not known or (pair is not None and not len(set(pair)) == len(pair) == 2):
            raise ValueError(f"scale is 'box' or two of the joints 0 to {num_keypoints - 1}; got {scale!r}.")
        if oks_sigmas is not None and not (
            len(oks_sigmas) == num_keypoints and all(is_number(each) and each > 0 for each in oks_sigmas)
        ):
            raise ValueError(
                f"oks_sigmas: expected {num_keypoints} positive numbers, one per joint; got {[*oks_sigmas]}."
            )
        if sigma is not None and not (is_number(sigma) and 0 < sigma < 1):
            raise ValueError(f"sigma is a fraction of the image's side, in (0, 1); got {sigma!r}.")
        self.num_keypoints = num_keypoints
        self.scale = pair
        self.threshold = threshold
        self.sigma = sigma
        self.oks_sigmas = None if oks_sigmas is None else list(oks_sigmas)
        self.known: Tensor | None
        self.register_buffer("known", None, persistent=False)  # of a teacher: it follows to the device
        self._own: Tensor | None = None  # likewise of the network that was called last

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Calls the model; of one that knows some of the joints, ``models.PartExperts``, the metrics are of those."""
        known = getattr(model, "known", None)
        self._own = known if isinstance(known, Tensor) else None
        return super().forward(model, batch)

    def target(self, batch: Any) -> Labelled:
        """Returns what is known of a batch, whichever way it is given."""
        given, area = super().target(batch), None
        if isinstance(given, Mapping):
            points, visible, area = given["points"], given["visible"], given.get("area")
        elif isinstance(given, Tensor):
            points, visible = given[..., :2], given[..., 2:].squeeze(-1)
        else:
            points, visible = given
        expected = (len(points), self.num_keypoints)
        if points.shape != (*expected, 2) or visible.shape != expected:
            raise ValueError(
                f"Pose(num_keypoints={self.num_keypoints}) wants labels (B, {self.num_keypoints}, 3) of x, y and "
                f"visibility, or these apart; got points {tuple(points.shape)} and visibilities {tuple(visible.shape)}."
            )
        points = points.as_subclass(Tensor)
        return Labelled(points if points.is_floating_point() else points.float(), visible.as_subclass(Tensor), area)

    def labels(self) -> dict[str, Callable[[Any], Any]]:
        """Offers losses which ``joints`` count, bool ``(B, K)``, and true ``points`` in fractions of the image.

        NaN stands where there is no true point.
        """
        return {"index": self.index, "joints": self.joints, "points": self.truth}

    def joints(self, batch: Any) -> Tensor:
        """Returns the joints that count in terms, bool ``(B, K)``: the labelled ones, and those not looked for."""
        joints = self._counted(batch) | (self.target(batch).visible == UNLABELLED)
        return joints if self.known is None else joints & self.known

    def places(self, batch: Any) -> Tensor:
        """Returns the true points ``(B, K, 2)`` in fractions of the image."""
        points = self.target(batch).points
        height, width = self.inputs(batch).shape[-2:]
        return torch.stack((points[..., 0] / width, points[..., 1] / height), dim=-1)

    def truth(self, batch: Any) -> Tensor:
        """Returns the same, NaN of joints that have no label inside of the image."""
        return self.places(batch).where(self._counted(batch).unsqueeze(-1), torch.nan)

    def _counted(self, batch: Any) -> Tensor:
        """Returns which joints have a label and are inside of the image."""
        places = self.places(batch)
        return (self.target(batch).visible > 0) & ((places >= 0) & (places < 1)).all(-1)

    def meet(self, student: nn.Module, teacher: nn.Module) -> None:
        """Remembers the joints that the teacher knows, if it says so: ``models.PartExperts``."""
        known = getattr(teacher, "known", None)
        self.known = known.clone() if isinstance(known, Tensor) else None

    def said(self, output: Any) -> keypoints.Said:
        """Returns what a network returned, as one of the three kinds; override it for another network."""
        said = keypoints.said(output)
        if said[0].shape[1] != self.num_keypoints:
            raise ValueError(
                f"Pose(num_keypoints={self.num_keypoints}) and a network that says something of {said[0].shape[1]} "
                "joints: give both, and the data, the same number."
            )
        return said

    def _of_own(self, values: Tensor, other: float) -> Tensor:
        """Returns ``(B, K)`` with another value at the joints that the network which was called last does not know."""
        return values if self._own is None else values.where(self._own, other)

    def loss(self, output: Any, batch: Any) -> Tensor:
        """Returns the supervised loss over the joints that count."""
        counted = self._of_own(self._counted(batch), False)
        return keypoints.loss(self.said(output), self.places(batch), counted, self.sigma)

    def metrics(self) -> MetricCollection:
        """Returns the error, the fraction of correct keypoints and, where asked, COCO's precision."""
        found: dict[str, Metric | MetricCollection] = {"nme": NormalizedError(), "pck": PCK(self.threshold)}
        if self.oks_sigmas is not None:
            found["oks"] = KeypointPrecision(self.oks_sigmas)
        return MetricCollection(found, compute_groups=False)

    def update(self, metrics: MetricCollection, output: Any, batch: Any) -> None:
        """Updates the metrics with the places that were found."""
        points, _, area = self.target(batch)
        places, scores = keypoints.decode(self.said(output))
        counted, scores = self._of_own(self._counted(batch), False), self._of_own(scores, 0.0)
        height, width = self.inputs(batch).shape[-2:]
        box = _box_area(points, counted)
        if self.scale is None:
            scale = box.sqrt()
        else:
            one, other = self.scale
            distance = torch.linalg.vector_norm(points[:, one] - points[:, other], dim=-1)
            scale = distance.where(counted[:, one] & counted[:, other], 0.0)
        metrics.update(
            predicted=torch.stack((places[..., 0] * width, places[..., 1] * height), dim=-1),
            points=points,
            counted=counted,
            scale=scale,
            scores=scores,
            area=box if area is None else area,
        )

    def predict(self, output: Any) -> Tensor:
        """Returns x, y in fractions of the image and a score of each joint, ``(B, K, 3)``."""
        places, scores = keypoints.decode(self.said(output))
        return torch.cat((places, scores.unsqueeze(-1)), dim=-1)

    def predict_batch(self, output: Any, batch: Any) -> Tensor:
        """Returns x, y in pixels of the image and a score of each joint, ``(B, K, 3)``."""
        x, y, score = self.predict(output).unbind(-1)
        height, width = self.inputs(batch).shape[-2:]
        return torch.stack((x * width, y * height, score), dim=-1)

    def draw(self, images: Sequence[Tensor], batch: Any, prediction: Any = None) -> Drawing | None:
        """Returns the images with the true points that count, and lines from there to what was predicted."""
        points, counted = self.target(batch).points.cpu(), self._counted(batch).cpu()
        true, said = palette(4)[3], palette(1)[0]
        pictures = []
        for i, image in enumerate(images):
            picture, factor = enlarged(image)
            size = max(2, min(picture.shape[-2:]) // 100)
            where = factor * points[i, counted[i]]
            if prediction is not None:
                found = factor * prediction[i, counted[i], :2].float().cpu()
                picture = dotted(picture, found, said, size, joined=where)
            pictures.append(dotted(picture, where, true, size))
        legend = {"true": true} if prediction is None else {"true": true, "predicted": said}
        return Drawing(pictures, legend)

    def knowledge(self, model: nn.Module) -> Mapping[str, str]:
        """Offers what is said of the joints, and the features."""
        model = getattr(model, "_orig_mod", model)
        if "transformers" in {kind.__module__.partition(".")[0] for kind in type(model).__mro__}:
            config: Any = model.config
            shown = getattr(config, "output_hidden_states", False)
            layers = getattr(getattr(config, "backbone_config", None), "num_hidden_layers", 0) if shown else 0
            hidden = {f"features.{i}": f"output.hidden_states[{i}]" for i in range(layers)}
            return {"heatmaps": "output.heatmaps", **hidden}
        offered = {
            name: f"output.{name}"
            for kind in (keypoints.Heatmaps, keypoints.SimCC, keypoints.Coordinates)
            for name in kind._fields
        }
        stages = getattr(getattr(getattr(model, "backbone", None), "feature_info", None), "out_indices", ())
        features = {f"features.{i}": f"backbone[{i}]" for i in range(len(stages))}
        return {**offered, "simcc": "output[:]", **features}


def _box_area(points: Tensor, counted: Tensor) -> Tensor:
    """Returns the area of the box around the points that count, ``(B,)``; 0 around none."""
    there = counted.unsqueeze(-1)
    high = points.where(there, -torch.inf).amax(1)
    low = points.where(there, torch.inf).amin(1)
    area: Tensor = (high - low).clamp(min=0.0).prod(-1)
    return area
