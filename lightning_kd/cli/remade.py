"""A network that was trained, and what its recipe makes: do they say the same with the same weights?"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.attachment.random_state import random_numbers_restored
from lightning_kd.attachment.rehearsal import state_restored
from lightning_kd.boxes import detections
from lightning_kd.cli.inputs import Inputs, random_inputs
from lightning_kd.cli.likeness import SAME, difference, outputs, unmatched
from lightning_kd.cli.recipe import UNLIKE, Recipe, build, unlike
from lightning_kd.teachers.stillness import set_training
from lightning_kd.wiring import lazy_in

ROUNDED = 5e-2
"""As ``SAME``, in half precision, or on an accelerator."""
CPU = torch.device("cpu")
_DRAWS = 730_501_283
"""Seed for what is drawn when a network is made again: no one's, so that what was drawn for a training is another."""


def true_recipe(
    network: nn.Module, inputs: Inputs, recipe: Recipe, whole: Recipe, device: torch.device = CPU
) -> Recipe:
    """The recipe that makes a network which says what this one says; if none does, with the reason under ``UNLIKE``.

    It is asked when a training is over: the network is called, in evaluation mode. What cannot be called says nothing,
    and neither does what says something else each time.

    Args:
        network: The network; it is on the CPU afterwards.
        inputs: What it is called with.
        recipe: Its recipe.
        whole: The same with what only says where training started from; tried where the recipe makes another network.
        device: Where it was trained: what it keeps besides weights and buffers is there.
    """
    if UNLIKE in recipe or not inputs:
        return recipe
    with (
        contextlib.suppress(Exception),  # of whatever a network is: its training does not fail by what is told of it
        _moved(network, device),
        random_numbers_restored(), torch.no_grad(), torch.compiler.set_stance("force_eager"), state_restored(network),
        warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")  # they were shown when the network was made and called
        state = copy.deepcopy(network.state_dict())
        given = random_inputs(inputs, 1, network)
        given = torch.utils._pytree.tree_map(lambda each: each.to(device), given)
        expected = _called(network, given)
        why = _why(recipe, network, state, given, expected)
        if why is None:
            return recipe
        if whole != recipe and unlike(network, whole) is None and not _why(whole, network, state, given, expected):
            return whole
        if _apart(expected, _called(network, given)) <= SAME:
            return recipe | {UNLIKE: why}
    return recipe


def _why(recipe: Recipe, network: nn.Module, state: dict[str, Any], given: Any, expected: Any) -> str | None:
    """What the network of a recipe says otherwise; None, if it is the same."""
    try:
        torch.manual_seed(_DRAWS)
        made: nn.Module = build(recipe)
        if made.state_dict().keys() != state.keys() and not lazy_in(made):
            return None  # pruned, say, until it is saved
        _take(made, network, state)
        made.to(_device(network))
        apart = _apart(expected, _called(made, given))
    except torch.OutOfMemoryError:
        return None
    except Exception as error:  # of whatever a network is
        return f"made again, it cannot be called with the same weights: {' '.join(str(error).split())[:200]}"
    if apart <= _allowed(network):
        return None
    held = "it holds something that is neither among its weights nor among its arguments"
    return f"made again with the same weights, its outputs differ by {apart:.2g} of the largest: {held}"


def _called(network: nn.Module, given: tuple[Any, ...]) -> Any:
    """What a network returns in evaluation, with the same random numbers in every call."""
    set_training(network, False)
    torch.manual_seed(0)
    returned = network(*torch.utils._pytree.tree_map(Tensor.clone, given))
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, returned)


def _take(made: nn.Module, network: nn.Module, state: dict[str, Any]) -> None:
    """Gives what was made the weights of a network, in their precision."""
    made.load_state_dict(state)  # after which nothing is lazy
    types = {name: each.dtype for name, each in (*network.named_parameters(), *network.named_buffers())}
    for name, each in (*made.named_parameters(), *made.named_buffers()):
        each.data = each.data.to(types.get(name, each.dtype))
    made.load_state_dict(state)  # as precise as they are


def _apart(expected: Any, received: Any) -> float:
    if detections(expected) and detections(received):
        return unmatched(outputs(expected), outputs(received))
    return difference(outputs(expected), outputs(received))


def _allowed(network: nn.Module) -> float:
    types = {each.dtype for each in network.parameters() if each.is_floating_point()}
    return SAME if _device(network) == CPU and types <= {torch.float32, torch.float64} else ROUNDED


@contextlib.contextmanager
def _moved(network: nn.Module, device: torch.device) -> Iterator[None]:
    try:
        network.to(device)
        yield
    finally:
        network.cpu()


def _device(network: nn.Module) -> torch.device:
    return next((each.device for each in network.parameters()), CPU)
