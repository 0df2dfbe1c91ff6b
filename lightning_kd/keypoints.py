"""What networks say of keypoints: as targets, as points, and how far it is from the truth.

Places are fractions of the input, 0 at its left or upper edge and 1 at the other; cell ``i`` of ``n`` has its centre at
``(i + 1/2) / n``. So heatmaps, bins and coordinates of any resolution speak of the same places.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_kd.wiring import describe


class Heatmaps(NamedTuple):
    """A map for each joint, ``heatmaps (B, K, h, w)``, 1 where it is and 0 far from it."""

    heatmaps: Tensor


class SimCC(NamedTuple):
    """Logits of the bins of each axis: ``simcc_x (B, K, w)``, ``simcc_y (B, K, h)``."""

    simcc_x: Tensor
    simcc_y: Tensor


class Coordinates(NamedTuple):
    """The places themselves, ``coordinates (B, K, 2)``: x, y in fractions of the input."""

    coordinates: Tensor


Said = Heatmaps | SimCC | Coordinates

SIGMA = {"heatmaps": 1 / 32, "simcc": 1 / 80}
"""Of the Gaussian around a joint, as a fraction of the side; about what is usual at 256 x 192.

Heatmaps there have 64 x 48 cells and a sigma of two. With one cell, networks on small maps learn to say nothing."""


def said(output: Any) -> Said:
    """Recognises what a network returned.

    Args:
        output: One of the three, or anything with their fields (Hugging Face's ``VitPose`` has ``heatmaps``) as
            attributes or keys; or a tensor ``(B, K, h, w)``, two ``(B, K, bins)``, or a tensor ``(B, K, 2)``.

    Raises:
        ValueError: If it is none of these.

    Example:
        >>> said({"coordinates": torch.zeros(2, 17, 2)}).coordinates.shape
        torch.Size([2, 17, 2])
    """
    if isinstance(output, Tensor):
        places = output.ndim == 3 and output.shape[-1] == 2
        output = {"coordinates" if places else "heatmaps": output}
    elif type(output) in (tuple, list) and len(output) == 2:
        output = dict(zip(SimCC._fields, output, strict=True))
    for kind, dims in ((Heatmaps, 4), (SimCC, 3), (Coordinates, 3)):
        of_mapping = isinstance(output, Mapping)
        fields: list[Any] = [output.get(f) if of_mapping else getattr(output, f, None) for f in kind._fields]
        if all(isinstance(each, Tensor) and each.ndim == dims for each in fields):
            return kind(*fields)
    raise ValueError(
        "expected of a network of poses heatmaps (B, K, h, w), simcc_x and simcc_y (B, K, bins), or coordinates "
        f"(B, K, 2), by these names or alone; got {describe(output)}. For another one override Pose.said."
    )


def log_gaussian(at: Tensor, cells: int, sigma: float) -> Tensor:
    """Returns ``-(c - at)^2 / (2 sigma^2)`` of the cells' centres c: ``(..., cells)`` of ``(...)``."""
    centres = (torch.arange(cells, device=at.device, dtype=at.dtype) + 0.5) / cells
    return -((centres - at.unsqueeze(-1)) / sigma).square() / 2


def loss(output: Said, places: Tensor, counted: Tensor, sigma: float | None = None) -> Tensor:
    """Returns the supervised loss over the joints that count; 0 if none does.

    Heatmaps: the mean squared error to Gaussians of height 1 (arXiv 1804.06208). SimCC: the Kullback-Leibler divergence
    from a Gaussian over the bins, the sum of both axes (arXiv 2107.03332). Coordinates: the sum of the absolute errors
    of x and y. Each is a mean over joints.

    Args:
        output: What the network said.
        places: ``(B, K, 2)`` in fractions of the input.
        counted: ``(B, K)``, bool.
        sigma: Of the Gaussian, as a fraction of the side; unless given 1/32 for heatmaps, but at least two cells, and
            1/80 for bins.

    Example:
        >>> places, everywhere = torch.rand(2, 5, 2), torch.ones(2, 5, dtype=torch.bool)
        >>> float(loss(Coordinates(places), places, everywhere))
        0.0
    """
    places = places.float().where(counted.unsqueeze(-1), 0.5)
    if isinstance(output, Heatmaps):
        maps = output.heatmaps.float()
        height, width = maps.shape[2:]
        wide, high = (
            log_gaussian(places[..., i], n, sigma or max(SIGMA["heatmaps"], 2 / n))
            for i, n in enumerate((width, height))
        )
        target = (high.unsqueeze(-1) + wide.unsqueeze(-2)).exp()
        each = (maps - target).square().mean((2, 3))
    elif isinstance(output, SimCC):
        of_axis = []
        for i, logits in enumerate(output):
            target = log_gaussian(places[..., i], logits.shape[-1], sigma or SIGMA["simcc"]).log_softmax(-1)
            logs = logits.float().log_softmax(-1)
            of_axis.append(F.kl_div(logs, target, reduction="none", log_target=True).sum(-1))
        each = of_axis[0] + of_axis[1]
    else:
        each = (output.coordinates.float() - places).abs().sum(-1)
    return each.where(counted, 0.0).sum() / counted.sum().clamp(min=1)


def decode(output: Said) -> tuple[Tensor, Tensor]:
    """Returns where the joints are said to be, and how certain that is.

    The highest cell, and between cells the vertex of the parabola through the logarithms of it and its two neighbours:
    exact for a Gaussian (the second order of arXiv 1910.06278, one axis at a time).

    Args:
        output: What the network said.

    Returns:
        Places ``(B, K, 2)`` in fractions of the input, and scores ``(B, K)``: the height of a heatmap's peak, the
        geometric mean of the probabilities of the two highest bins, or 1 for coordinates, which have none. Where a map
        or bins have a value that is not a number, neither has the place.

    Example:
        >>> x = log_gaussian(torch.tensor([[0.3]]), 16, sigma=0.05)
        >>> decode(SimCC(x, x))[0]
        tensor([[[0.3000, 0.3000]]])
    """
    if isinstance(output, Coordinates):
        return output.coordinates.detach().float(), torch.ones_like(output.coordinates[..., 0], dtype=torch.float32)
    if isinstance(output, SimCC):
        logs = [logits.detach().float().log_softmax(-1) for logits in output]
        highest = logs[0].amax(-1) + logs[1].amax(-1)
        return torch.stack([_peak(each) for each in logs], dim=-1), (highest / 2).exp()
    maps = output.heatmaps.detach().float()
    height, width = maps.shape[2:]
    score, cell = maps.flatten(2).max(-1)
    rows, columns = cell // width, cell % width
    floor = 1e-3  # what was learned by squares is below 0 here and there
    along_x = maps.gather(2, rows[..., None, None].expand(-1, -1, 1, width))[:, :, 0].clamp_min(floor).log()
    along_y = maps.gather(3, columns[..., None, None].expand(-1, -1, height, 1))[..., 0].clamp_min(floor).log()
    return torch.stack([_peak(along_x), _peak(along_y)], dim=-1), score


def _peak(logs: Tensor) -> Tensor:
    """Returns the place of the highest of the cells in the last dimension, between their centres."""
    cells = logs.shape[-1]
    at = logs.argmax(-1, keepdim=True)
    left, middle, right = (logs.gather(-1, (at + d).clamp(0, cells - 1)) for d in (-1, 0, 1))
    curvature = 2 * middle - left - right
    inside = (at > 0) & (at < cells - 1) & (curvature > 1e-6) & curvature.isfinite()
    shift = ((right - left) / (2 * curvature)).where(inside, 0.0).clamp(-0.5, 0.5)
    place = (at + shift + 0.5) / cells
    return place.where(~middle.isnan(), torch.nan).squeeze(-1)
