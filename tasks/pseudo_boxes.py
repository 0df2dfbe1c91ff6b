"""Self-training of detectors: what a teacher finds in an image without a target becomes its target."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning_kd.tasks.detection import Detection
from torch import Tensor, nn

from lightning_kd.extras import late_import

BOXES = ("bbox_regression", "loss_box_reg", "loss_rpn_box_reg")
"""What torchvision's detectors call their losses of where boxes are."""


class PseudoBoxes(Detection):
    """Detection with images that have no target: the student learns there what the teacher is sure of (mean teacher).

    A batch is that of ``Detection``; the target of an unlabelled image is an empty dict, ``{}``. The teacher, a moving
    average of the student say, is shown an image as the data gives it, which is the weak view. What it finds with a
    score above ``score`` are the boxes on which the student's own loss is computed, on a strong view of the image::

        loss = task(labelled images) + weight * task(strong(unlabelled images), boxes of the teacher)

    Batches may be of labelled images only, of both, or of unlabelled ones only: without any label at all, student and
    teacher begin as a trained model (source-free). An image in which nothing passes is background to the student, as
    the authors have it; where nothing passes in any image of a batch, the pseudo-boxes' loss counts 0. Logged are
    ``train/pseudo``, that loss, and ``train/pseudo_boxes``, how many there are for an image.

    Without a teacher unlabelled images are left out: that is the student alone. Everything else is as in ``Detection``.
    Terms, of which ``DistillationModule`` wants one, compare all images; weigh it 0 to have pseudo-boxes alone.

    Args:
        num_classes: Number of classes, without the background.
        score: What the teacher finds with a higher score is taken for true, in (0, 1).
        weight: Of the loss on pseudo-boxes.
        burn_in: For so many epochs labelled images alone count, until the teacher knows something; a batch without any
            teaches nothing then.
        strong: Transforms of ``torchvision.transforms.v2`` that make the student's view of an unlabelled image; boxes
            follow where they move pixels. Colours, greys and blur unless given.
        zeroed: Names of the detector's losses that pseudo-boxes have no part in: those of where boxes are, as a score
            does not say how well a box fits. ``[]`` for none.
        class_names: Of ``Detection``.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Liu et al., Unbiased Teacher for Semi-Supervised Object Detection, arXiv 2102.09480, section 3; mean teacher:
        Tarvainen and Valpola, arXiv 1703.01780. The authors also erase parts of the strong view, show labelled images
        in both views, and take a focal loss for Faster R-CNN's classes.

    Example:
        >>> PseudoBoxes(num_classes=3, score=0.6).strong[1].__class__.__name__
        'RandomGrayscale'
    """

    def __init__(
        self,
        num_classes: int,
        score: float = 0.7,
        weight: float = 1.0,
        burn_in: int = 0,
        strong: list[nn.Module] | None = None,
        zeroed: Sequence[str] = BOXES,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(num_classes, class_names)
        if not (0.0 < score < 1.0 and weight >= 0.0 and burn_in >= 0):
            raise ValueError(
                f"score is in (0, 1), weight and burn_in are not negative; got {score}, {weight} and {burn_in}."
            )
        self.score = score
        self.weight = weight
        self.burn_in = burn_in
        self.strong: list[Callable[..., Any]] = _photometric() if strong is None else list(strong)
        self.zeroed = tuple(zeroed)
        self._taught = False
        self._epoch = 0
        self._boxes_per_image = 0.0
        self._values: dict[str, Tensor | float] = {}

    def meet(self, student: nn.Module, teacher: nn.Module) -> None:
        """Remembers that there is a teacher."""
        self._taught = True

    def begin_epoch(self, epoch: int) -> None:
        """Remembers the epoch."""
        self._epoch = epoch

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Calls the model: in training on labelled images, then on the others, whose targets the teacher makes."""
        if not model.training:
            return super().forward(model, batch)
        pairs = list(zip(self.inputs(batch), self.target(batch), strict=True))
        labelled = [(image, target) for image, target in pairs if target]
        others = [image for image, target in pairs if not target]
        known = super().forward(model, tuple(zip(*labelled, strict=True))) if labelled else None
        # During burn_in only where there is nothing else to call the student on.
        teach = others and self._taught and (self._epoch >= self.burn_in or not labelled)
        return _Losses(known, model(others, None) if teach else None, next(model.parameters()))

    def student_input(self, images: Any, targets: Any = None, *, teacher: Any) -> tuple[Any, Any]:
        """Gives the student, where there are no targets, a strong view with what the teacher found in the weak one."""
        if targets is not None:
            return images, targets
        views = []
        for image, found in zip(images, teacher, strict=True):
            sure = found["scores"] > self.score
            views.append(self._strong_view(image, {key: found[key][sure] for key in ("boxes", "labels")}))
        self._boxes_per_image = sum(len(target["labels"]) for _, target in views) / len(views)
        return [image for image, _ in views], [target for _, target in views]

    def loss(self, output: Any, batch: Any) -> Tensor | None:
        """Returns the losses of labelled images and of pseudo-boxes; in evaluation None."""
        if not isinstance(output, _Losses):
            return super().loss(output, batch)
        self._values = {}
        total = output.parameter.sum() * 0.0  # what there is to learn from a batch in which nothing counts
        if output.labelled is not None:
            known = super().loss(output.labelled, batch)
            assert known is not None, "the model returned losses"
            total = total + known
        if output.pseudo is None:
            return total
        # Times 0 and not left out: so every parameter has a gradient, which DDP asks for.
        parts = [value.mean() * float(name not in self.zeroed) for name, value in output.pseudo.items()]
        counts = self._boxes_per_image > 0 and self._epoch >= self.burn_in
        pseudo = torch.stack(parts).sum() * float(counts)
        if self._epoch >= self.burn_in:
            self._values = {"pseudo": pseudo.detach(), "pseudo_boxes": self._boxes_per_image}
        return total + self.weight * pseudo

    def values(self) -> Mapping[str, Tensor | float]:
        """Returns the loss on pseudo-boxes, and how many of them there are for an image."""
        return self._values

    def _strong_view(self, image: Tensor, target: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        tv_tensors = late_import("torchvision.tv_tensors", "torchvision", "detection")
        v2 = late_import("torchvision.transforms.v2.functional", "torchvision", "detection")
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[-2:])
        view, moved = tv_tensors.Image(image), {**target, "boxes": boxes}
        for transform in self.strong:
            view, moved = transform(view, moved)
        found = v2.clamp_bounding_boxes(moved["boxes"]).as_subclass(Tensor)
        keep = (found[:, 2:] > found[:, :2]).all(dim=1)
        return view.as_subclass(Tensor), {"boxes": found[keep], "labels": moved["labels"][keep]}


class _Losses(NamedTuple):
    """What a detector returned of the two kinds of images."""

    labelled: Mapping[str, Tensor] | None
    pseudo: Mapping[str, Tensor] | None
    parameter: Tensor


def _photometric() -> list[Callable[..., Any]]:
    v2 = late_import("torchvision.transforms.v2", "torchvision", "detection")
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    blur = v2.GaussianBlur(kernel_size=5, sigma=(0.1, 2.0))
    return [v2.RandomApply([jitter], p=0.8), v2.RandomGrayscale(p=0.2), v2.RandomApply([blur], p=0.5)]
