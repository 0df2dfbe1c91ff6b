"""How well keypoints are found; torchmetrics has none of these."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_kd.extras import late_import
from lightning_kd.metrics._check import refuse_no_numbers


class NormalizedError(Metric):
    r"""The normalised mean error: the mean distance of an image's joints, in units of its scale; the mean over images.

    .. math:: \frac{1}{N} \sum_n \frac{1}{|J_n|} \sum_{j \in J_n} \frac{\lVert \hat p_{nj} - p_{nj} \rVert}{d_n}

    Images with no joint that counts, or whose scale is not positive, are left out.

    Raises:
        ValueError: At the end, if a joint that counts was said to be at no number.

    Example:
        >>> metric = NormalizedError()
        >>> points, counted = torch.zeros(1, 4, 2), torch.ones(1, 4, dtype=torch.bool)
        >>> metric.update(points + torch.tensor([3.0, 4.0]), points, counted, scale=torch.tensor([50.0]))
        >>> round(float(metric.compute()), 4)
        0.1

    Source: Sagonas et al., 300 Faces in-the-Wild Challenge, ICCVW 2013, equation 1;
    https://ibug.doc.ic.ac.uk/resources/300-W/.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    total: Tensor
    images: Tensor
    wrong: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("wrong", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, points: Tensor, counted: Tensor, scale: Tensor) -> None:
        """Adds images: points ``(B, K, 2)`` twice, which count ``(B, K)``, and what one is, ``(B,)``."""
        distance = torch.linalg.vector_norm(predicted - points, dim=-1).where(counted, 0.0)
        known = counted.any(1) & (scale > 0)
        error = distance.sum(1) / counted.sum(1).clamp(min=1) / scale
        self.total += error.where(known, 0.0).double().sum()
        self.images += known.sum()
        self.wrong += (error.isnan() & known).sum()

    def compute(self) -> Tensor:
        """The mean; nan of no image."""
        refuse_no_numbers("the places", self.wrong, int(self.images))
        return (self.total / self.images).float()


class PCK(Metric):
    """The fraction of correct keypoints: of all joints that count, those within a threshold, in units of the scale.

    Args:
        threshold: Largest distance of a joint that is found, in units of the image's scale.

    Raises:
        ValueError: If the threshold is not positive; at the end, if a joint that counts was said to be at no number.

    Example:
        >>> metric = PCK(threshold=0.1)
        >>> points, counted = torch.zeros(1, 2, 2), torch.ones(1, 2, dtype=torch.bool)
        >>> metric.update(torch.tensor([[[3.0, 4.0], [3.1, 4.0]]]), points, counted, scale=torch.tensor([50.0]))
        >>> float(metric.compute())
        0.5

    Source: Yang and Ramanan, Articulated Human Detection with Flexible Mixtures of Parts, TPAMI 2013, section 6.1;
    https://ieeexplore.ieee.org/document/6380498.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    found: Tensor
    joints: Tensor
    wrong: Tensor

    def __init__(self, threshold: float) -> None:
        super().__init__()
        if not threshold > 0:
            raise ValueError(f"threshold: expected a positive fraction of the scale, received {threshold}")
        self.threshold = threshold
        self.add_state("found", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("joints", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("wrong", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, points: Tensor, counted: Tensor, scale: Tensor) -> None:
        """Adds images: points ``(B, K, 2)`` twice, which count ``(B, K)``, and what one is, ``(B,)``."""
        distance = torch.linalg.vector_norm(predicted - points, dim=-1)
        known = counted & (scale > 0).unsqueeze(1)
        self.found += ((distance <= self.threshold * scale.unsqueeze(1)) & known).sum()
        self.joints += known.sum()
        self.wrong += (distance.isnan() & known).sum()

    def compute(self) -> Tensor:
        """The fraction; nan of no joint."""
        refuse_no_numbers("the places", self.wrong, int(self.joints), "joints")
        return (self.found / self.joints).float()


class KeypointPrecision(Metric):
    """COCO's mean average precision by object keypoint similarity, by pycocotools.

    ``oks_ap`` over the similarities 0.5 to 0.95, ``oks_ap50`` and ``oks_ap75``, of images with one person each, whose
    score is the mean of the joints'. Images with no joint that counts, or whose area is not positive, are left out. It
    is computed at the end of an epoch.

    Args:
        sigmas: Of each joint: how exactly people mark it, COCO's ``kpt_oks_sigmas``.

    Raises:
        ModuleNotFoundError: Without pycocotools.
        ValueError: At the end, if a joint that counts was said to be at no number, or a score is none.

    Example:
        >>> metric = KeypointPrecision(sigmas=[0.05] * 4)
        >>> points, counted = 10 * torch.rand(3, 4, 2), torch.ones(3, 4, dtype=torch.bool)
        >>> metric.update(points, points, counted, scores=torch.ones(3, 4), area=torch.full((3,), 100.0))
        >>> round(float(metric.compute()["oks_ap"]), 4)
        1.0

    Source: https://cocodataset.org/#keypoints-eval.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    rows: list[Tensor]

    def __init__(self, sigmas: Sequence[float]) -> None:
        super().__init__()
        late_import("pycocotools.cocoeval", "pycocotools", "pose")
        self.sigmas = list(sigmas)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, predicted: Tensor, points: Tensor, counted: Tensor, scores: Tensor, area: Tensor) -> None:
        """Adds images: points ``(B, K, 2)`` twice, which count ``(B, K)``, scores ``(B, K)`` and areas ``(B,)``."""
        wide = area[:, None, None].expand(*counted.shape, 1)
        marks = torch.stack((counted.float(), scores), dim=-1)
        self.rows.append(torch.cat((predicted, points.where(counted.unsqueeze(-1), 0.0), marks, wide), dim=-1).float())

    def compute(self) -> dict[str, Tensor]:
        """The values by name; nan where there is nothing to find."""
        coco: Any = late_import("pycocotools.coco", "pycocotools", "pose")
        cocoeval: Any = late_import("pycocotools.cocoeval", "pycocotools", "pose")
        numpy: Any = late_import("numpy", "numpy", "pose")
        names = ("oks_ap", "oks_ap50", "oks_ap75")
        everything = dim_zero_cat(self.rows).double().cpu()
        everything = everything[(everything[..., 4] > 0).any(1) & (everything[:, 0, 6] > 0)]
        if not len(everything):
            return dict.fromkeys(names, torch.tensor(torch.nan))
        nowhere = everything[..., :2].isnan().any(-1) & (everything[..., 4] > 0)
        wrong = (nowhere | everything[..., 5].isnan()).any(1)
        refuse_no_numbers("the places or scores", wrong.sum(), len(everything))
        truth, found = [], []
        for i, image in enumerate(everything, 1):
            area = float(image[0, 6])
            side = area**0.5
            common = {"id": i, "image_id": i, "category_id": 1, "area": area, "bbox": [0.0, 0.0, side, side]}
            joints = torch.cat((image[:, 2:4], 2 * image[:, 4:5]), dim=1).flatten().tolist()
            number = int(image[:, 4].sum())
            truth.append(common | {"keypoints": joints, "num_keypoints": number, "iscrowd": 0})
            said = torch.cat((image[:, :2], image[:, 5:6]), dim=1).flatten().tolist()
            found.append(common | {"keypoints": said, "score": float(image[:, 5].mean())})
        with contextlib.redirect_stdout(io.StringIO()):
            sides = []
            for annotations in (truth, found):
                side_of = coco.COCO()
                images = [{"id": each["id"]} for each in truth]
                side_of.dataset = {"images": images, "categories": [{"id": 1}], "annotations": annotations}
                side_of.createIndex()
                sides.append(side_of)
            evaluation = cocoeval.COCOeval(*sides, iouType="keypoints")
            evaluation.params.kpt_oks_sigmas = numpy.array(self.sigmas)
            evaluation.params.areaRng = [[0, 1e10]] * 3  # a crop of a person, however small, counts
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return {name: torch.tensor(float(value)) for name, value in zip(names, evaluation.stats[:3], strict=True)}
