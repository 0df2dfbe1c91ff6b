"""FGD: things and background apart, and the relation of all pixels."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_kd.losses import _boxes, _check
from lightning_kd.losses._numerics import full_precision, upcast


def fgd(
    student: Tensor,
    teacher: Tensor,
    boxes: Sequence[Tensor],
    temperature: float = 0.5,
    foreground: float = 1e-3,
    background: float = 5e-4,
    attention: float = 1e-3,
) -> Tensor:
    """Return the focal part, without the relation; see :class:`FGD`."""
    _check.temperature(temperature)
    _check.maps(student, teacher)
    student, teacher = upcast(student), upcast(teacher.detach())
    things = _things(boxes, teacher)
    rest = (things == 0).to(things.dtype)
    rest = rest / rest.sum((1, 2), keepdim=True).clamp_min(1.0)
    places_s, channels_s = _attention(student, temperature)
    places, channels = _attention(teacher, temperature)
    error = ((student - teacher).square() * channels[:, :, None, None]).sum(1) * places
    focal = ((foreground * things + background * rest) * error).sum()
    looks = (places_s - places).abs().sum() + (channels_s - channels).abs().sum()
    return (focal + attention * looks) / len(student)


def _attention(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return where (B, H, W) and in which channels (B, C) a map is active; the mean of both is 1."""
    energy = x.abs()
    places = (energy.mean(1).flatten(1) / temperature).softmax(1) * energy[0, 0].numel()
    channels = (energy.mean((2, 3)) / temperature).softmax(1) * energy.shape[1]
    return places.view(len(x), *x.shape[2:]), channels


def _things(boxes: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return (B, H, W): in a box 1 / its area in cells, of several the largest; 0 in the background."""
    _boxes.check(boxes, x)
    height, width = x.shape[2:]
    rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
    found = []
    for of_sample in boxes:
        x1, y1, x2, y2 = of_sample.to(x.dtype).unbind(1)
        # every cell that a box touches, and no further than the map reaches
        left, top = (x1 * width).floor().clamp(0, width - 1), (y1 * height).floor().clamp(0, height - 1)
        right = torch.maximum((x2 * width).ceil().clamp(max=width), left + 1)
        bottom = torch.maximum((y2 * height).ceil().clamp(max=height), top + 1)
        tall = (rows >= top[:, None]) & (rows < bottom[:, None])
        wide = (columns >= left[:, None]) & (columns < right[:, None])
        share = 1.0 / ((right - left) * (bottom - top))
        each = tall[:, :, None] & wide[:, None, :]
        nothing = x.new_zeros(1, height, width)
        found.append(torch.cat([each * share[:, None, None], nothing]).amax(0))
    return torch.stack(found)


class FGD(nn.Module):
    """Focal and global distillation: things and background apart, and the relation of all pixels (Yang et al.).

    With the teacher's attention ``A`` over positions (the softmax of the mean of ``|t|`` over channels, over T, times
    H W) and ``C`` over channels (likewise, times the number of channels), ``m = 1 / area`` in the cells of a box and
    ``n = 1 / their number`` in the others::

        loss = sum((foreground * m + background * n) * A * C * (s - t)^2)
             + attention * (sum |A_s - A| + sum |C_s - C|)
             + relation * sum((R_s(s) - R_t(t))^2),           each the sum over a sample, and the mean over samples

    ``R(x) = x + W2 relu(norm(W1 sum_j softmax_j(w x_j) x_j))`` is a GcBlock, one for each side, both learned. Where
    boxes overlap the smallest counts; a box counts for every cell that it touches. The defaults are those for anchors
    in one stage; the paper has (5e-5, 2.5e-5, 5e-5, 5e-7) for two stages, (1.6e-3, 8e-4, 8e-4, 8e-6) without anchors.

    The authors' code takes one more row and column to each box, with the area that belongs to it.

    Args:
        temperature: T of the attention.
        foreground: Weight (alpha) of the things.
        background: Weight (beta) of what is no thing.
        attention: Weight (gamma) of the attention's own difference.
        relation: Weight (lambda) of the relation.

    Returns:
        ``forward(student, teacher, boxes)``, both maps (B, C, H, W), and of each sample its boxes (n, 4), x1 y1 x2 y2
        in fractions of the input; returns a scalar.

    Raises:
        RuntimeError: If ``build(student, teacher)`` was not called; a Term calls it before the optimizers.
        ValueError: If the shapes differ, or boxes are malformed.

    Source:
        Yang et al., Focal and Global Knowledge Distillation for Detectors, arXiv 2111.11837, equations 3 to 15.

    Example:
        >>> import torch
        >>> from lightning_kd import losses
        >>> student, teacher = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)
        >>> loss = losses.FGD()
        >>> loss.build(student, teacher)
        >>> loss(student, teacher, boxes=[torch.tensor([[0.0, 0.0, 0.5, 0.5]]), torch.zeros(0, 4)]).shape
        torch.Size([])
    """

    align: ClassVar[Literal["none", "size", "shape"]] = "shape"

    def __init__(
        self,
        temperature: float = 0.5,
        foreground: float = 1e-3,
        background: float = 5e-4,
        attention: float = 1e-3,
        relation: float = 5e-6,
    ) -> None:
        super().__init__()
        self.temperature = _check.positive("temperature", temperature)
        _check.weights(foreground=foreground, background=background, attention=attention, relation=relation)
        self.foreground = foreground
        self.background = background
        self.attention = attention
        self.relation = relation
        self.student_side: _GcBlock | None = None
        self.teacher_side: _GcBlock | None = None

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Create the relations for these channels; values, size and number of samples do not matter."""
        _check.maps(student, teacher)
        self.student_side, self.teacher_side = (_GcBlock(x.shape[1]).to(x.device) for x in (student, teacher))

    def forward(self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Return the focal and the global part."""
        if self.student_side is None or self.teacher_side is None:
            raise RuntimeError("FGD has no relation yet: use it in a Term, or call build(student, teacher).")
        weights = (self.foreground, self.background, self.attention)
        focal = fgd(student, teacher, boxes, self.temperature, *weights)
        related = self.student_side(upcast(student)) - self.teacher_side(upcast(teacher.detach()))
        loss: Tensor = focal + self.relation * related.square().sum() / len(student)
        return loss


class _GcBlock(nn.Module):
    """A context of all pixels, added to each; arXiv 1904.11492. Its last layer starts at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.where = nn.Linear(channels, 1)
        self.change = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        nn.init.kaiming_normal_(self.where.weight)
        nn.init.zeros_(self.where.bias)
        for parameter in self.change[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) with the context added."""
        pixels = x.flatten(2).transpose(1, 2)
        with full_precision(x):
            own = self.where.weight.dtype  # bfloat16 where the trainer's precision is "bf16-true"
            look = self.where(pixels.to(own)).softmax(1).to(x.dtype)
            context = (look * pixels).sum(1)
            out: Tensor = x + self.change(context.to(own)).to(x.dtype)[:, :, None, None]
        return out
