"""How well anomalies are found, in images and in their pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc, binary_precision_recall_curve
from torchmetrics.utilities.data import dim_zero_cat

from lightning_kd.extras import late_import
from lightning_kd.metrics._check import refuse_no_numbers


def aupro(maps: Tensor, masks: Tensor, limit: float = 0.3) -> Tensor:
    """Return the area under the curve of the regions' overlap against the rate of false positives, up to a limit of it.

    The overlap at a threshold is the fraction of an anomalous region that is found, the mean over all regions, each of
    which counts alike whatever its size. Regions are connected across edges and corners of pixels. The area is divided
    by the limit.

    Args:
        maps: ``(N, H, W)``, larger where something is less normal.
        masks: ``(N, H, W)``, bool.
        limit: Of the rate of false positives.

    Returns:
        A scalar; not a number without regions, or without a normal pixel.

    Source:
        Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021, section 5.2.

    Example:
        >>> masks = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> masks[0, :2, :2] = True
        >>> float(aupro(masks.float(), masks))
        1.0
    """
    label = late_import("scipy.ndimage", "scipy", "anomaly").label
    sizes = torch.zeros(masks.shape, dtype=torch.float64)
    count = 0
    for i, mask in enumerate(masks.cpu().numpy()):
        regions, found = label(mask, structure=[[1, 1, 1]] * 3)
        labelled = torch.from_numpy(regions).long()
        sizes[i] = torch.bincount(labelled.flatten(), minlength=found + 1)[labelled]
        count += found
    normal = ~masks.flatten().cpu()
    if not count or not normal.any():
        return torch.tensor(torch.nan)
    values, order = maps.flatten().float().cpu().sort(descending=True)
    overlap = torch.where(normal, 0.0, 1.0 / sizes.flatten())[order].cumsum(0) / count
    false = normal[order].double().cumsum(0) / normal.sum()
    last = torch.cat((values[1:] != values[:-1], torch.tensor([True])))  # of each threshold
    x, y = (torch.cat((torch.zeros(1, dtype=torch.float64), of[last])) for of in (false, overlap))
    inside = int((x <= limit).sum())
    if inside < len(x):  # the limit lies between two thresholds
        share = (limit - x[inside - 1]) / (x[inside] - x[inside - 1])
        end = y[inside - 1] + share * (y[inside] - y[inside - 1])
        x, y = torch.cat((x[:inside], torch.tensor([limit]).double())), torch.cat((y[:inside], end[None]))
    return (torch.trapezoid(y, x) / limit).float()


class AnomalyQuality(Metric):
    """How well anomalies are found.

    - ``image_auroc``: the probability that an anomalous image has a larger score than a normal one;
    - ``pixel_auroc``: likewise of pixels, of all images;
    - ``aupro``: see :func:`aupro`; unlike the former it counts small anomalies like large ones;
    - ``image_f1``: the largest F1 of images over all thresholds, which a threshold that is chosen elsewhere does not
      reach.

    Where there are only normal images, or only others, a value is not a number. All maps are kept until the end.

    Raises:
        ValueError: If maps and masks are of different sizes, within a batch or among batches; or, at the end, if there
            is a value that is not a number, which would be sorted among the largest.

    Example:
        >>> masks = torch.zeros(2, 4, 4, dtype=torch.bool)
        >>> masks[1, 0, 0] = True
        >>> metric = AnomalyQuality()
        >>> metric.update(masks.float(), torch.tensor([0.1, 0.9]), masks, torch.tensor([False, True]))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'image_auroc': 1.0, 'pixel_auroc': 1.0, 'aupro': 1.0, 'image_f1': 1.0}
    """

    higher_is_better = True
    full_state_update = False
    maps: list[Tensor]
    scores: list[Tensor]
    masks: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("maps", "scores", "masks", "labels"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, maps: Tensor, scores: Tensor, masks: Tensor, labels: Tensor) -> None:
        """Keep a batch.

        Args:
            maps: ``(B, H, W)``.
            scores: ``(B,)``.
            masks: ``(B, H, W)``, bool, True where an anomaly is.
            labels: ``(B,)``, bool, True where the image is anomalous.
        """
        kept = self.maps[0].shape[1:] if isinstance(self.maps, list) and self.maps else masks.shape[1:]
        if maps.shape != masks.shape or maps.shape[1:] != kept:
            raise ValueError(
                f"maps {tuple(maps.shape)} and masks {tuple(masks.shape)} must have one size, the same in all batches "
                f"(so far {tuple(kept)}): let the data resize images and masks."
            )
        self.maps.append(maps.detach().float())
        self.scores.append(scores.detach().float())
        self.masks.append(masks.bool())
        self.labels.append(labels.bool())

    def compute(self) -> dict[str, Tensor]:
        """Return the values by their names."""
        maps, scores, masks, labels = map(dim_zero_cat, (self.maps, self.scores, self.masks, self.labels))
        wrong = maps.isnan().flatten(1).any(1) | scores.isnan()
        refuse_no_numbers("the anomaly maps or scores", wrong.sum(), len(maps))
        return {
            "image_auroc": _auroc(scores, labels),
            "pixel_auroc": _auroc(maps.flatten(), masks.flatten()),
            "aupro": aupro(maps, masks).to(scores.device),
            "image_f1": _best_f1(scores, labels),
        }


def _auroc(scores: Tensor, labels: Tensor) -> Tensor:
    if labels.all() or not labels.any():
        return scores.new_tensor(torch.nan)
    return binary_auroc(_ranks(scores), labels.long())


def _best_f1(scores: Tensor, labels: Tensor) -> Tensor:
    if labels.all() or not labels.any():
        return scores.new_tensor(torch.nan)
    precision, recall, _ = binary_precision_recall_curve(_ranks(scores), labels.long())
    return (2 * precision * recall / (precision + recall).clamp_min(1e-12)).amax()


def _ranks(scores: Tensor) -> Tensor:
    """Return scores in [0, 1] in the same order: torchmetrics would put others through a sigmoid, flat at its ends."""
    _, ranks = torch.unique(scores.double(), return_inverse=True)
    least_one = ranks.max().clamp_min(1)
    place: Tensor = ranks.double() / least_one
    return place
