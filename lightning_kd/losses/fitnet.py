"""FitNet: the hint."""

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import upcast


def fitnet(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error of two features of one shape; see :class:`FitNet`."""
    _check.same_shape(student, teacher, "Let the term's projector map the student's feature to the teacher's shape.")
    student, teacher, here = _mask.blanked(student, teacher.detach(), mask)
    hint = upcast(student)
    if here is None:
        return F.mse_loss(hint, teacher.to(hint.dtype))
    return F.mse_loss(hint, teacher.to(hint.dtype), reduction="sum") / (_mask.total(here) * hint.shape[1])


class FitNet(nn.Module):
    """Hint: mean squared error between projected student feature and teacher feature (Romero et al.).

    Over all elements of two features of one shape::

        loss = mean((student - teacher)^2)

    The paper's regressor on the student's side is the term's projector. The paper has half the sum of
    squares; the mean is what is used with the published weights (100), and does not grow with the feature's
    size.

    Returns:
        ``forward(student, teacher, mask=None)``, both of any one shape, returns a scalar, zero at equality. With a
        mask (B, H, W), for maps (B, C, h, w), the mean is over the pixels where it is True.

    Raises:
        ValueError: If the shapes differ.

    Source:
        Romero et al., FitNets: Hints for Thin Deep Nets, arXiv 1412.6550.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> losses.FitNet()(torch.zeros(2, 8, 4, 4), torch.ones(2, 8, 4, 4))
        tensor(1.)
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "shape"
    rowwise = True
    """The pixels of a map are samples: under a mask it is the loss of the rows that count."""

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean squared error of two features of one shape."""
        return fitnet(student, teacher, mask)
