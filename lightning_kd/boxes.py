"""What detectors of every library share: the targets that count, where they lie, and how well they are found."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.wrappers.abstract import WrapperMetric

from lightning_kd.drawing import FIRST, GREY, LEFT_OUT, Colour, Drawing, framed, palette
from lightning_kd.wiring import describe

Target = Mapping[str, Tensor]
"""Of one image: ``boxes`` (n, 4) as x1 y1 x2 y2 in pixels, ``labels`` (n,) from 0, and where known ``ignore`` (n,)."""

IGNORE = "ignore"
"""Key of a target's boxes that neither teach nor count: crowds of COCO, difficult ones of Pascal VOC."""

SHOWN = 0.5
"""Score from which on a box is drawn."""


def labelled(target: Target) -> bool:
    """Returns whether an image has a target: that of an unlabelled one is empty.

    Raises:
        ValueError: If it is no target.
    """
    if not isinstance(target, Mapping) or (target and not {"boxes", "labels"} <= target.keys()):
        raise ValueError(
            f"The target of an image is a dict of boxes (n, 4) and labels (n,); got {describe(target)}. Let the data "
            "set return such, and the collate function a batch (images, targets), a list of each."
        )
    return bool(target)


def checked(target: Target, num_classes: int) -> Target:
    """Returns a target whose boxes have an area; those that have none are left out.

    Args:
        target: Of one image.
        num_classes: Labels are below it. That is checked on the CPU only: elsewhere it would stall the step.

    Raises:
        ValueError: If it is no target, boxes and labels do not fit together, or a label is of no class.
    """
    if not labelled(target):
        raise ValueError(
            "An image without a target, {}, is unlabelled: tasks.PseudoBoxes learns from such, or "
            "MMPseudoBoxes with mmdet. An image without boxes has boxes (0, 4) and labels (0,)."
        )
    boxes, labels = target["boxes"], target["labels"]
    if boxes.ndim != 2 or boxes.shape[-1] != 4 or labels.shape != boxes.shape[:1]:
        raise ValueError(
            f"A target has boxes (n, 4) and labels (n,), of an image without any (0, 4) and (0,); got "
            f"{tuple(boxes.shape)} and {tuple(labels.shape)}."
        )
    if labels.is_floating_point():
        raise ValueError(
            f"The labels of a target are whole numbers, also where there are none: torch.zeros(0, dtype=torch.int64); "
            f"got {labels.dtype}."
        )
    if boxes.device.type == "cpu" and not bool(boxes.isfinite().all()):
        raise ValueError(f"A target has boxes that are no numbers: {boxes[~boxes.isfinite().all(dim=1)][:2].tolist()}.")
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        wrong = sorted({int(label) for label in labels if not 0 <= label < num_classes})
        raise ValueError(
            f"A target has the classes {wrong}, and the task num_classes={num_classes}, counted from 0 without a "
            "background. Set num_classes of the task, or map the labels."
        )
    return _rows(target, (boxes[:, 2:] > boxes[:, :2]).all(dim=1))


def counted(target: Target) -> Target:
    """Returns a target without the boxes that are to be ignored."""
    ignored = target.get(IGNORE)
    return target if ignored is None else _rows(target, ~ignored.bool())


def _rows(target: Target, keep: Tensor) -> Target:
    return {name: target[name][keep] for name in ("boxes", "labels", "scores", IGNORE) if name in target}


class AveragePrecision(WrapperMetric):
    """COCO's mean average precision, by pycocotools: ``mAP`` over the overlaps 0.5 to 0.95, ``mAP50``, ``mAP75``.

    ``mAP/small``, ``mAP/medium`` and ``mAP/large`` are of boxes of up to 32 x 32 pixels, of up to 96 x 96, and larger,
    in pixels of the images that the data give. It is expensive, so it is computed at the end of an epoch only.
    Without any box to find (of that size), where pycocotools says -1, it is not a number.

    Raises:
        ModuleNotFoundError: Without torchvision or pycocotools.

    Example:
        >>> metric = AveragePrecision()
        >>> box = {"boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0]]), "labels": torch.tensor([0])}
        >>> metric.update([{**box, "scores": torch.tensor([0.9])}], [box])
        >>> round(float(metric.compute()["mAP"]), 4)
        1.0

    Source: Lin et al., Microsoft COCO, arXiv 1405.0312; https://cocodataset.org/#detection-eval.
    """

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        try:
            from torchmetrics.detection import MeanAveragePrecision  # noqa: PLC0415

            self.coco = MeanAveragePrecision(box_format="xyxy", iou_type="bbox", backend="pycocotools")
            self.coco.warn_on_many_detections = False  # COCO counts the best 100 of an image
        except ImportError as error:  # ModuleNotFoundError is one
            raise ModuleNotFoundError(
                'The metrics of detection need torchvision and pycocotools: pip install "lightning-kd[detection]"'
            ) from error

    def update(self, detections: Sequence[Mapping[str, Tensor]], targets: Sequence[Target]) -> None:
        """Adds images: of each the ``boxes``, ``scores`` and ``labels`` that were found, and its target."""
        self.coco.update(
            [{key: found[key].detach().float().cpu() for key in ("boxes", "scores")}
             | {"labels": found["labels"].cpu()} for found in detections],
            [_coco(target) for target in targets],
        )  # fmt: skip

    def compute(self) -> dict[str, Tensor]:
        """Returns the values by name."""
        values = self.coco.compute()
        found = {"mAP": values["map"], "mAP50": values["map_50"], "mAP75": values["map_75"]}
        found |= {f"mAP/{size}": values[f"map_{size}"] for size in ("small", "medium", "large")}
        return {name: value if value >= 0 else torch.full_like(value, torch.nan) for name, value in found.items()}

    def reset(self) -> None:
        """Forgets all images."""
        super().reset()
        self.coco.reset()


def _coco(target: Target) -> dict[str, Tensor]:
    said = {"boxes": target["boxes"].float().cpu(), "labels": target["labels"].cpu()}
    return said | ({"iscrowd": target[IGNORE].cpu().long()} if IGNORE in target else {})


def metrics() -> MetricCollection:
    """Returns fresh metrics of boxes, by the names they are logged under."""
    return MetricCollection({"boxes": AveragePrecision()})


def fractions(
    targets: Iterable[Target], sizes: Sequence[tuple[int, int]], resized: Sequence[tuple[int, int]], divisor: int = 1
) -> list[Tensor]:
    """Returns the boxes in fractions of the padded batch that a network sees.

    Args:
        targets: Of each image; their boxes are in pixels of the image.
        sizes: Of each image, its (H, W).
        resized: Of each image, its (H, W) after the network's own resizing.
        divisor: The batch is padded at the right and below, until both sides are multiples of it.

    Returns:
        For each image (n, 4), x1 y1 x2 y2 in [0, 1].

    Example:
        >>> target = {"boxes": torch.tensor([[0.0, 0.0, 50.0, 50.0]]), "labels": torch.tensor([0])}
        >>> fractions([target], sizes=[(100, 100)], resized=[(96, 96)], divisor=64)
        [tensor([[0.0000, 0.0000, 0.3750, 0.3750]])]
    """
    height, width = (-(-max(size[i] for size in resized) // divisor) * divisor for i in (0, 1))
    found = []
    for target, size, new in zip(targets, sizes, resized, strict=True):
        y, x = new[0] / size[0] / height, new[1] / size[1] / width
        found.append((target["boxes"] * target["boxes"].new_tensor([x, y, x, y])).clamp(0.0, 1.0))
    return found


def drawn(
    images: Sequence[Tensor],
    targets: Sequence[Target],
    found: Sequence[Mapping[str, Tensor]] | None,
    names: Sequence[str],
) -> Drawing:
    """Returns images with their boxes: what was found with a score above ``SHOWN``, or else the targets.

    Args:
        images: ``(3, H, W)`` uint8 each.
        targets: Of each; boxes to be ignored are grey.
        found: Of each, ``boxes``, ``scores`` and ``labels``; None for the targets.
        names: Of the classes.
    """
    colours, pictures = palette(len(names)), []
    used: dict[str, Colour] = {}
    for image, given in zip(images, targets if found is None else found, strict=True):
        each: Target = {key: value.detach().cpu() for key, value in given.items()}
        if found is not None:
            each = _rows(each, each["scores"] >= SHOWN)
            each = _rows(each, each["scores"].argsort())  # the best on top
        labels = each["labels"].tolist()
        grey = each.get(IGNORE, torch.zeros(len(labels))).bool().tolist()
        kinds = [(LEFT_OUT, GREY) if g else (names[k], colours[k]) for k, g in zip(labels, grey, strict=True)]
        scores = [""] * len(labels) if found is None else [f"{score:.2f}" for score in each["scores"].tolist()]
        # Names are in the legend, by colours that can be told apart, unless there are many.
        many = len(names) > len(FIRST)
        texts = [f"{names[k]} {score}".strip() if many else score for k, score in zip(labels, scores, strict=True)]
        pictures.append(framed(image, each["boxes"].float(), texts, [colour for _, colour in kinds]))
        used.update(kinds)
    return Drawing(pictures, {name: used[name] for name in (*names, LEFT_OUT) if name in used})


def detections(found: Any) -> bool:
    """Tells whether something is what detectors return in evaluation: per image boxes, scores and labels."""
    return isinstance(found, (list, tuple)) and all(
        isinstance(each, Mapping) and {"boxes", "scores", "labels"} <= each.keys() for each in found
    )
