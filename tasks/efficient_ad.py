"""EfficientAD: the difference of a student to its teacher, and to an autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning_kd.tasks.anomaly_detection import AnomalyDetection
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kd.anomalies import AnomalyMaps
from lightning_kd.losses import _mask
from lightning_kd.models.efficient_ad import EfficientADDetector, Imitations, Standardized

QUANTILES = 0.9, 0.995
"""Of the maps of normal images: what becomes 0, and what becomes 0.1."""

MOST = 2**24
"""Values of which torch computes a quantile."""


class EfficientAD(AnomalyDetection):
    """Anomaly detection by EfficientAD, with :class:`~lightning_kd.models.EfficientADStudent` (Batzner et al.).

    What the teacher knows are terms: :class:`~lightning_kd.losses.EfficientAD` from ``output.local``, and
    :class:`~lightning_kd.losses.FitNet` from ``output.autoencoder``, both to the teacher's ``output``. The task's own
    loss is the rest, with ``a`` the autoencoder, ``s'`` the student's second half and ``s`` its first::

        mean((a - s')^2) + mean(s(unrelated)^2)

    The second is the penalty on images that have nothing to do with the task: there the student is to say nothing, so
    that it does not imitate its teacher where it has not learned to. The quantiles that make the two maps comparable
    are those of the normal images of the last validation.

    Other than in the paper the autoencoder sees the images of the batch, and no augmented ones: augment in the data.

    Its teacher is trained at this task, too: a :class:`~lightning_kd.models.Standardized`, by an epoch of
    ``teacher_fit``, takes its figures of the normal images. Alone it is measured by the mean square of what it says.

    Args:
        unrelated: Makes unrelated images of the shape of those that it is given, normalised like them:
            :class:`~lightning_kd.data.UnrelatedImages`. Without it there is no penalty.

    Raises:
        TypeError: If the student is another one.

    Example:
        >>> task = EfficientAD()
        >>> described = Imitations(*(torch.ones(1, 2, 8, 8, requires_grad=True) for _ in range(3)))
        >>> float(task.loss(described, (torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64))))
        0.0

    Source: Batzner et al., EfficientAD, arXiv 2303.14535, sections 3.2 to 3.4 and algorithm 1.
    """

    only_trains = ("unrelated",)

    def __init__(self, unrelated: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(difference=["output.local"], teacher_difference=["output"])
        self.unrelated = unrelated
        self._penalty: Tensor | None = None
        self._values: dict[str, Tensor | float] = {}
        self._seen: list[Tensor] | None = None

    def deployed(self, student: nn.Module) -> nn.Module:
        """Returns one network of student and teacher."""
        teacher = self._met.teacher if self._met is not None else None
        if teacher is None:
            return student
        return EfficientADDetector(student, teacher, self.as_taught)  # type: ignore[arg-type]  # loss refuses others

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Calls the model; in training on unrelated images, too, in evaluation with the teacher beside it."""
        images = self.inputs(batch)
        if isinstance(model, Standardized):
            if not model.training:
                return _far(model(images), images)
            return 0.0 * model(images[~self.target(batch).label]).sum()  # it takes its figures, and learns nothing
        if model.training and self.unrelated is not None:
            described = model.describer(self.unrelated(images))  # type: ignore[operator]  # a module
            self._penalty = described[:, : model.channels].square().mean()
        if model.training or self._met is None:
            return model(images)
        detector: Any = self.detector(model, images)
        raw = detector.raw(images)
        if self._seen is not None:
            self._seen.append(raw[:, ~self.target(batch).label].flatten(1).float())
        return detector.combined(raw)

    def loss(self, output: Any, batch: Any) -> Tensor | None:
        """Returns how the student's second half differs from the autoencoder, and the penalty."""
        if not self.training:
            return None
        if isinstance(output, Tensor) and not output.ndim:  # of a teacher
            return output
        if not isinstance(output, Imitations):
            raise TypeError(
                f"tasks.EfficientAD is for models.EfficientADStudent; the student returned {type(output).__name__}."
            )
        apart = (output.autoencoder - output.second).square().mean(1)
        normal = _mask.resized(self.normal(batch), (apart.shape[-2], apart.shape[-1]))
        gap = torch.where(normal, apart, 0.0).sum() / _mask.total(normal)
        penalty, self._penalty = self._penalty, None
        self._values = {"second": gap.detach()}
        if penalty is not None:
            self._values["penalty"] = penalty.detach()
        return gap if penalty is None else gap + penalty

    def values(self) -> Mapping[str, Tensor | float]:
        """Returns both parts of the loss."""
        return self._values

    def begin_validation(self) -> None:
        """Begins to gather what the maps of normal images say."""
        self._seen = []

    def end_validation(self, student: nn.Module) -> None:
        """Takes the quantiles of what was gathered; of several processes their mean."""
        seen, self._seen = self._seen, None
        if isinstance(student, Standardized):
            return
        values = torch.cat(seen, dim=1) if seen else torch.zeros(2, 0)
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        kept: Any = student.quantiles
        found, count = torch.zeros_like(kept), torch.zeros((), device=kept.device)
        if values.numel():
            few = values[:, :: -(-values.shape[1] // MOST)]
            found = torch.quantile(few, torch.tensor(QUANTILES, device=few.device), dim=1).T.to(kept)
            count += 1
        if several:
            torch.distributed.all_reduce(found)
            torch.distributed.all_reduce(count)
        if count:
            kept.copy_(found / count)


def _far(described: Tensor, images: Tensor) -> AnomalyMaps:
    """Returns how far a standardized description is from those of normal images."""
    size = images.shape[-2:]
    maps = F.interpolate(described.square().mean(1, keepdim=True), size, mode="bilinear", align_corners=False)[:, 0]
    return AnomalyMaps(maps, maps.flatten(1).amax(1))
