"""Where localisation is worth distilling: LD's two regions, by the anchors and the assigner of an mmdet head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_kd.boxes import Target
from lightning_kd.extras import late_import
from lightning_kd.wiring import Levels


class Regions:
    """The main region, whose anchors are assigned to things, and the valuable one around it, of a head like GFL's.

    With the threshold ``a`` that ATSS takes for a box, mean and deviation of the overlaps of its candidates::

        main:      anchors that the head's own assigner gives a box,              weight 1
        valuable:  of the others those with a / 4 <= DIoU(anchor, box) < a,        weight IoU(anchor, box) / 4

    The weights' ratio is that of the authors' code, where in the main region they are also the student's scores.

    Args:
        head: A dense head of mmdet with an ``ATSSAssigner`` and one anchor at every position.

    Source: Zheng et al., Localization Distillation for Dense Object Detection, arXiv 2102.12252, algorithm 1.
    """

    def __init__(self, head: Any) -> None:
        self.anchors = head.prior_generator
        self.assigner = head.assigner

    @classmethod
    def of(cls, model: Any) -> Regions | None:
        """Returns those of a detector, or None where its head has others."""
        head: Any = getattr(model, "bbox_head", None)
        fits = type(getattr(head, "assigner", None)).__name__ == "ATSSAssigner"
        return cls(head) if fits and set(head.prior_generator.num_base_priors) == {1} else None

    @torch.no_grad()
    def __call__(self, targets: Iterable[Target], height: int, width: int) -> Levels:
        """Returns for each level the weights (B, h, w) of its positions.

        Args:
            targets: Of each image; boxes in pixels of the batch.
            height: Of the padded batch, like the next.
            width: In pixels.
        """
        targets = list(targets)
        sizes = [(-(-height // y), -(-width // x)) for x, y in self.anchors.strides]
        levels = self.anchors.grid_priors(sizes, device=targets[0]["boxes"].device)
        weights = torch.stack([self._weights(levels, target) for target in targets])
        parts = torch.split(weights, [len(level) for level in levels], dim=1)
        return Levels(part.reshape(-1, *size) for part, size in zip(parts, sizes, strict=True))

    def _weights(self, levels: list[Tensor], target: Target) -> Tensor:
        ops = late_import("torchvision.ops", "torchvision", "detection")
        instances = late_import("mmengine.structures", "mmdet", "detection").InstanceData
        anchors, boxes = torch.cat(levels), target["boxes"].float()
        if not len(boxes):
            return anchors.new_zeros(len(anchors))
        things = instances(bboxes=boxes, labels=target["labels"])
        assigned = self.assigner.assign(instances(priors=anchors), [len(level) for level in levels], things)
        overlaps = ops.box_iou(anchors, boxes)
        limit = self._threshold(levels, boxes, overlaps)
        near = ops.distance_box_iou(anchors, boxes)
        valuable = torch.where((near >= limit / 4) & (near < limit), overlaps, 0.0).amax(1) / 4
        return torch.where(assigned.gt_inds > 0, 1.0, valuable)

    def _threshold(self, levels: list[Tensor], boxes: Tensor, overlaps: Tensor) -> Tensor:
        """Returns (n,), for each box the overlap from which ATSS takes an anchor."""
        start, candidates = 0, []
        for anchors in levels:
            distance = torch.cdist(_centres(anchors), _centres(boxes))
            nearest = distance.topk(min(self.assigner.topk, len(anchors)), dim=0, largest=False).indices
            candidates.append(overlaps[start : start + len(anchors)].gather(0, nearest))
            start += len(anchors)
        found = torch.cat(candidates)
        return found.mean(0) + found.std(0)


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2
