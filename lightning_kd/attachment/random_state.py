"""The state of the random numbers, which a run that is resumed exactly goes on with; Lightning does not save it."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states

KEY = "random_state"
"""Of a checkpoint."""


def random_state() -> dict[str, Any]:
    """Returns where torch, Python and NumPy are, as tensors and plain types: a checkpoint holds no code.

    Example:
        >>> before = random_state()
        >>> drawn = torch.rand(3)
        >>> set_random_state(before)
        >>> torch.equal(torch.rand(3), drawn)
        True
    """
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has none there
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Takes back what ``random_state`` returned."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


@contextmanager
def random_numbers_restored() -> Iterator[None]:
    """As Lightning's ``isolate_rng``, after an error, too."""
    states = _collect_rng_states()
    try:
        yield
    finally:
        _set_rng_states(states)
