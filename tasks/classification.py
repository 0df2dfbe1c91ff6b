"""Classification of whatever a model turns into logits: images, signals, tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryCalibrationError,
    MulticlassAccuracy,
    MulticlassCalibrationError,
)

from lightning_kd.drawing import Drawing, enlarged
from lightning_kd.numbers import is_number
from lightning_kd.task import UNLABELLED, TaskAdapter, check_given, checked_names
from lightning_kd.wiring import describe


class Classification(TaskAdapter):
    """Multi-class or multi-label classification with any module that returns logits.

    Terms may name ``logits``, and ``features.<i>`` of timm models, the stages that their ``feature_info`` lists.
    Metrics: ``accuracy`` (the fraction of samples, or of labels, that are right), ``calibration_error`` (expected,
    15 bins, L1; arXiv 1706.04599, equation 3), and in tests with a teacher ``agreement``, the fraction on which
    student and teacher say the same.

    Args:
        num_classes: Number of classes C, or of labels in the multi-label case.
        multilabel: Whether targets are ``(B, C)`` of zeros and ones, and not class indices ``(B,)``.
        label_smoothing: Of the cross-entropy, in [0, 1); of multi-class targets only.
        class_names: Names for pictures; default: their numbers.

    Raises:
        ValueError: If the arguments contradict each other, or logits or labels have another shape.

    Example:
        >>> task = Classification(num_classes=3)
        >>> batch = torch.zeros(2, 4), torch.tensor([0, 2])
        >>> round(float(task.loss(torch.zeros(2, 3), batch)), 4)
        1.0986
    """

    main_metric = "accuracy"

    def __init__(
        self,
        num_classes: int,
        multilabel: bool = False,
        label_smoothing: float = 0.0,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        check_given(num_classes)
        if num_classes < (1 if multilabel else 2):
            raise ValueError(
                f"num_classes={num_classes}: a choice needs two classes. For one yes-or-no output use multilabel=True."
            )
        if not (is_number(label_smoothing) and 0.0 <= label_smoothing < 1.0) or (multilabel and label_smoothing):
            raise ValueError(
                f"label_smoothing is in [0, 1), and 0 with multilabel=True; got {label_smoothing!r} with {multilabel=}."
            )
        self.num_classes = num_classes
        self.multilabel = multilabel
        self.class_names = checked_names(class_names, num_classes)
        self.label_smoothing = label_smoothing

    def loss(self, output: Any, batch: Any) -> Tensor:
        """Returns the cross-entropy, of the softmax or of each label's sigmoid; the class -100 is left out of it."""
        logits, target = self._checked(output), self.target(batch)
        if not isinstance(target, Tensor):
            raise ValueError(
                f"Classification wants batches (inputs, labels) with a tensor of labels, got {describe(target)}. Say "
                "where they are by overriding target(batch) of the task."
            )
        if self.multilabel:
            if target.shape != logits.shape:
                raise ValueError(
                    f"multilabel=True wants targets of zeros and ones, {tuple(logits.shape)} like the logits; got "
                    f"{tuple(target.shape)}."
                )
            self._refuse_values(target, target)
            return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))
        soft = target.is_floating_point()
        if target.shape != (logits.shape if soft else logits.shape[:1]):
            raise ValueError(
                f"Targets are class indices, integers ({len(logits)},), or probabilities, floats "
                f"{tuple(logits.shape)}; got {target.dtype} {tuple(target.shape)}."
            )
        if soft:
            self._refuse_values(target, target.sum(dim=1, dtype=torch.float32))
            return F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        known = self._labelled(target)
        # The mean over what is labelled; of nothing it is 0 and not torch's nan.
        total = F.cross_entropy(logits, target.long(), label_smoothing=self.label_smoothing, reduction="sum")
        mean: Tensor = total / known.sum().clamp(min=1)
        return mean

    def _refuse_values(self, target: Tensor, total: Tensor) -> None:
        """Refuses what cannot be probabilities; on the CPU, since elsewhere looking would wait for the device."""
        if target.device.type != "cpu" or torch.compiler.is_compiling() or not target.numel():
            return
        low, high = float(target.min()), float(total.max())
        if not (low >= 0.0 and high <= 1.0 + 0.01):  # what float16 and bfloat16 round; not a number is neither
            one = "each label" if self.multilabel else "the classes together"
            remedy = "If a sample can have several classes at once, it is multilabel=True."
            if self.multilabel:
                remedy = "Map -1 and 1 to 0 and 1; labels that are not known are for a loss() of your own."
            raise ValueError(
                f"Targets are probabilities, from 0 to 1 for {one}; got from {low:g} to {high:g}. {remedy}"
            )

    def _labelled(self, target: Tensor) -> Tensor:
        """Returns which samples have a class; that it is one of them is checked on the CPU, elsewhere torch does."""
        known = target != UNLABELLED
        if target.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = sorted(set(target[known & ((target < 0) | (target >= self.num_classes))].tolist()))
            if wrong:
                raise ValueError(
                    f"The labels hold {', '.join(map(str, wrong[:5]))}, and are 0 to {self.num_classes - 1}, or "
                    f"{UNLABELLED} for a sample without one. Set num_classes of task and model, or map the labels."
                )
        return known

    def metrics(self) -> MetricCollection:
        """Returns accuracy and calibration error."""
        if self.multilabel:
            return MetricCollection(
                {
                    "accuracy": BinaryAccuracy(),
                    "calibration_error": BinaryCalibrationError(n_bins=15),
                }
            )
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(self.num_classes, average="micro"),
                "calibration_error": MulticlassCalibrationError(self.num_classes, n_bins=15),
            }
        )

    def update(self, metrics: MetricCollection, output: Any, batch: Any) -> None:
        """Updates the metrics with the predicted probabilities."""
        target = self.target(batch)
        if target.is_floating_point():  # soft labels, of mixup for one
            target = target > 0.5 if self.multilabel else target.argmax(dim=1)
        said = self.predict(output)
        if not self.multilabel:
            known = self._labelled(target)
            said, target = said[known], target[known]
            if not len(target):  # torchmetrics takes no empty batch
                return
        metrics.update(said, target.long())

    def agreement(self) -> Metric:
        """Returns the fraction of samples, or of labels, on which student and teacher say the same."""
        if self.multilabel:
            return BinaryAccuracy()
        return MulticlassAccuracy(self.num_classes, average="micro")

    def update_agreement(self, metric: Metric, student: Any, teacher: Any) -> None:
        """Updates the agreement with both models' outputs."""
        said = self.predict(teacher)
        metric.update(self.predict(student), (said > 0.5).long() if self.multilabel else said.argmax(dim=1))

    def predict(self, output: Any) -> Tensor:
        """Returns probabilities ``(B, C)`` in float32."""
        logits = self._checked(output).float()
        return logits.sigmoid() if self.multilabel else logits.softmax(dim=1)

    def draw(self, images: Sequence[Tensor], batch: Any, prediction: Any = None) -> Drawing | None:
        """Returns the images with their class as a caption; predicted ones with probability and ✓ or ✗.

        Labels of which an image has several, or none, are not drawn.
        """
        target = self.target(batch)
        if self.multilabel or target.is_floating_point() or bool((target == UNLABELLED).any()):
            return None
        captions = [self.class_names[k] for k in target.tolist()]
        if prediction is not None:
            probability, said = prediction.max(dim=1)
            marks = ["✓" if right else "✗" for right in (said.cpu() == target.cpu()).tolist()]
            each = zip(said.tolist(), probability.tolist(), marks, strict=True)
            captions = [f"{mark} {self.class_names[k]}, {100 * p:.0f} %" for k, p, mark in each]
        return Drawing([enlarged(image)[0] for image in images], captions=captions)

    def knowledge(self, model: nn.Module) -> Mapping[str, str]:
        """Offers ``logits`` and the stages of timm models."""
        stages = getattr(model, "feature_info", None)
        names = [stage.get("module") for stage in stages] if isinstance(stages, list) else []
        return {"logits": "output", **{f"features.{i}": name for i, name in enumerate(names) if name}}

    def _checked(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] != self.num_classes:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"Classification(num_classes={self.num_classes}) wants logits of shape (B, {self.num_classes}) from "
                f"the model; got {got}. Set num_classes of model and task alike; for a model that returns more than "
                "logits, override Classification.forward."
            )
        return output
