"""Anomaly detection: maps and scores of what is not normal, by one network or by the difference of two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from lightning_kd.anomalies import (
    AnomalyMaps,
    Combine,
    Layers,
    StudentTeacher,
    Weights,
    checked_smoothing,
    checked_weights,
    said,
)
from lightning_kd.drawing import HEAT, Drawing, heated
from lightning_kd.metrics.anomaly import AnomalyQuality
from lightning_kd.task import TaskAdapter


class Known(NamedTuple):
    """What is known of a batch.

    Attributes:
        mask: ``(B, H, W)``, bool, True where an anomaly is.
        label: ``(B,)``, bool, True where the image is anomalous.
    """

    mask: Tensor
    label: Tensor


class _Met:
    """The teacher: kept past nn.Module's registration, and not copied with the task, as it stands still.

    None where a student is its own.
    """

    def __init__(self, teacher: nn.Module | None) -> None:
        self.teacher = teacher

    def __deepcopy__(self, memo: dict[int, Any]) -> _Met:
        return self


class AnomalyDetection(TaskAdapter):
    """Detection of anomalies, in images and in their pixels, of networks that learn from normal images.

    There are two kinds of detectors. One network draws an anomaly map: it returns ``(B, 1, H, W)``, or something with a
    field ``anomaly_map``, as anomalib's models do. Or the difference of a student and its teacher is the map (STFPM and
    its like): ``difference`` names the layers whose features are compared, and the terms are on the same. Then the
    teacher runs in evaluation, too; :meth:`deployed` makes one network of both. Without a teacher the student's own
    map is taken, if it draws one.

    A batch is images ``(B, 3, H, W)`` and masks ``(B, H, W)``, True where an anomaly is; or a dict of ``mask`` and
    ``label``, for images that are anomalous and whose mask is empty; or anomalib's ``ImageBatch``. Masks of normal
    images may be left out: ``label`` alone.

    In training anomalies are synthetic, with a mask: a network that draws a map learns them (binary cross entropy of
    its logits), and with ``difference`` terms leave their pixels out. An anomalous image without one is an error. A
    network that returns features only has no loss of its own, and learns from its teacher.

    Metrics: ``image_auroc``, ``pixel_auroc``, ``aupro`` and ``image_f1`` of
    :class:`~lightning_kd.metrics.AnomalyQuality`. Terms may name ``anomaly_map``.

    Args:
        difference: Paths of the layers that are compared, in both networks: ``["layer1", "layer2"]``. Lists of them
            give a map each, and the maps are multiplied: of two students with two teachers (MixedTeacher), say.
        teacher_difference: Those of the teacher, where they are others.
        combine: ``"product"`` of the layers' maps, as STFPM has it, or ``"sum"``, as RD4AD.
        smoothing: Standard deviation in pixels of a Gaussian that smooths the difference: 4 in RD4AD.
        normal_only: Whether the network sees in training the normal images alone, and has no loss: for those that
            remember what is normal, :class:`~lightning_kd.models.MemoryBank`.
        weights: Of the layers' maps in their sum, one for each level that is compared; in lists where the layers are.
        align_corners: How the layers' maps are interpolated: False as in STFPM, True as in the code of RD4AD's authors.

    Raises:
        ValueError: If the batch or what a network returns does not fit.

    Example:
        >>> task = AnomalyDetection()
        >>> images, masks = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.bool)
        >>> round(float(task.loss(torch.zeros(2, 1, 8, 8), (images, masks))), 4)
        0.6931
    """

    main_metric = "image_auroc"
    with_teacher = True

    def __init__(
        self,
        difference: Layers | None = None,
        teacher_difference: Layers | None = None,
        combine: Combine = "product",
        smoothing: float = 0.0,
        normal_only: bool = False,
        weights: Weights | None = None,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        if combine not in ("product", "sum"):
            raise ValueError(f"combine is 'product' or 'sum', got {combine!r}.")
        if (
            isinstance(difference, str)
            or (difference is not None and not difference)
            or ((teacher_difference or smoothing or weights or align_corners) and not difference)
        ):
            raise ValueError(
                f"difference names layers, at least one, in a list: ['layer1', 'layer2']; got {difference!r}."
            )
        self.difference = None if difference is None else list(difference)
        self.teacher_difference = None if teacher_difference is None else list(teacher_difference)
        self.combine: Combine = combine
        self.smoothing = checked_smoothing(smoothing)
        self.normal_only = normal_only
        self.weights = checked_weights(weights, combine, difference or ())
        self.align_corners = align_corners
        self._met: _Met | None = None
        self._detector: list[nn.Module] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_detector": []}

    def meet(self, student: nn.Module, teacher: nn.Module) -> None:
        """Remembers the teacher, of which the student's difference is the map; it may be the student itself."""
        self._met = _Met(None if teacher is student else teacher)
        self._detector = []

    def deployed(self, student: nn.Module) -> nn.Module:
        """Returns one network of student and teacher, where their difference is the map; else the student."""
        if self.difference is None or self._met is None:
            return student
        teacher = self._met.teacher or student
        how = student, teacher, self.difference, self.teacher_difference, self.combine, self.smoothing, self.as_taught
        return StudentTeacher(*how, weights=self.weights, align_corners=self.align_corners)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Calls the model; in evaluation with the teacher beside it, where their difference is the map."""
        images = self.inputs(batch)
        if model.training and self.normal_only:
            return model(images[~self.target(batch).label])
        if model.training or self.difference is None or self._met is None:
            return model(images)
        return self.detector(model, images)(images)

    def detector(self, model: nn.Module, images: Tensor) -> nn.Module:
        """Returns the network of student and teacher, on the images' device; it is made once."""
        if not self._detector or self._detector[0].student is not model:
            self._detector = [self.deployed(model)]
        return self._detector[0].to(images.device).eval()

    def inputs(self, batch: Any) -> Tensor:
        """Returns the images, of anomalib's batches, too."""
        images: Tensor = batch.image if hasattr(batch, "image") else super().inputs(batch)
        return images

    def index(self, batch: Any) -> Any:
        """Returns the samples' indices in the data set, if the batch has them."""
        return None if hasattr(batch, "image") else super().index(batch)

    def target(self, batch: Any) -> Known:
        """Returns where anomalies are, and which images are anomalous, whichever way it is given."""
        images = self.inputs(batch)
        if hasattr(batch, "image"):
            mask, label = batch.gt_mask, batch.gt_label
        else:
            given = super().target(batch)
            mask, label = (given.get("mask"), given.get("label")) if isinstance(given, Mapping) else (given, None)
        shape = (len(images), *images.shape[-2:])
        if label is not None and not (isinstance(label, Tensor) and label.shape == shape[:1]):
            got = tuple(label.shape) if isinstance(label, Tensor) else type(label).__name__
            raise ValueError(
                f"AnomalyDetection wants labels {shape[:1]}, one for each image, True where it is anomalous; got {got}."
            )
        if mask is None and label is not None and not label.any():
            mask = torch.zeros(shape, dtype=torch.bool, device=images.device)
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == 1:
            mask = mask.flatten(1, 2)
        if not isinstance(mask, Tensor) or mask.shape != shape:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"AnomalyDetection wants masks {shape} of the images' size, True where an anomaly is; got {got}. Of "
                "normal images a label alone will do; let the data resize masks with their images."
            )
        mask = mask.as_subclass(Tensor).bool()
        return Known(mask, mask.flatten(1).any(1) if label is None else label.bool())

    def labels(self) -> dict[str, Callable[[Any], Any]]:
        """Offers losses the ``mask`` of the normal pixels where the difference is the map: others stay out."""
        offered: dict[str, Callable[[Any], Any]] = {"index": self.index}
        return offered if self.difference is None else {**offered, "mask": self.normal}

    def normal(self, batch: Any) -> Tensor:
        """Returns the pixels that are normal, bool ``(B, H, W)``.

        Raises:
            ValueError: If an image is anomalous and nothing says where; it is asked on the CPU only.
        """
        mask, label = self.target(batch)
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            hidden = label & ~mask.flatten(1).any(1)
            if hidden.any():
                raise ValueError(
                    f"{int(hidden.sum())} anomalous images in a training batch, and no mask says where: they would be "
                    "learned as normal. Train on normal images; of synthetic anomalies give the mask."
                )
        return ~mask

    def loss(self, output: Any, batch: Any) -> Tensor | None:
        """Returns the loss of a network that draws maps; 0 of one that returns features, where it has a teacher."""
        if not self.training:
            return None
        normal = self.normal(batch)
        if self.normal_only and isinstance(output, Tensor):
            return output.sum() * 0.0
        if isinstance(output, Tensor) and (found := said(output)) is not None:
            if found.anomaly_map.shape != normal.shape:
                raise ValueError(
                    f"AnomalyDetection wants maps {tuple(normal.shape)} of the images' size; the network returned "
                    f"{tuple(output.shape)}. Let it interpolate: torch.nn.functional.interpolate."
                )
            return F.binary_cross_entropy_with_logits(found.anomaly_map.float(), (~normal).float())
        first = next((part for part in _tensors(output) if part.requires_grad), None)
        if self._met is None or first is None:
            raise ValueError(
                f"The network returned {type(output).__name__}, no anomaly map (B, 1, H, W) with a gradient, and there "
                "is no teacher to learn from: nothing would be learned. Give teacher and terms, or a network that "
                "draws a map."
            )
        return first.sum() * 0.0

    def metrics(self) -> MetricCollection:
        """Returns how well anomalies are found."""
        return MetricCollection({"anomaly": AnomalyQuality()})

    def update(self, metrics: MetricCollection, output: Any, batch: Any) -> None:
        """Keeps maps and scores of a batch."""
        maps, scores = self.maps(output)
        mask, label = self.target(batch)
        metrics.update(maps, scores, mask, label)

    def maps(self, output: Any) -> AnomalyMaps:
        """Returns what was said of the images; override it for a network that says it otherwise."""
        found = said(output)
        if found is None:
            raise ValueError(
                f"AnomalyDetection wants an anomaly map in evaluation, (B, 1, H, W) or a field anomaly_map; got "
                f"{type(output).__name__}. For the difference to a teacher name the layers: "
                "AnomalyDetection(difference=['layer1', 'layer2']), and give a teacher that stands still."
            )
        return found

    def predict(self, output: Any) -> AnomalyMaps:
        """Returns a map ``(B, H, W)`` and a score ``(B,)``, larger where something is less normal."""
        return self.maps(output)

    def draw(self, images: Sequence[Tensor], batch: Any, prediction: Any = None) -> Drawing | None:
        """Returns the images under heat maps, each from its least to its largest value; outlines are the truth."""
        masks = self.target(batch).mask.cpu()
        pictures, captions = [], []
        for i, image in enumerate(images):
            if prediction is None:
                heat = masks[i].float()
            else:
                found = prediction.anomaly_map[i].float().cpu()
                heat = (found - found.min()) / (found.max() - found.min()).clamp_min(1e-12)
                captions.append(f"score {float(prediction.pred_score[i]):.3g}")
            pictures.append(heated(image, heat, masks[i]))
        return Drawing(pictures, {} if prediction is None else {"least normal of the image": HEAT[-1]}, captions)

    def knowledge(self, model: nn.Module) -> Mapping[str, str]:
        """Offers ``anomaly_map``: what the model returns, or the field of it that anomalib's models have."""
        model = getattr(model, "_orig_mod", model)
        libraries = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
        return {"anomaly_map": "output.anomaly_map" if "anomalib" in libraries else "output"}


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [part for item in value for part in _tensors(item)] if isinstance(value, (list, tuple)) else []
