"""What keeps the numbers finite: float32 whatever autocast says, and directions that are safe at zero."""

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Return ``x`` in float32; float64 stays what it is."""
    return x if x.dtype == torch.float64 else x.float()


def full_precision(x: Tensor) -> torch.autocast:
    """Return a context in which autocast leaves matrix products on the device of ``x`` in their own dtype."""
    return torch.autocast(x.device.type, enabled=False)


def unit(x: Tensor, dim: int = -1, eps: float | Tensor = 1e-12) -> Tensor:
    """Return ``x / ||x||`` along ``dim``; a vector not longer than ``eps`` gives zero, with zero gradient.

    ``F.normalize`` has the value but not the gradient: there it is 1/eps, which one dead sample brings in.
    """
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    # asked this way round, what is not a number stays so: a zero would hide it, with a gradient that is none
    return torch.where(norm <= eps, 0.0, x / norm.clamp_min(eps))


def rows(logits: Tensor, dim: int = 1) -> Tensor:
    """Return logits (B, C, ...) as (B * positions, C)."""
    return logits.movedim(dim, -1).flatten(0, -2)


def per_position(temperature: float | Tensor, logits: Tensor, dim: int = 1) -> float | Tensor:
    """Return a temperature that divides logits (B, C, ...), classes in ``dim``: of one number, or a tensor of (B, ...).

    A tensor holds one temperature for each sample (B), or for each sample and position: the logits' shape without the
    classes. It comes back with a dimension of size 1 in the place of the classes.
    """
    if not isinstance(temperature, Tensor) or not temperature.ndim:
        return temperature
    positions = temperature.reshape(*temperature.shape, *[1] * (logits.ndim - 1 - temperature.ndim))
    return positions.unsqueeze(dim)
