"""Self-training of detectors: what a teacher finds in an image without a target becomes its target."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_kd.tasks.detection import Detection
from torch import Tensor, nn

from lightning_kd.self_training import SelfTraining, split

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
        >>> PseudoBoxes(num_classes=3, score=0.6).training_on.strong[1].__class__.__name__
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
        self.training_on = SelfTraining(score, weight, burn_in, strong, zeroed)

    def meet(self, student: nn.Module, teacher: nn.Module) -> None:
        """Remembers that there is a teacher."""
        self.training_on.taught = True

    def begin_epoch(self, epoch: int) -> None:
        """Remembers the epoch."""
        self.training_on.epoch = epoch

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Calls the model: in training on labelled images, then on the others, whose targets the teacher makes."""
        if not model.training:
            return super().forward(model, batch)
        labelled, others = split(self.inputs(batch), self.target(batch))
        known = super().forward(model, tuple(zip(*labelled, strict=True))) if labelled else None
        # During burn_in only where there is nothing else to call the student on.
        teach = others and self.training_on.taught and (self.training_on.begun or not labelled)
        return _Losses(known, model(others, None) if teach else None, model)

    def student_input(self, images: Any, targets: Any = None, *, teacher: Any) -> tuple[Any, Any]:
        """Gives the student, where there are no targets, a strong view with what the teacher found in the weak one."""
        return (images, targets) if targets is not None else self.training_on.views(images, teacher)

    def loss(self, output: Any, batch: Any) -> Tensor | None:
        """Returns the losses of labelled images and of pseudo-boxes; in evaluation None."""
        if not isinstance(output, _Losses):
            return super().loss(output, batch)
        known = None if output.labelled is None else super().loss(output.labelled, batch)
        return self.training_on.loss(known, output.pseudo, output.model)

    def values(self) -> Mapping[str, Tensor | float]:
        """Returns the loss on pseudo-boxes, and how many of them there are for an image."""
        return self.training_on.values


class _Losses(NamedTuple):
    """What a detector returned of the two kinds of images."""

    labelled: Mapping[str, Tensor] | None
    pseudo: Mapping[str, Tensor] | None
    model: nn.Module
