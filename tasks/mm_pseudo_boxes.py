"""Self-training of mmdet's detectors: what a teacher finds in an image without a target becomes its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning_kd.tasks.mmdetection import MMDetection
from torch import Tensor, nn

from lightning_kd.self_training import SelfTraining, split

BOXES = ("loss_bbox", "loss_rpn_bbox", "loss_dfl", "loss_iou", "loss_l1")
"""What mmdet's detectors call their losses of where boxes are."""


class MMPseudoBoxes(MMDetection):
    """``MMDetection`` with images that have no target: the student learns there what the teacher is sure of.

    It is to ``MMDetection`` what ``PseudoBoxes``, where the method is written down, is to ``Detection``: the target of
    an unlabelled image is an empty dict, ``{}``, in which what the teacher finds with a score above ``score`` are the
    boxes of the detector's own losses, on a strong view of the image. Logged are ``train/pseudo`` and
    ``train/pseudo_boxes``, how many there are for an image. Without any label (source-free) begin with a trained
    detector, ``MMDetModel(..., weights="trained.pth")``.

    What a detector finds is cut by its ``test_cfg`` first: boxes below its ``score_thr``, and more than its
    ``max_per_img``, are no pseudo-boxes either. mmdet's losses are averaged over all processes, so under DDP every
    process calls the detector as often as the others; where it has no image of a kind, others stand in and count 0.

    Args:
        num_classes: Number of classes, without the background.
        score: What the teacher finds with a higher score is taken for true, in (0, 1).
        weight: Of the loss on pseudo-boxes.
        burn_in: For so many epochs labelled images alone count; a batch without any teaches nothing then.
        strong: Transforms of ``torchvision.transforms.v2`` that make the student's view of an unlabelled image; boxes
            follow where they move pixels. Colours, greys and blur unless given.
        zeroed: Names of the detector's losses that pseudo-boxes have no part in: those of where boxes are. ``[]`` for
            none. A detector that learns from queries (DETR) is matched by them, and is better off with none.
        class_names: Of ``MMDetection``.

    Raises:
        ModuleNotFoundError: Without mmdet.
        ValueError: If an argument is out of range.

    Source:
        Liu et al., Unbiased Teacher for Semi-Supervised Object Detection, arXiv 2102.09480, section 3.

    Example:
        >>> MMPseudoBoxes(num_classes=3, score=0.6).training_on.zeroed[:2]
        ('loss_bbox', 'loss_rpn_bbox')
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
        self.training_on = SelfTraining(score, weight, burn_in, strong, zeroed)
        self._asked: _Asked | None = None

    def meet(self, student: nn.Module, teacher: nn.Module) -> None:
        """Remembers that there is a teacher, and how the pixels of one become those of the other."""
        super().meet(student, teacher)
        self.training_on.taught = True

    def begin_epoch(self, epoch: int) -> None:
        """Remembers the epoch."""
        super().begin_epoch(epoch)
        self.training_on.epoch = epoch

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Calls the detector: in training on labelled images, then on the others, whose targets the teacher makes."""
        if not model.training:
            return super().forward(model, batch)
        labelled, others = split(self.inputs(batch), self.target(batch))
        any_labelled, any_others = _anywhere(bool(labelled), bool(others), next(model.parameters()).device)
        known = pseudo = None
        if any_labelled:
            nowhere = [(image, _empty(image)) for image in others]
            known = super().forward(model, tuple(zip(*(labelled or nowhere), strict=True)))
        # During burn_in only where there is nothing else to call the student on.
        if any_others and self.training_on.taught and (self.training_on.begun or not any_labelled):
            images = others or [image for image, _ in labelled]
            self._asked = _Asked(model, images)
            try:
                pseudo = super().forward(model, (images, [_empty(image) for image in images]))
            finally:
                self._asked = None
        return _Losses(known, pseudo, bool(labelled), bool(others), model)

    def student_input(
        self, inputs: Tensor, data_samples: Any = None, mode: str = "loss", *, teacher: Any
    ) -> dict[str, Any]:
        """Gives the student, of unlabelled images, a strong view with what the teacher found in the weak one."""
        if self._asked is None:
            return {"inputs": inputs, "data_samples": data_samples, "mode": mode}
        model, images = self._asked
        views = self.training_on.views([_fractions(image) for image in images], self.predict(teacher))
        return {**self._preprocessed(model, views), "mode": mode}

    def loss(self, output: Any, batch: Any) -> Tensor | None:
        """Returns the losses of labelled images and of pseudo-boxes; in evaluation None."""
        if not isinstance(output, _Losses):
            return super().loss(output, batch)
        known = None if output.labelled is None else super().loss(output.labelled, batch)
        if known is not None:
            known = known * float(output.has_labelled)
        pseudo = output.pseudo and {name: value for name, value in output.pseudo.items() if "loss" in name}
        if not output.has_others:
            self.training_on.boxes_per_image = 0.0  # found in images that only stand in
        return self.training_on.loss(known, pseudo, output.model)

    def values(self) -> Mapping[str, Tensor | float]:
        """Returns the loss on pseudo-boxes, and how many of them there are for an image."""
        return self.training_on.values


class _Asked(NamedTuple):
    """The detector that is being called, and the images that it is called on as the data give them."""

    model: nn.Module
    images: list[Tensor]


class _Losses(NamedTuple):
    """What a detector returned of the two kinds of images, and whether there were any."""

    labelled: Mapping[str, Any] | None
    pseudo: Mapping[str, Any] | None
    has_labelled: bool
    has_others: bool
    model: nn.Module


def _empty(image: Tensor) -> dict[str, Tensor]:
    labels = torch.zeros(0, dtype=torch.int64, device=image.device)
    return {"boxes": torch.zeros(0, 4, device=image.device), "labels": labels}


def _fractions(image: Tensor) -> Tensor:
    """Returns an image in [0, 1], as transforms of colours read floats."""
    return image / 255 if image.dtype == torch.uint8 else image


def _anywhere(labelled: bool, others: bool, device: torch.device) -> tuple[bool, bool]:
    """Tells of both kinds of images whether any process has one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return labelled, others
    flags = torch.tensor([labelled, others], dtype=torch.int32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    first, second = flags.bool().tolist()
    return first, second
