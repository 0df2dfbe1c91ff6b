"""ALoss: a teacher that attracts a landmark which is worse than its own, and repels one that is better."""

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check
from lightning_kd.losses._numerics import upcast
from lightning_kd.numbers import is_number


def aloss(
    student: Tensor,
    teacher: Tensor,
    points: Tensor,
    joints: Tensor | None = None,
    attract: float = 1.9,
    repel: float = 0.45,
    inner: float = 0.15,
) -> Tensor:
    """Return the assistive loss of coordinates; see :class:`ALoss`."""
    _check.same_shape(student, teacher, "Student and teacher say where the same joints are.")
    if student.ndim != 3 or points.shape != student.shape or not points.is_floating_point():
        raise ValueError(
            f"coordinates and true points are floats (B, K, 2); got student {tuple(student.shape)} and points "
            f"{points.dtype} of shape {tuple(points.shape)}. Of other heads decode the points first."
        )
    s, t = upcast(student), upcast(teacher.detach())
    truth = points.to(s.dtype)
    known = ~truth.isnan().any(-1)
    joints = known if joints is None else joints & known
    here = joints.unsqueeze(-1)
    s, t, truth = (torch.where(here, x, 0.0) for x in (s, t, truth))
    error, of_teacher = (s - truth).abs(), (t - truth).abs()
    zone = -repel * ((error >= inner * of_teacher) & (error <= of_teacher)) + attract * (error > of_teacher)
    each = zone * (error - of_teacher).abs()
    return each.sum() / (joints.sum() * each.shape[-1]).clamp_min(1)


class ALoss(nn.Module):
    """The assistive loss of landmarks: how far a coordinate is from the teacher's error, worse or better.

    With the errors ``e_s = |student - truth|`` and ``e_t = |teacher - truth|`` of each coordinate::

        attract * (e_s - e_t)   where e_s > e_t                     worse than the teacher: towards it
        -repel * (e_t - e_s)    where inner * e_t <= e_s <= e_t     better: further away from it, to the truth
        0                       where e_s < inner * e_t             as good as the truth

    A mean over coordinates. Where the teacher is exact, e_t = 0, a coordinate is drawn like any other; in the authors'
    code, whose condition is a product of signs, such a coordinate counts 0. The teacher is thought of on the student's
    side of the truth. One term has a tough teacher, which learned the true points (1.9, 0.45), another one a tolerant
    one, which learned smoothed points (1.8, 0.4). It is never above ``attract * |student - teacher|``, and below 0
    where the student is better. A joint whose true point is NaN has none, and does not count. The paper's main loss,
    which depends on the tolerant teacher, is not a part of it: that is the task's.

    Args:
        attract: Weight where the student is worse.
        repel: Weight where it is better.
        inner: Fraction of the teacher's error below which nothing is done.

    Returns:
        ``forward(student, teacher, points, joints=None)``, coordinates and true points (B, K, 2) in the same units, and
        bool (B, K), True where a joint counts, returns a scalar, zero at equality. 0 if no joint counts.

    Raises:
        ValueError: If the shapes differ, or a weight is negative.

    Source:
        Fard and Mahoor, Facial Landmark Points Detection Using Knowledge Distillation-Based Neural Networks,
        arXiv 2111.07047, and the authors' code, which the formula was read from; the paper's equations were not
        checked.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> truth = torch.zeros(1, 1, 2)
        >>> losses.ALoss()(truth + 0.5, truth - 0.3, truth)
        tensor(0.3800)
    """

    def __init__(self, attract: float = 1.9, repel: float = 0.45, inner: float = 0.15) -> None:
        super().__init__()
        _check.weights(attract=attract, repel=repel)
        if not (is_number(inner) and 0 <= inner < 1):
            raise ValueError(f"inner is a fraction of the teacher's error, in [0, 1); got {inner!r}.")
        self.attract = attract
        self.repel = repel
        self.inner = inner

    def forward(self, student: Tensor, teacher: Tensor, points: Tensor, joints: Tensor | None = None) -> Tensor:
        """Return the assistive loss of coordinates."""
        return aloss(student, teacher, points, joints, self.attract, self.repel, self.inner)
