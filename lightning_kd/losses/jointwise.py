"""Jointwise: any loss on vectors, on the joints of a pose that count."""

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._wrapped import Wrapped, temperature_of_the_loss


class Jointwise(Wrapped):
    """Any loss on vectors, on what is said of each joint: the joints that count become the samples of a batch.

    With the joints ``J`` that count, all of them unless told, and what is said of a joint as one row::

        loss(student[J], teacher[J]),  (B, K, ...) as matrices (J, D)

    A row is a heatmap, the bins of one axis (SimCC), or two coordinates. So ``Jointwise(KD(temperature=1.0))`` is KD
    over the bins of each joint, which for both axes and with the factor 0.1 is the logit term of DWPose; on heatmaps
    the softmax is over space; ``Jointwise(FitNet())`` is the mean squared error of heatmaps. If no joint counts, it
    is 0. The authors' code takes weights of the joints (``target_weight``) and does not read them, so that joints
    without a label are distilled; here they are not.

    Args:
        loss: A loss on (B, C) that needs no labels. Where it follows the run, it is the outermost. ``KD`` and
            ``FitNet`` do not wait for the device; for others the number of joints that count has to be known.

    Returns:
        ``forward(student, teacher, joints=None)``, both (B, K, ...), and bool (B, K), True where a joint counts,
        returns what ``loss`` returns.

    Raises:
        ValueError: If the two differ in batch or joints, ``joints`` is no bool (B, K), or ``loss`` needs labels or has
            parameters for the shapes of a sample.

    Source:
        Nothing of its own. For the bins: Yang et al., Effective Whole-body Pose Estimation with Two-stages
        Distillation (DWPose), arXiv 2307.15880, equation 3.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher, counts = torch.randn(2, 17, 64), torch.ones(2, 17, dtype=torch.bool)
        >>> losses.Jointwise(losses.KD(temperature=1.0))(teacher, teacher, counts) < 1e-6
        tensor(True)
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__(loss)
        if hasattr(loss, "build") or self.needs_target:
            raise ValueError(
                f"{type(loss).__name__} learns parameters for the shapes of whole batches, or needs labels: Jointwise "
                "wraps losses that do neither, KD() say."
            )
        self.align = "map"
        self.per_sample = False  # the temperatures would be of joints that are not there any more
        self._rowwise = bool(getattr(loss, "rowwise", False)) and getattr(loss, "dim", 1) == 1

    temperature = temperature_of_the_loss

    @property
    def values(self) -> dict[str, Tensor | float]:
        """What the wrapped loss says of itself."""
        return dict(getattr(self.loss, "values", {}))

    def forward(self, student: Tensor, teacher: Tensor, joints: Tensor | None = None) -> Tensor:
        """Return the wrapped loss of the joints."""
        _check.tensors(student, teacher)
        if min(student.ndim, teacher.ndim) < 3 or student.shape[:2] != teacher.shape[:2]:
            raise ValueError(
                f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be (B, K, ...), with the same "
                "joints K: heatmaps, bins of an axis or coordinates."
            )
        if joints is not None and (joints.dtype != torch.bool or joints.shape != student.shape[:2]):
            raise ValueError(
                f"joints are bool {tuple(student.shape[:2])}, True where a joint counts; got {joints.dtype} of shape "
                f"{tuple(joints.shape)}. Of COCO's visibility: visible > 0."
            )
        s, t = student.flatten(2), teacher.detach().flatten(2)
        if self._rowwise:  # a map whose pixels are joints, and its mask
            s, t = (x.movedim(1, -1).unsqueeze(-1) for x in (s, t))
            loss: Tensor = self.loss(s, t, mask=None if joints is None else joints.unsqueeze(-1))
            return loss
        if joints is None:
            return self.call(s.flatten(0, 1), t.flatten(0, 1), None)
        s, t = s[joints], t[joints]
        return self.call(s, t, None) if len(s) else s.float().sum()  # 0, with the gradient 0
