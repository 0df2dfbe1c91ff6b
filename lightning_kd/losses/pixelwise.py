"""Pixelwise: any loss on vectors, on the pixels of a map that count."""

import torch
from torch import Tensor, nn

from lightning_kd.losses import _check, _mask
from lightning_kd.losses._numerics import rows
from lightning_kd.losses._wrapped import Wrapped, temperature_of_the_loss


class Pixelwise(Wrapped):
    """Any loss on vectors, on each pixel of a map: the pixels that count become the samples of a batch.

    With the pixels ``P`` where the mask is True, all of them without a mask::

        loss(student[P], teacher[P][, target[P]]),  maps (B, C, H, W) as matrices (P, C)

    So a loss of classification serves a segmentation: ``Pixelwise(DKD())``, or ``Pixelwise(DIST())``, which is DIST as
    its authors' code has it for segmentation. What sorts or relates samples may be too much for all pixels of a batch;
    ``samples`` of them, drawn anew in each call from torch's global generator, are an estimate of it.

    With a mask and without ``samples`` the number of pixels depends on the data, so that a GPU is waited for; with
    ``samples`` it is not. If fewer pixels count than are drawn, all are taken, in turns. If none does, it is 0.

    Args:
        loss: A loss on (B, C), such as ``DKD()``. Where it follows the run or sets a temperature by the batch, both
            orders are the same: what follows the run, ``CTKD``, is the outermost.
        samples: How many pixels of the batch to take; all unless given.

    Returns:
        ``forward(student, teacher, target=None, mask=None)``, maps (B, C, h, w), labels (B, H, W) of any resolution and
        a mask likewise, returns what ``loss`` returns.

    Raises:
        ValueError: If the maps differ in batch or resolution, ``loss`` needs a target and none is given, ``loss`` has
            parameters for the shapes of a sample, or ``samples`` is not a positive number.

    Source:
        Nothing of its own. For DIST on pixels: Huang et al., arXiv 2205.10536.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> teacher, labels = torch.randn(2, 5, 8, 8), torch.randint(5, (2, 8, 8))
        >>> losses.Pixelwise(losses.DKD())(teacher, teacher, labels, mask=labels != 0) < 1e-6
        tensor(True)
    """

    def __init__(self, loss: nn.Module, samples: int | None = None) -> None:
        super().__init__(loss)
        if hasattr(loss, "build"):
            raise ValueError(
                f"{type(loss).__name__} learns parameters for the shapes of whole batches: Pixelwise wraps losses that "
                "have none, DKD() say."
            )
        if self.align == "none":
            self.align = "size"
        self.per_sample = False  # the temperatures would be of pixels that are not there any more
        self.samples = None if samples is None else _check.whole("samples", samples)

    temperature = temperature_of_the_loss

    @property
    def values(self) -> dict[str, Tensor | float]:
        """What the wrapped loss says of itself."""
        return dict(getattr(self.loss, "values", {}))

    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the wrapped loss of the pixels."""
        _check.maps(student, teacher, channels=False)
        student, teacher, here = _mask.blanked(student, teacher.detach(), mask)
        label = None
        if self.takes_target and target is not None:
            label = _mask.class_target(target, student).flatten()
        s, t = rows(student), rows(teacher)
        if self.samples is not None and self.samples < len(s):
            return self._of_some(s, t, label, here)
        if here is None:
            return self.call(s, t, label)
        counts = here.flatten()
        s, t = s[counts], t[counts]
        if not len(s):
            return s.float().sum()  # 0, with the gradient 0
        return self.call(s, t, None if label is None else label[counts])

    def _of_some(self, s: Tensor, t: Tensor, label: Tensor | None, here: Tensor | None) -> Tensor:
        assert self.samples is not None
        key = torch.rand(len(s), device=s.device)
        place = torch.arange(self.samples, device=s.device)
        if here is None:
            return self._at(key.argsort()[place], s, t, label)
        counts = here.flatten()
        number = counts.sum()
        # those that count come first; round and round through them, if they are few
        chosen = (key + ~counts).argsort()[place % number.clamp_min(1)]
        if label is not None:
            label = label.where(counts, 0)
        return torch.where(number > 0, self._at(chosen, s, t, label), 0.0)

    def _at(self, chosen: Tensor, s: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return self.call(s[chosen], t[chosen], None if label is None else label[chosen])
