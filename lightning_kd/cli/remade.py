"""A network of a fit, made again as its checkpoint will make it: does it say the same with the same weights?"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_kd.attachment.random_state import random_numbers_restored
from lightning_kd.attachment.rehearsal import state_restored
from lightning_kd.boxes import detections
from lightning_kd.cli.inputs import Inputs, random_inputs
from lightning_kd.cli.likeness import SAME, difference, outputs, unmatched
from lightning_kd.cli.recipe import UNLIKE, Recipe, build, unlike
from lightning_kd.teachers.stillness import set_training

ROUNDED = 5e-2
"""As ``SAME``, on an accelerator or in half precision, where memory formats and kernels decide how is rounded."""
_DRAWS = 730_501_283
"""Seed for what is drawn when a network is made again: no one's, so that what was drawn for a training is another."""


class Remade:
    """A recipe, and the network that it makes, beside the one that is trained.

    Args:
        recipe: The recipe.
        whole: The same with what only says where training started from; tried where the recipe makes another network.
    """

    def __init__(self, recipe: Recipe, whole: Recipe | None = None) -> None:
        self.recipe = recipe
        self._others = [whole] if whole is not None and whole != recipe else []
        self._made: nn.Module | None = None

    def check(self, network: nn.Module, inputs: Inputs) -> Recipe:
        """The recipe, with what is otherwise under ``UNLIKE``, if the network that it makes says something else.

        Called is a copy of the network, and random numbers are as before. What cannot be copied or called says nothing.

        Args:
            network: The network as it is now.
            inputs: What it is called with.
        """
        if UNLIKE in self.recipe or not inputs:
            return self.recipe
        with contextlib.suppress(Exception), _undisturbed(network):  # a fit does not fail by what it is told
            if (alike := self._copied(network)) is None:
                return self.recipe
            network = alike
            given = random_inputs(inputs, 2, network)
            given = torch.utils._pytree.tree_map(lambda each: each.to(_device(network)), given)
            expected = _called(network, given)
            if why := self._why(network, given, expected):
                while self._others:
                    other = Remade(self._others.pop())
                    if unlike(network, other.recipe) is None and not other._why(network, given, expected):
                        self.recipe, self._made = other.recipe, other._made
                        return self.recipe
                # One that says something else each time cannot be compared.
                if _apart(expected, _called(network, given)) <= SAME:
                    return self.recipe | {UNLIKE: why}
        return self.recipe

    def _fresh(self) -> nn.Module:
        """The network of the recipe, made once."""
        if self._made is None:
            torch.manual_seed(_DRAWS)
            self._made = build(self.recipe)
        return self._made

    def _copied(self, network: nn.Module) -> nn.Module | None:
        """A copy of the network, with the hooks that it was made with; None, where one would reach the network."""
        own = {name: _hooks(part) for name, part in self._fresh().named_modules()}
        if not all(map(inspect.ismethod, (hook for hooks in own.values() for hook in hooks))):
            return None
        copied = copy.deepcopy(network, {id(each): each for each in _generators(network)})
        for name, part in copied.named_modules():
            kept = [hook.__qualname__ for hook in own.get(name, ())]
            for hooks in (part._forward_hooks, part._forward_pre_hooks):
                for key in [k for k, each in hooks.items() if not _of_torch(each)]:
                    if getattr(hooks[key], "__qualname__", None) not in kept:
                        del hooks[key]
        return copied

    def _why(self, network: nn.Module, given: tuple[Any, ...], expected: Any) -> str | None:
        """What is otherwise; None, if it is the same."""
        held = "it holds something that is neither among its weights nor among its arguments"
        try:
            made = self._fresh()
            if made.state_dict().keys() != network.state_dict().keys() and not any(map(is_lazy, made.parameters())):
                return None  # pruned, say, until it is saved
            made.to(_device(network))
            try:
                _take(made, network)
                apart = _apart(expected, _called(made, given))
            finally:
                made.cpu()
        except torch.OutOfMemoryError:
            return None
        except Exception as error:  # of whatever a network is
            return f"made again, it cannot be called with the same weights: {' '.join(str(error).split())[:200]}"
        if apart <= _allowed(network):
            return None
        return f"made again with the same weights, its outputs differ by {apart:.2g} of the largest: {held}"


@contextlib.contextmanager
def _undisturbed(network: nn.Module) -> Iterator[None]:
    """What is done here draws no random numbers of others, and leaves the network as it is.

    It is in evaluation mode meanwhile: a copy may reach it by a function that is kept in an attribute.
    """
    generators = [(each, each.get_state()) for each in _generators(network)]
    try:
        with (
            random_numbers_restored(), torch.inference_mode(False), torch.no_grad(),
            torch.autocast(_device(network).type, enabled=False), torch.compiler.set_stance("force_eager"),
            warnings.catch_warnings(), state_restored(network),
        ):  # fmt: skip
            warnings.simplefilter("ignore")  # they were shown when the network was made and called
            set_training(network, False)
            yield
    finally:
        for generator, state in generators:
            generator.set_state(state)


def _generators(network: nn.Module) -> list[torch.Generator]:
    """The generators that the parts of a network have, or their classes."""
    holders = [each for part in network.modules() for each in (part, *type(part).__mro__)]
    return [value for each in holders for value in vars(each).values() if isinstance(value, torch.Generator)]


def _hooks(part: nn.Module) -> list[Any]:
    """The hooks of a module that are not torch's own, which compute weights."""
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    return [hook for hook in hooks if not _of_torch(hook)]


def _of_torch(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or type(hook).__module__).startswith("torch.")


def _device(network: nn.Module) -> torch.device:
    return next((each.device for each in network.parameters()), torch.device("cpu"))


def _called(network: nn.Module, given: tuple[Any, ...]) -> Any:
    """What a network returns in evaluation, with the same random numbers in every call."""
    set_training(network, False)
    torch.manual_seed(0)
    returned = network(*torch.utils._pytree.tree_map(Tensor.clone, given))
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, returned)


def _take(made: nn.Module, network: nn.Module) -> None:
    """Gives what was made the weights of a network, in their precision."""
    made.load_state_dict(network.state_dict())  # after which nothing is lazy
    types = {name: each.dtype for name, each in (*network.named_parameters(), *network.named_buffers())}
    for name, each in (*made.named_parameters(), *made.named_buffers()):
        each.data = each.data.to(types.get(name, each.dtype))
    made.load_state_dict(network.state_dict())  # as precise as they are


def _apart(expected: Any, received: Any) -> float:
    if detections(expected) and detections(received):
        return unmatched(outputs(expected), outputs(received))
    return difference(outputs(expected), outputs(received))


def _allowed(network: nn.Module) -> float:
    types = {each.dtype for each in network.parameters() if each.is_floating_point()}
    exact = _device(network).type == "cpu" and types <= {torch.float32, torch.float64}
    return SAME if exact else ROUNDED
