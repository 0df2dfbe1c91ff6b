"""Self-training of detectors of any library: the student's view, pseudo-boxes, and what their loss counts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.boxes import Target, labelled
from lightning_kd.extras import late_import


class SelfTraining:
    """Which boxes of a teacher become targets, in which view, and when the loss on them counts.

    A task holds one: it calls its detector, and asks here what the student sees and what is made of the losses.

    Args:
        score: What the teacher finds with a higher score is taken for true, in (0, 1).
        weight: Of the loss on pseudo-boxes.
        burn_in: For so many epochs labelled images alone count.
        strong: Transforms that make the student's view; colours, greys and blur unless given.
        zeroed: Names of losses that pseudo-boxes have no part in; of ``"d0.loss_bbox"``, the last part counts.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> training = SelfTraining(score=0.5, strong=[])
        >>> boxes = torch.tensor([[2.0, 2.0, 6.0, 6.0], [0.0, 0.0, 9.0, 9.0]])
        >>> found = {"boxes": boxes, "scores": torch.tensor([0.9, 0.3]), "labels": torch.tensor([1, 0])}
        >>> images, targets = training.views([torch.rand(3, 16, 16)], [found])
        >>> targets[0]["labels"], training.boxes_per_image
        (tensor([1]), 1.0)
    """

    def __init__(
        self,
        score: float,
        weight: float = 1.0,
        burn_in: int = 0,
        strong: Sequence[Callable[..., Any]] | None = None,
        zeroed: Sequence[str] = (),
    ) -> None:
        if not (0.0 < score < 1.0 and weight >= 0.0 and burn_in >= 0):
            raise ValueError(
                f"score is in (0, 1), weight and burn_in are not negative; got {score}, {weight} and {burn_in}."
            )
        self.score = score
        self.weight = weight
        self.burn_in = burn_in
        self.strong: list[Callable[..., Any]] = _photometric() if strong is None else list(strong)
        self.zeroed = tuple(zeroed)
        self.taught = False
        """Whether there is a teacher; without one images that have no target are left out."""
        self.epoch = 0
        self.boxes_per_image = 0.0
        self.values: dict[str, Tensor | float] = {}
        """What is logged of the last step."""

    @property
    def begun(self) -> bool:
        """Whether pseudo-boxes count in this epoch."""
        return self.taught and self.epoch >= self.burn_in

    def views(self, images: Sequence[Tensor], found: Sequence[Target]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Returns strong views of images, and of each what the teacher is sure of as its target.

        Args:
            images: ``(3, H, W)`` in [0, 1] each.
            found: Of each the teacher's ``boxes`` in its pixels, ``scores`` and ``labels``.
        """
        views = []
        for image, each in zip(images, found, strict=True):
            sure = each["scores"] > self.score
            views.append(self._strong_view(image, {key: each[key][sure] for key in ("boxes", "labels")}))
        self.boxes_per_image = sum(len(target["labels"]) for _, target in views) / len(views)
        return [image for image, _ in views], [target for _, target in views]

    def loss(self, labelled: Tensor | None, pseudo: Mapping[str, Any] | None, model: nn.Module) -> Tensor:
        """Returns the loss of a step, and remembers what is logged of it.

        Args:
            labelled: The loss of labelled images, where there are any.
            pseudo: The losses of the others by name, scalars or lists of them (of levels), where they were asked for.
            model: The detector that learns, for a step in which nothing counts.
        """
        self.values = {}
        total = labelled
        if pseudo is not None:
            # Times 0 and not left out: so every parameter has a gradient, which DDP asks for.
            parts = [
                part.mean() * float(name.rpartition(".")[2] not in self.zeroed)
                for name, value in pseudo.items()
                for part in (value if isinstance(value, (list, tuple)) else [value])
            ]
            of_boxes = torch.stack(parts).sum() * float(self.begun and self.boxes_per_image > 0)
            if self.begun:
                self.values = {"pseudo": of_boxes.detach(), "pseudo_boxes": self.boxes_per_image}
            total = self.weight * of_boxes + (0.0 if total is None else total)
        return total if total is not None else nothing(model)

    def _strong_view(self, image: Tensor, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        tv_tensors = late_import("torchvision.tv_tensors", "torchvision", "detection")
        v2 = late_import("torchvision.transforms.v2.functional", "torchvision", "detection")
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[-2:])
        view, moved = tv_tensors.Image(image), {**target, "boxes": boxes}
        for transform in self.strong:
            view, moved = transform(view, moved)
        found = v2.clamp_bounding_boxes(moved["boxes"]).as_subclass(Tensor)
        keep = (found[:, 2:] > found[:, :2]).all(dim=1)
        return view.as_subclass(Tensor), {"boxes": found[keep], "labels": moved["labels"][keep]}


def split(images: Sequence[Tensor], targets: Sequence[Target]) -> tuple[list[tuple[Tensor, Target]], list[Tensor]]:
    """Returns the images with their targets, and those whose target is empty: they are unlabelled."""
    known, unknown = [], []
    for image, target in zip(images, targets, strict=True):
        if labelled(target):
            known.append((image, target))
        else:
            unknown.append(image)
    return known, unknown


def nothing(model: nn.Module) -> Tensor:
    """Returns a loss of 0 from which every parameter that learns has a gradient, which is 0."""
    return torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum() * 0.0


def _photometric() -> list[Callable[..., Any]]:
    v2 = late_import("torchvision.transforms.v2", "torchvision", "detection")
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    blur = v2.GaussianBlur(kernel_size=5, sigma=(0.1, 2.0))
    return [v2.RandomApply([jitter], p=0.8), v2.RandomGrayscale(p=0.2), v2.RandomApply([blur], p=0.5)]
