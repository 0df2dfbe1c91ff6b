"""Weighted means over teachers, each of what it knows."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_kd.losses._numerics import upcast
from lightning_kd.wiring import describe


def log_mean(log_p: Tensor, log_weights: Tensor, log_known: Tensor) -> Tensor:
    """Returns log probabilities (B, C, ...): the weighted mean of probabilities over those that know a class.

    Args:
        log_p: Log probabilities (K, B, C, ...); where a teacher does not know the class, anything finite.
        log_weights: Logarithms of the weights, (K, B) or (K, 1).
        log_known: (K, C) or (K, 1): 0 where the teacher knows the class, else -inf.
    """
    return (_log_shares(log_p, log_weights, log_known) + log_p).logsumexp(0).log_softmax(1)


def mean(values: Tensor, log_weights: Tensor, log_known: Tensor) -> Tensor:
    """Returns the weighted mean (B, C, ...) of values (K, B, C, ...) over those that know a class; see ``log_mean``."""
    return (_log_shares(values, log_weights, log_known).exp() * values).sum(0)


def _log_shares(values: Tensor, log_weights: Tensor, log_known: Tensor) -> Tensor:
    shares = log_weights[:, :, None] + log_known[:, None]
    shares = shares - shares.logsumexp(0)
    return shares.view(*shares.shape, *[1] * (values.ndim - 3))


def mean_of_calls(path: str, calls: Sequence[Sequence[Any]], weights: Tensor) -> list[Any]:
    """Averages what the module at a path returned in each teacher, call by call.

    Args:
        path: The path, for error messages.
        calls: For each teacher what its module returned, once per call.
        weights: (K, B) or (K, 1).

    Raises:
        ValueError: If there is no mean of it.
    """

    def weighted(*values: Any) -> Any:
        if all(value is None for value in values):
            return None
        fit = all(isinstance(v, Tensor) and v.is_floating_point() and v.shape == values[0].shape for v in values)
        if not fit or weights.shape[1] not in (1, *values[0].shape[:1]):
            raise ValueError(
                f"The teachers' features at {path!r} have no mean: {shapes(values)}. Tap a layer that has the same "
                "shape in every teacher, with the samples in its first dimension, or 'output'."
            )
        return sum(w.view(-1, *[1] * (v.ndim - 1)) * upcast(v) for w, v in zip(weights, values, strict=True))

    if len({len(own) for own in calls}) > 1:
        counts = ", ".join(str(len(own)) for own in calls)
        raise ValueError(f"The teachers of the ensemble called {path!r} {counts} times: the calls cannot be paired.")
    return [tree_map(weighted, *values) for values in zip(*calls, strict=True)]


def shapes(values: Sequence[Any]) -> str:
    """Says the shapes of tensors, for error messages, and what is not a tensor."""
    return ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else describe(v) for v in values)
