"""Detection with the detectors of mmdet 3."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_kd import boxes as shared
from lightning_kd.drawing import Drawing
from lightning_kd.extras import late_import
from lightning_kd.models import mmcv_ext
from lightning_kd.models.mmdet_regions import Regions
from lightning_kd.predictions import CocoResults, PredictionFile
from lightning_kd.task import TaskAdapter, check_given, checked_names
from lightning_kd.wiring import Levels


class MMDetection(TaskAdapter):
    """Boxes and classes of things, with any detector of mmdet 3 that learns from boxes.

    A batch is ``(images, targets)``: a list of RGB images ``(3, H, W)`` of any sizes, uint8 or floats in [0, 1], and of
    each a dict of ``boxes`` (n, 4), x1 y1 x2 y2 in pixels, and ``labels`` (n,), classes from 0. Images keep their size:
    the data resizes. What the configuration of a detector says of pixels (their order, normalisation and padding) is
    done by its own ``data_preprocessor``; its ``batch_augments`` are not.

    Boxes without an area are left out, of the loss and of the metrics. Boxes that a target's ``ignore`` (n,) marks
    (COCO's crowds, Pascal VOC's difficult ones) are mmdet's ``ignored_instances``. An image without boxes teaches that
    there is nothing.

    The student's losses and the terms come out of one forward: ``model(inputs, data_samples, mode="loss")``. A teacher
    is asked with ``mode="predict"`` for the same pixels, normalised as it is used to, and runs as far as its deepest
    tap. In evaluation there is no loss: monitor ``val/mAP``. Metrics: ``mAP``, ``mAP50``, ``mAP75``, and
    ``mAP/small``, ``mAP/medium``, ``mAP/large``, not a number where there are no such boxes.

    Terms may name ``features``, all levels of the neck, and ``features.<i>``, one of them; of dense heads ``cls`` and
    ``reg``, the logits and box codes of all levels; of detectors in two stages ``objectness`` and ``proposals``, those
    of the RPN. Losses may ask for ``boxes``, in fractions of what the network sees, and where the student's head
    assigns by ATSS for ``regions``, what the positions of each level count in ``LD``.

    Args:
        num_classes: Number of classes, without the background.
        class_names: Names for pictures; default: their numbers.

    Raises:
        ModuleNotFoundError: Without mmdet.
        ValueError: If the model is no detector of mmdet or has another number of classes, or a target is malformed.

    Example:
        >>> from lightning_kd.models.mmdet import MMDetModel
        >>> task = MMDetection(num_classes=3)
        >>> model = MMDetModel("retinanet/retinanet_r18_fpn_1x_coco", num_classes=3)
        >>> target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([2])}
        >>> sorted(task(model, ([torch.rand(3, 64, 64)], [target])))
        ['loss_bbox', 'loss_cls']
    """

    main_metric = "mAP"

    def __init__(self, num_classes: int, class_names: Sequence[str] | None = None) -> None:
        super().__init__()
        check_given(num_classes)
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: count the classes without the background, at least one.")
        self.num_classes = num_classes
        self.class_names = checked_names(class_names, num_classes)
        self._divisor = 1
        self._epoch = 0
        self._to_teacher: ToTeacher | None = None
        self._regions: Regions | None = None
        mmcv_ext.install()

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (type(self),), self.__dict__

    def meet(self, student: nn.Module, teacher: nn.Module) -> None:
        """Remembers how the pixels of one become those of the other."""
        for model in (student, teacher):
            self._check(model)
        self._to_teacher = ToTeacher(student, teacher)
        self._regions = Regions.of(student)

    def teacher_input(self, inputs: Tensor, data_samples: Any = None, mode: str = "loss") -> dict[str, Any]:
        """Asks a teacher for what it sees, and not for losses."""
        assert self._to_teacher is not None, "meet comes first"
        return self._to_teacher(inputs, data_samples, mode)

    def begin_epoch(self, epoch: int) -> None:
        """Remembers the epoch, for heads that change with it: TOOD's."""
        self._epoch = epoch

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Calls the detector: in training for its losses, in evaluation for what it finds."""
        self._check(model)
        hub = late_import("mmengine.logging", "mmdet", "detection").MessageHub.get_current_instance()
        hub.update_info("epoch", self._epoch)
        data = self._preprocessed(model, batch)
        # One positional argument: the shape of this tensor goes into checkpoints.
        return model(data["inputs"], data_samples=data["data_samples"], mode="loss" if model.training else "predict")

    def loss(self, output: Any, batch: Any) -> Tensor | None:
        """Returns the sum of the losses that the detector returned; in evaluation None."""
        if not isinstance(output, Mapping):
            return None
        losses = [value for name, value in output.items() if "loss" in name]  # others, accuracies, are only told
        parts = [part.mean() for value in losses for part in (value if isinstance(value, (list, tuple)) else [value])]
        return torch.stack(parts).sum()

    def metrics(self) -> MetricCollection:
        """Returns the mean average precisions of COCO."""
        return shared.metrics()

    def update(self, metrics: MetricCollection, output: Any, batch: Any) -> None:
        """Updates the metrics with what was found."""
        metrics.update(self.predict(output), [shared.checked(t, self.num_classes) for t in self.target(batch)])

    def predict(self, output: Any) -> list[dict[str, Tensor]]:
        """Returns of each image the ``boxes`` in its pixels, their ``scores`` and their ``labels`` from 0."""
        found = [sample.pred_instances for sample in output]
        return [{"boxes": each.bboxes, "scores": each.scores, "labels": each.labels} for each in found]

    def prediction_file(self) -> PredictionFile:
        """Returns a JSON file of COCO's results."""
        return CocoResults()

    def draw(self, images: Sequence[Tensor], batch: Any, prediction: Any = None) -> Drawing:
        """Returns the images with their boxes; what was found from a score of 0.5 on."""
        targets = [shared.checked(target, self.num_classes) for target in self.target(batch)]
        return shared.drawn(images, targets, prediction, self.class_names)

    def boxes(self, batch: Any) -> list[Tensor]:
        """Returns of each image its boxes, in fractions of what the network saw of the batch."""
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in self.inputs(batch)]
        targets = [shared.counted(shared.checked(t, self.num_classes)) for t in self.target(batch)]
        return shared.fractions(targets, sizes, sizes, self._divisor)

    def regions(self, batch: Any) -> Levels | None:
        """Returns the weights of the positions of each level, of a student whose head assigns by ATSS; else None."""
        if self._regions is None:
            return None
        shapes = [image.shape for image in self.inputs(batch)]
        height, width = (-(-max(shape[i] for shape in shapes) // self._divisor) * self._divisor for i in (-2, -1))
        return self._regions(
            [shared.counted(shared.checked(t, self.num_classes)) for t in self.target(batch)], height, width
        )

    def labels(self) -> Mapping[str, Callable[[Any], Any]]:
        """Adds the boxes, and LD's regions."""
        return {**super().labels(), "boxes": self.boxes, "regions": self.regions}

    def knowledge(self, model: nn.Module) -> Mapping[str, str]:
        """Offers the levels of the neck, and what dense heads say of each of their positions."""
        neck, head = getattr(model, "neck", None), getattr(model, "bbox_head", None)
        path = "neck" if neck is not None else "backbone"
        count = getattr(neck, "num_outs", None) or len(getattr(neck, "in_channels", ()))
        offered = {"features": f"{path}[:]", **{f"features.{i}": f"{path}[{i}]" for i in range(count)}}
        if hasattr(head, "prior_generator"):
            offered |= {"cls": "bbox_head[0][:]", "reg": "bbox_head[1][:]"}
        if getattr(model, "rpn_head", None) is not None:
            offered |= {"objectness": "rpn_head[0][:]", "proposals": "rpn_head[1][:]"}
        return offered

    def _preprocessed(self, model: Any, batch: Any) -> dict[str, Any]:
        """Makes of a batch what the detector takes, with samples in mmdet's form."""
        preprocess, parameter = model.data_preprocessor, next(model.parameters())
        preprocess.to(parameter.device)  # it hears of a move only when it is moved itself
        self._divisor = preprocess.pad_size_divisor
        targets = [shared.checked(target, self.num_classes) for target in self.target(batch)]
        images = [_pixels(image) for image in self.inputs(batch)]
        data = preprocess({"inputs": images, "data_samples": _samples(images, targets)}, training=False)
        return {**data, "inputs": data["inputs"].to(parameter.dtype)}

    def _check(self, model: Any) -> None:
        if not hasattr(model, "data_preprocessor") or not hasattr(model, "extract_feat"):
            raise ValueError(
                f"MMDetection calls detectors of mmdet, and the model is a {type(model).__name__}. Make one with "
                "lightning_kd.models.mmdet.MMDetModel(config), or take Detection for torchvision's."
            )
        head = getattr(model, "bbox_head", None) or getattr(getattr(model, "roi_head", None), "bbox_head", None)
        last = head[-1] if isinstance(head, nn.ModuleList) else head
        classes = getattr(last, "num_classes", self.num_classes)
        if classes != self.num_classes:
            raise ValueError(
                f"The detector {type(model).__name__} has {classes} classes and MMDetection(num_classes="
                f"{self.num_classes}): give MMDetModel(..., num_classes={self.num_classes}), too."
            )


def _blank(kind: type[MMDetection]) -> MMDetection:
    """Makes an empty one, in a process that was spawned, before what it holds of mmdet is unpickled."""
    mmcv_ext.install()
    return kind.__new__(kind)


class ToTeacher:
    """Makes the teacher's arguments out of the student's: ``Distillation(..., teacher_input=ToTeacher(...))``.

    The student is called as mmdet calls it, ``model(inputs, data_samples, mode="loss")``, with inputs that its own
    ``data_preprocessor`` made. The teacher gets the same pixels as its own would have made them, no labels, and
    ``mode="predict"``: in ``"tensor"`` mmdet goes past the hooks of its heads.

    Args:
        student: A detector of mmdet.
        teacher: Another one.

    Raises:
        TypeError: If the student is called otherwise.

    Example:
        >>> from lightning_kd.models.mmdet import MMDetModel
        >>> student, teacher = (MMDetModel("retinanet/retinanet_r18_fpn_1x_coco") for _ in range(2))
        >>> ToTeacher(student, teacher)(torch.zeros(1, 3, 64, 64), [])["mode"]
        'predict'
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student, self.teacher = _Pixels.of(student), _Pixels.of(teacher)

    def __call__(self, inputs: Tensor, data_samples: Sequence[Any], mode: str = "loss") -> dict[str, Any]:
        """Returns the arguments by name."""
        if not isinstance(inputs, Tensor) or not all(hasattr(sample, "metainfo") for sample in data_samples):
            raise TypeError(
                "ToTeacher wants the student to be called as mmdet calls it, with what its data_preprocessor made: "
                f"model(inputs, data_samples, mode='loss'). Got inputs of type {type(inputs).__name__}; "
                "MMDetection(num_classes=...)(model, batch) calls it so, with images and targets."
            )
        if self.student != self.teacher:
            inputs = self._renormalized(inputs, [sample.img_shape for sample in data_samples])
        unlabelled = [type(sample)(metainfo=sample.metainfo) for sample in data_samples]
        return {"inputs": inputs, "data_samples": unlabelled, "mode": "predict"}

    def _renormalized(self, inputs: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        own, other = self.student, self.teacher
        flipped = own.rgb != other.rgb
        from_mean, from_std, to_mean, to_std = (
            inputs.new_tensor(numbers[::-1] if flipped and of is own else numbers).view(3, 1, 1)
            for of, numbers in ((own, own.mean), (own, own.std), (other, other.mean), (other, other.std))
        )
        pixels = (inputs.flip(1) if flipped else inputs) * from_std + from_mean
        wanted = (pixels - to_mean) / to_std
        padded = torch.full_like(wanted, other.padding)
        for out, image, (height, width) in zip(padded, wanted, shapes, strict=True):
            out[:, :height, :width] = image[:, :height, :width]
        return padded


class _Pixels(NamedTuple):
    """What a detector's preprocessor makes of pixels from 0 to 255."""

    rgb: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: float

    @classmethod
    def of(cls, model: Any) -> _Pixels:
        made = model.data_preprocessor
        normalized = made._enable_normalize
        mean = tuple(made.mean.flatten().tolist()) if normalized else (0.0,) * 3
        std = tuple(made.std.flatten().tolist()) if normalized else (1.0,) * 3
        return cls(bool(made._channel_conversion), mean, std, float(made.pad_value))


def _pixels(image: Tensor) -> Tensor:
    """Returns an image as mmdet reads them: BGR, from 0 to 255."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"MMDetection takes RGB images (3, H, W), uint8 or floats in [0, 1]; got {tuple(image.shape)}."
        )
    return image.flip(0) if image.dtype == torch.uint8 else image.flip(0) * 255


def _samples(images: Sequence[Tensor], targets: Sequence[shared.Target]) -> list[Any]:
    """Returns images' sizes and targets in mmdet's form."""
    sample_of = late_import("mmdet.structures", "mmdet", "detection").DetDataSample
    instances = late_import("mmengine.structures", "mmdet", "detection").InstanceData
    samples = []
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        size = (int(image.shape[1]), int(image.shape[2]))
        ignored = target.get(shared.IGNORE, torch.zeros_like(target["labels"])).bool()
        sample = sample_of(metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0), "img_id": i})
        for field, rows in (("gt_instances", ~ignored), ("ignored_instances", ignored)):
            boxes, labels = target["boxes"][rows].float(), target["labels"][rows].long()
            setattr(sample, field, instances(bboxes=boxes, labels=labels))
        samples.append(sample)
    return samples
