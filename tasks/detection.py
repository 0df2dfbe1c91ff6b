"""Detection with the detectors of torchvision, or with modules that are called like them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_kd import boxes as shared
from lightning_kd.drawing import Drawing
from lightning_kd.predictions import CocoResults, PredictionFile
from lightning_kd.task import TaskAdapter, check_given, checked_names


class Detection(TaskAdapter):
    """Boxes and classes of things, with torchvision's RetinaNet, FCOS, Faster R-CNN, SSD and SSDlite.

    A batch is ``(images, targets)``: a list of ``(3, H, W)`` floats in [0, 1], of any sizes, and of each image a dict
    of ``boxes`` (n, 4), x1 y1 x2 y2 in pixels, and ``labels`` (n,), classes from 0. The class 0 of torchvision, the
    background, is added here: a model is made with ``num_classes + 1``, and what it finds is counted from 0 again.

    Boxes without an area are left out, of the loss and of the metrics. Boxes that a target's ``ignore`` (n,) marks
    (COCO's crowds, Pascal VOC's difficult ones) teach nothing, and count neither as missed nor as wrongly found. An
    image without boxes teaches that there is nothing.

    In training such a model returns its losses, whose sum is the task's loss; in evaluation it returns what it finds,
    so there is no loss then: monitor ``val/mAP``. Metrics: ``mAP``, ``mAP50``, ``mAP75``, and
    ``mAP/small``, ``mAP/medium``, ``mAP/large``, not a number where there are no such boxes.

    Terms may name ``features``, all levels of the backbone, and ``features.<key>``, one of them; of RetinaNet, FCOS
    and SSD ``cls`` and ``reg``, the logits and box codes of all anchors, of FCOS ``centerness``; of Faster R-CNN
    ``objectness`` and ``proposals``, the maps of its RPN. Losses may ask for ``boxes``, in fractions of what the
    network sees. Both models resize with their own ``transform``, and sizes must not be drawn at random.

    Args:
        num_classes: Number of classes, without the background.
        class_names: Names for pictures; default: their numbers.

    Raises:
        ValueError: If the model has another number of classes, draws its size at random, or a target is malformed.

    Example:
        >>> task = Detection(num_classes=3)
        >>> task.predict([{"boxes": torch.zeros(1, 4), "scores": torch.ones(1), "labels": torch.tensor([3])}])
        [{'boxes': tensor([[0., 0., 0., 0.]]), 'scores': tensor([1.]), 'labels': tensor([2])}]
    """

    main_metric = "mAP"

    def __init__(self, num_classes: int, class_names: Sequence[str] | None = None) -> None:
        super().__init__()
        check_given(num_classes)
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: count the classes without the background, at least one.")
        self.num_classes = num_classes
        self.class_names = checked_names(class_names, num_classes)
        self._resizing = _Resizing()

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Calls the model: in training with the targets, for its losses; in evaluation without."""
        if not model.training:
            return model(self.inputs(batch))
        self._check_classes(model)
        # Numbers only: where the boxes lie for the network of this step.
        self._resizing = _Resizing.of(model)
        targets = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in self._counted(batch)]
        return model(self.inputs(batch), targets)

    def teacher_input(self, images: Any, targets: Any = None) -> tuple[Any, ...]:
        """Gives a teacher the images and nothing else."""
        return (images,)

    def loss(self, output: Any, batch: Any) -> Tensor | None:
        """Returns the sum of the losses that the model returned; in evaluation None."""
        if isinstance(output, Mapping):
            return torch.stack([value.mean() for value in output.values()]).sum()
        self._checked(output)
        return None

    def metrics(self) -> MetricCollection:
        """Returns the mean average precisions of COCO."""
        return shared.metrics()

    def update(self, metrics: MetricCollection, output: Any, batch: Any) -> None:
        """Updates the metrics with what was found."""
        metrics.update(self.predict(output), [shared.checked(t, self.num_classes) for t in self.target(batch)])

    def predict(self, output: Any) -> list[dict[str, Tensor]]:
        """Returns of each image the ``boxes`` in its pixels, their ``scores`` and their ``labels`` from 0."""
        self._checked(output)
        return [{**found, "labels": found["labels"] - 1} for found in output]

    def prediction_file(self) -> PredictionFile:
        """Returns a JSON file of COCO's results."""
        return CocoResults()

    def draw(self, images: Sequence[Tensor], batch: Any, prediction: Any = None) -> Drawing:
        """Returns the images with their boxes; what was found from a score of 0.5 on."""
        targets = [shared.checked(target, self.num_classes) for target in self.target(batch)]
        return shared.drawn(images, targets, prediction, self.class_names)

    def boxes(self, batch: Any) -> list[Tensor]:
        """Returns of each image its boxes, in fractions of what the network saw of the batch."""
        images = self.inputs(batch)
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        resized = [self._resizing.size(*size) for size in sizes]
        return shared.fractions(self._counted(batch), sizes, resized, self._resizing.divisor)

    def knowledge(self, model: nn.Module) -> Mapping[str, str]:
        """Offers the levels of the pyramid, and what the heads say of every anchor."""
        transform: Any = getattr(model, "transform", None)
        sizes = getattr(transform, "min_size", ())
        if len(set(sizes)) > 1 and transform.fixed_size is None:
            raise ValueError(
                f"{type(model).__name__} draws its images' size at random in training, from min_size={tuple(sizes)}, "
                "so that student and teacher would see different ones. Give it one, model.transform.min_size = (800,), "
                "and let the data draw sizes: torchvision.transforms.v2.RandomShortestSize."
            )
        offered = {"features": "backbone[:]"} if hasattr(model, "backbone") else {}
        offered |= {f"features.{key}": f'backbone["{key}"]' for key in _levels(getattr(model, "backbone", None))}
        head: Any = getattr(model, "head", None)
        if hasattr(head, "classification_head") and hasattr(head, "regression_head"):
            offered |= {"cls": "head.classification_head", "reg": "head.regression_head"}
            if hasattr(head.regression_head, "bbox_ctrness"):
                offered |= {"reg": "head.regression_head[0]", "centerness": "head.regression_head[1]"}
        if hasattr(model, "rpn"):
            offered |= {"objectness": "rpn.head[0][:]", "proposals": "rpn.head[1][:]"}
        return offered

    def labels(self) -> Mapping[str, Callable[[Any], Any]]:
        """Adds the boxes."""
        return {**super().labels(), "boxes": self.boxes}

    def _counted(self, batch: Any) -> list[shared.Target]:
        return [shared.counted(shared.checked(target, self.num_classes)) for target in self.target(batch)]

    def _check_classes(self, model: nn.Module) -> None:
        classes = _classes(model)
        if classes not in (None, self.num_classes + 1):
            raise ValueError(
                f"{type(model).__name__} has {classes} classes and Detection(num_classes={self.num_classes}). In "
                f"torchvision the background is one, too: make the model with num_classes={self.num_classes + 1}."
            )

    def _checked(self, output: Any) -> None:
        if not shared.detections(output):
            raise ValueError(
                "Detection wants of a model what torchvision's return: in training a dict of losses, in evaluation a "
                f"list of dicts of boxes, scores and labels; got {type(output).__name__}. For another model override "
                "Detection.forward."
            )


class _Resizing(NamedTuple):
    """How torchvision's GeneralizedRCNNTransform resizes and pads; of a model without one, not at all."""

    shorter: float = math.nan
    longer: float = math.nan
    fixed: tuple[int, int] | None = None  # (W, H), as torchvision has it
    divisor: int = 1

    @classmethod
    def of(cls, model: nn.Module) -> "_Resizing":
        transform: Any = getattr(model, "transform", None)
        if transform is None or not hasattr(transform, "size_divisible"):
            return cls()
        return cls(transform.min_size[-1], transform.max_size, transform.fixed_size, transform.size_divisible)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Returns (H, W) of an image after resizing."""
        if self.fixed is not None:
            return self.fixed[1], self.fixed[0]
        if math.isnan(self.shorter):
            return height, width
        scale = min(self.shorter / min(height, width), self.longer / max(height, width))
        return math.floor(height * scale), math.floor(width * scale)


def _levels(backbone: Any) -> list[str]:
    """Returns the keys of a pyramid's levels, where they can be told without running it."""
    layers = getattr(getattr(backbone, "body", None), "return_layers", None)
    if not isinstance(layers, dict):
        return []
    extra = type(getattr(getattr(backbone, "fpn", None), "extra_blocks", None)).__name__
    return [*map(str, layers.values()), *{"LastLevelMaxPool": ["pool"], "LastLevelP6P7": ["p6", "p7"]}.get(extra, [])]


def _classes(model: nn.Module) -> int | None:
    """Returns how many classes a detector tells apart, the background included, where that can be told."""
    head: Any = getattr(getattr(model, "head", None), "classification_head", None)
    predictor: Any = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    for count in (
        getattr(head, "num_classes", None),
        getattr(head, "num_columns", None),
        getattr(getattr(predictor, "cls_score", None), "out_features", None),
    ):
        if isinstance(count, int):
            return count
    return None
