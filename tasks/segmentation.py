"""Semantic segmentation with any model that turns images into logits per pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryF1Score,
    BinaryJaccardIndex,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MultilabelF1Score,
    MultilabelJaccardIndex,
)
from torchmetrics.wrappers import ClasswiseWrapper

from lightning_kd.drawing import GREY, LEFT_OUT, Drawing, coloured, palette
from lightning_kd.extras import late_import
from lightning_kd.metrics.boundary_f1 import BoundaryF1
from lightning_kd.numbers import is_number, is_whole
from lightning_kd.predictions import LabelMaps, PredictionFile
from lightning_kd.task import UNLABELLED, TaskAdapter, check_given, checked_names


class Segmentation(TaskAdapter):
    """Semantic segmentation: multi-class, binary (one output per pixel) or multi-label.

    Models may return logits ``(B, C, h, w)`` of any stride, a mapping with ``out`` (and ``aux``: torchvision), or
    something with ``logits`` (Hugging Face). Logits are brought to the labels' resolution, bilinearly, for the loss and
    for the metrics. Pixels labelled ``ignore_index`` count nowhere, in no term either; pixels labelled -100 are
    unlabelled: they have no part in the task's own loss, and terms use them.

    Terms may name ``logits``, and ``features.<i>``: of ``segmentation_models_pytorch`` the encoder's output of stride
    ``2 ** i``, of torchvision the backbone's outputs, of Hugging Face the hidden states, if the model's configuration
    says ``output_hidden_states=True``.

    Metrics: ``miou`` (mean over classes of the IoU over all pixels), ``dice`` (mean F1), ``pixel_accuracy``,
    ``boundary_f1``, ``iou/<class>``; binary: ``iou``, ``dice``, ``boundary_f1``; multi-label: ``miou``, ``dice``. In
    tests with a teacher ``agreement``, the fraction of pixels on which student and teacher say the same.

    Args:
        num_classes: Number of classes or labels C; 1 in the binary case.
        mode: ``"multiclass"`` (labels ``(B, H, W)`` of class numbers), ``"binary"`` (of zeros and ones; or
            ``(B, 1, H, W)``), or ``"multilabel"`` (``(B, C, H, W)`` of zeros and ones).
        ignore_index: Label of pixels that do not count; None where all do.
        criterion: Supervised loss of logits and labels at the labels' resolution, such as those of
            ``segmentation_models_pytorch.losses``; default: (binary) cross-entropy.
        dice: Weight of an additional Dice loss.
        aux_weight: Weight of the same loss of the output ``aux``, where the model has one.
        class_names: Names for ``iou/<class>``; default: their numbers.
        boundary_tolerance: Of ``boundary_f1``, in pixels.
        class_weights: Of the default cross-entropy, multi-class: how much a pixel of each class counts. A rare class
            is learned sooner if it has more than a frequent background.

    Raises:
        ValueError: If the arguments contradict each other, or logits or labels are of another kind.
        ModuleNotFoundError: With ``dice``, without segmentation-models-pytorch.

    Example:
        >>> task = Segmentation(num_classes=3, ignore_index=255)
        >>> masks = torch.zeros(2, 8, 8, dtype=torch.long)
        >>> masks[:, :4] = 255
        >>> round(float(task.loss(torch.zeros(2, 3, 2, 2), (torch.rand(2, 3, 8, 8), masks))), 4)
        1.0986
    """

    def __init__(
        self,
        num_classes: int,
        mode: Literal["multiclass", "binary", "multilabel"] = "multiclass",
        ignore_index: int | None = None,
        criterion: nn.Module | None = None,
        dice: float = 0.0,
        aux_weight: float = 0.4,
        class_names: Sequence[str] | None = None,
        boundary_tolerance: int = 2,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_given(num_classes)
        if mode not in ("multiclass", "binary", "multilabel"):
            raise ValueError(f"mode is 'multiclass', 'binary' or 'multilabel'; got {mode!r}.")
        if (num_classes != 1) if mode == "binary" else (num_classes < (2 if mode == "multiclass" else 1)):
            raise ValueError(
                f"num_classes={num_classes} with mode={mode!r}: binary has one output, num_classes=1; background and "
                "object as two classes are multiclass, num_classes=2."
            )
        # -100 is torch's default, and what is left out where no other index is: see UNLABELLED.
        told = getattr(criterion, "ignore_index", ignore_index)
        if criterion is not None and told != ignore_index and (ignore_index is not None or told != UNLABELLED):
            raise ValueError(
                f"{type(criterion).__name__} has ignore_index={criterion.ignore_index} and the task {ignore_index}: "
                "give both the same."
            )
        if criterion is not None and ignore_index is not None and not hasattr(criterion, "ignore_index"):
            raise ValueError(
                f"{type(criterion).__name__} has no ignore_index, and would count the pixels that ignore_index="
                f"{ignore_index} leaves out. Give a loss that takes it, or no criterion."
            )
        if ignore_index is not None and not is_whole(ignore_index):
            raise ValueError(f"ignore_index is a whole number, 255 for one, or None; got {ignore_index!r}.")
        for name, weight in (("dice", dice), ("aux_weight", aux_weight)):
            if not (is_number(weight) and weight >= 0):
                raise ValueError(f"{name} is the weight of a loss, a number that is not negative; got {weight!r}.")
        if class_weights is not None and (mode != "multiclass" or criterion is not None):
            raise ValueError(
                "class_weights are those of the default loss with mode='multiclass'; give another loss its own."
            )
        if class_weights is not None and not (len(class_weights) == num_classes and min(class_weights) > 0):
            raise ValueError(
                f"class_weights: expected {num_classes} positive numbers, one for each class; got {[*class_weights]}."
            )
        self.num_classes = num_classes
        self.mode = mode
        self.ignore_index = ignore_index
        self.criterion = criterion
        self.aux_weight = aux_weight
        self.dice = dice
        self.dice_loss: nn.Module | None = None
        if dice:
            library = late_import("segmentation_models_pytorch", "segmentation-models-pytorch", "segmentation")
            # Pixels without a label are given to it as ignored ones, whichever they are.
            self.dice_loss = library.losses.DiceLoss(mode, ignore_index=self._left_out)
        self.class_names = checked_names(class_names, num_classes)
        self.boundary_tolerance = boundary_tolerance
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)
        self.main_metric = "iou" if mode == "binary" else "miou"

    @property
    def _left_out(self) -> int:
        return UNLABELLED if self.ignore_index is None else self.ignore_index

    def target(self, batch: Any) -> Tensor:
        """Returns the labels, int64: ``(B, H, W)``, multi-label ``(B, C, H, W)``."""
        masks = super().target(batch)
        if self.mode == "binary" and isinstance(masks, Tensor) and masks.ndim == 4 and masks.shape[1] == 1:
            masks = masks[:, 0]
        shape = "(B, C, H, W) of zeros and ones" if self.mode == "multilabel" else "(B, H, W) of class numbers"
        if not isinstance(masks, Tensor) or masks.ndim != (4 if self.mode == "multilabel" else 3):
            got = tuple(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
            raise ValueError(f"mode={self.mode!r} wants labels {shape}; got {got}.")
        if masks.is_floating_point() and self.mode == "multiclass":
            raise ValueError(
                f"Labels are class numbers, integers; got {masks.dtype} {tuple(masks.shape)}. Read masks as uint8 and "
                "let no transform scale them."
            )
        whole = masks.as_subclass(Tensor).long()
        if masks.is_floating_point():
            self._refuse_fractions(masks, whole)
        return whole

    def labels(self) -> dict[str, Callable[[Any], Any]]:
        """Offers losses, besides the labels, the mask of the pixels that count: ``(B, H, W)``, None where all do."""
        return {"target": self.target, "index": self.index, "mask": self.mask}

    def mask(self, batch: Any) -> Tensor | None:
        """Returns where a pixel counts, bool ``(B, H, W)``, or None where all do."""
        if self.ignore_index is None:
            return None
        counted = self.target(batch) != self.ignore_index
        return counted.all(dim=1) if self.mode == "multilabel" else counted

    def loss(self, output: Any, batch: Any) -> Tensor:
        """Returns the supervised loss over the pixels that have a label, auxiliary outputs included."""
        target = self._checked_ids(self.target(batch))
        loss = self._loss(self.logits(output), target)
        if isinstance(output, Mapping) and "aux" in output and self.aux_weight:
            loss = loss + self.aux_weight * self._loss(self._checked(output["aux"]), target)
        return loss

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        logits = resized(logits, target)
        known = (target != UNLABELLED) & (target != self._left_out)
        target = target.where(known, self._left_out)
        if self.criterion is not None:
            labels = target.unsqueeze(1) if self.mode == "binary" else target
            loss: Tensor = self.criterion(logits, labels if self.mode == "multiclass" else labels.to(logits.dtype))
        elif self.mode == "multiclass":
            # The mean over what is labelled; of nothing it is 0 and not torch's nan.
            weights = None if self.class_weights is None else self.class_weights.to(logits.dtype)
            total = F.cross_entropy(logits, target, weights, ignore_index=self._left_out, reduction="sum")
            count = known.sum() if weights is None else weights[target.where(known, 0)].where(known, 0.0).sum()
            loss = total / torch.where(count > 0, count, 1.0)
        else:
            flat = logits.squeeze(1) if self.mode == "binary" else logits
            each = F.binary_cross_entropy_with_logits(flat, target.clamp(0, 1).to(flat.dtype), reduction="none")
            loss = each.where(known, 0.0).sum() / known.sum().clamp(min=1)
        if self.dice_loss is not None:
            loss = loss + self.dice * self.dice_loss(logits, target)
        return loss

    def metrics(self) -> MetricCollection:
        """Returns IoU, Dice and the quality of boundaries."""
        ignored = self._left_out
        found: dict[str, Metric | MetricCollection] = {}
        if self.mode == "multilabel":
            found["miou"] = MultilabelJaccardIndex(self.num_classes, ignore_index=ignored, validate_args=False)
            found["dice"] = MultilabelF1Score(self.num_classes, ignore_index=ignored, validate_args=False)
            return MetricCollection(found)
        if self.mode == "binary":
            found["iou"] = BinaryJaccardIndex(ignore_index=ignored, validate_args=False)
            found["dice"] = BinaryF1Score(ignore_index=ignored, validate_args=False)
            found["boundary_f1"] = BoundaryF1(2, self.boundary_tolerance, ignored)
            return MetricCollection(found)
        found["miou"] = MulticlassJaccardIndex(self.num_classes, ignore_index=ignored, validate_args=False)
        found["dice"] = MulticlassF1Score(self.num_classes, ignore_index=ignored, validate_args=False)
        found["pixel_accuracy"] = MulticlassAccuracy(
            self.num_classes, average="micro", ignore_index=ignored, validate_args=False
        )
        found["boundary_f1"] = BoundaryF1(self.num_classes, self.boundary_tolerance, ignored)
        each = MulticlassJaccardIndex(self.num_classes, "none", ignore_index=ignored, validate_args=False)
        found["iou"] = ClasswiseWrapper(each, labels=self.class_names, prefix="iou/")
        return MetricCollection(found)

    def update(self, metrics: MetricCollection, output: Any, batch: Any) -> None:
        """Updates the metrics with what is predicted for every pixel."""
        target = self._checked_ids(self.target(batch))
        target = target.where(target != UNLABELLED, self._left_out)
        metrics.update(self._decided(resized(self.logits(output), target)), target)

    def agreement(self) -> Metric:
        """Returns the fraction of pixels (and labels) on which student and teacher say the same."""
        if self.mode == "multiclass":
            return MulticlassAccuracy(self.num_classes, average="micro", validate_args=False)
        return BinaryAccuracy(validate_args=False)

    def update_agreement(self, metric: Metric, student: Any, teacher: Any) -> None:
        """Updates the agreement with both models' outputs, at the finer one's resolution."""
        one, other = self.logits(student), self.logits(teacher)
        finer = max(one, other, key=lambda logits: logits.shape[-2] * logits.shape[-1])
        metric.update(self._decided(resized(one, finer)), self._decided(resized(other, finer)))

    def predict(self, output: Any) -> Tensor:
        """Returns the masks, uint8, at the logits' resolution: ``(B, h, w)``, multi-label ``(B, C, h, w)``."""
        return self._saved(self._decided(self.logits(output)))

    def predict_batch(self, output: Any, batch: Any) -> Tensor:
        """Returns the masks at the resolution of the images."""
        images = self.inputs(batch)
        logits = self.logits(output)
        sized = isinstance(images, Tensor) and images.ndim == 4
        return self._saved(self._decided(resized(logits, images) if sized else logits))

    def _saved(self, decided: Tensor) -> Tensor:
        return decided.to(torch.uint8) if self.num_classes <= 256 else decided

    def _decided(self, logits: Tensor) -> Tensor:
        if self.mode == "multiclass":
            return logits.argmax(dim=1)
        return (logits.squeeze(1) if self.mode == "binary" else logits).gt(0).long()

    def prediction_file(self) -> PredictionFile:
        """Returns a folder of label maps, PNG."""
        return LabelMaps(self.class_names)

    def draw(self, images: Sequence[Tensor], batch: Any, prediction: Any = None) -> Drawing:
        """Returns the images under the colours of their classes; pixels that do not count are striped.

        A class that is named ``background`` has no colour.
        """
        target = self.target(batch).cpu()
        target = target.where(target != UNLABELLED, self._left_out)
        colours = palette(self.num_classes)
        pictures, seen = [], torch.zeros(self.num_classes, dtype=torch.bool)
        left_out = False
        for i, image in enumerate(images):
            said = target[i] if prediction is None else prediction[i].cpu().long()
            masks = self._masks(said)
            ignored = target[i] == self._left_out
            ignored = ignored.all(dim=0) if self.mode == "multilabel" else ignored
            if ignored.shape == masks.shape[1:]:
                masks &= ~ignored
            seen |= masks.flatten(1).any(dim=1)
            left_out |= bool(ignored.any())
            pictures.append(coloured(image, masks, colours, ignored))
        legend = {self.class_names[k]: colours[k] for k in seen.nonzero().flatten().tolist()}
        legend.pop("background", None)
        return Drawing(pictures, legend | ({LEFT_OUT: GREY} if left_out else {}))

    def _masks(self, said: Tensor) -> Tensor:
        """Returns where each class is drawn, bool ``(C, H, W)``."""
        if self.mode != "multiclass":
            return said.view(-1, *said.shape[-2:]) == 1
        masks = said == torch.arange(self.num_classes).view(-1, 1, 1)
        for k, name in enumerate(self.class_names):
            masks[k] &= name != "background"
        return masks

    def knowledge(self, model: nn.Module) -> Mapping[str, str]:
        """Offers ``logits`` and ``features.<i>`` of the three libraries' models."""
        model = getattr(model, "_orig_mod", model)
        libraries = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
        if "transformers" in libraries:
            config = model.config
            stages = len(getattr(config, "depths", ())) if getattr(config, "output_hidden_states", False) else 0
            return {"logits": "output.logits", **{f"features.{i}": f"output.hidden_states[{i}]" for i in range(stages)}}
        if "torchvision" in libraries:
            kept = getattr(getattr(model, "backbone", None), "return_layers", {})
            return {"logits": "output.out"} | {f"features.{i}": f'backbone["{n}"]' for i, n in enumerate(kept.values())}
        channels = getattr(getattr(model, "encoder", None), "out_channels", ())
        # The first is the image itself; a transformer has nothing to show at stride 2.
        stages_of = enumerate(channels) if isinstance(channels, Sequence) else ()
        return {"logits": "output", **{f"features.{i}": f"encoder[{i}]" for i, width in stages_of if i and width}}

    def logits(self, output: Any) -> Tensor:
        """Returns the logits ``(B, C, h, w)`` in what a model returned."""
        if isinstance(output, Mapping):
            output = output["out"] if "out" in output else output.get("logits", output)
        return self._checked(getattr(output, "logits", output))

    def _checked(self, logits: Any) -> Tensor:
        if not isinstance(logits, Tensor) or logits.ndim != 4 or logits.shape[1] != self.num_classes:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"Segmentation(num_classes={self.num_classes}) wants logits of shape (B, {self.num_classes}, h, w) "
                f"from the model; got {got}. Give model and task the same number of classes; for a model that returns "
                "something else, override Segmentation.logits."
            )
        return logits

    @staticmethod
    def _refuse_fractions(masks: Tensor, whole: Tensor) -> None:
        """Refuses masks that were scaled or interpolated, of which whole numbers would be background."""
        wrong = masks != whole
        if masks.device.type != "cpu":
            torch._assert_async(~wrong.any(), "a label is neither 0 nor 1, but between them")
        elif wrong.any():
            found = ", ".join(f"{value:.4g}" for value in torch.unique(masks[wrong])[:5].tolist())
            raise ValueError(
                f"Labels are zeros and ones; got {masks.dtype} with {found}. Read masks as integers, let no transform "
                "scale them, and resize them by the nearest pixel; of probabilities give (mask > 0.5)."
            )

    def _checked_ids(self, target: Tensor) -> Tensor:
        """Refuses labels outside of the classes: on a GPU without waiting for it, and so without saying which."""
        highest = max(self.num_classes, 2) if self.mode != "multilabel" else 2
        wrong = (target < 0) | (target >= highest)
        wrong &= (target != UNLABELLED) & (target != self._left_out)
        if target.device.type != "cpu":
            torch._assert_async(~wrong.any(), f"a label is neither a class (0 to {highest - 1}) nor ignore_index")
        elif wrong.any():
            found = torch.unique(target[wrong])[:5].tolist()
            raise ValueError(
                f"Labels hold {found}, and are 0 to {highest - 1} (or ignore_index={self.ignore_index}). Set "
                "num_classes, or ignore_index for pixels that do not count."
            )
        return target


def resized(logits: Tensor, like: Tensor) -> Tensor:
    """Brings logits ``(B, C, h, w)`` to the resolution of labels or logits ``(..., H, W)``, bilinearly."""
    size = like.shape[-2:]
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
