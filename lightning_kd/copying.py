"""Copies of a user's modules, without what a fit changes on them."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lightning.pytorch import LightningDataModule
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, Dataset

from lightning_kd.sharded_copies import deep_copy

M = TypeVar("M", bound=nn.Module)

_NOT_COPIED = (Dataset, DataLoader, LightningDataModule, DeviceMesh)


class _Reduced:
    """Takes the place of a module's ``__reduce_ex__``, by which it is deep-copied and pickled.

    What is on loan there for the length of a fit is left out: hooks of this package, methods that hide the class's own.
    What learns stays: averages of a module are computed parameter by parameter.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.loans: list[Mapping[str, Any]] = []

    def __call__(self, protocol: Any) -> Any:
        made = type(self.module).__reduce_ex__(self.module, protocol)
        if not isinstance(made, tuple) or len(made) < 3 or not isinstance(made[2], dict):
            return made  # a class with a way of its own
        state = {name: value for name, value in made[2].items() if value is not self}
        for names in ("_forward_hooks", "_forward_pre_hooks"):
            ours = {key for key, hook in state.get(names, {}).items() if is_ours(hook)}
            for kind in [name for name in state if name.startswith(names)]:
                state[kind] = OrderedDict((key, hook) for key, hook in state[kind].items() if key not in ours)
        for own in reversed(self.loans):
            for name, value in own.items():
                if value is None:
                    state.pop(name, None)
                else:
                    state[name] = value
        return (*made[:2], state, *made[3:])


def is_ours(hook: Any) -> bool:
    """Whether a hook is of this package."""
    return getattr(hook, "__module__", "").startswith("lightning_kd.")


def lend(module: nn.Module, own: Mapping[str, Any] | None = None) -> Callable[[], None]:
    """Lets copies and pickles of a module be without our hooks, and without what else is there for a while.

    Args:
        module: The module.
        own: What attributes that are replaced were before, by name; None for those of its class.

    Returns:
        What ends that.

    Example:
        >>> import copy
        >>> module = nn.Linear(2, 2)
        >>> module.forward = lambda x: 0
        >>> undo = lend(module, {"forward": None})
        >>> "forward" in vars(copy.deepcopy(module))
        False
        >>> undo()
    """
    held = vars(module)
    reduced = held.setdefault("__reduce_ex__", _Reduced(module))
    loan = dict(own or {})
    if not isinstance(reduced, _Reduced):  # the instance has one of its own
        return lambda: None
    reduced.loans.append(loan)

    def undo() -> None:
        reduced.loans[:] = [each for each in reduced.loans if each is not loan]
        if not reduced.loans:
            held.pop("__reduce_ex__", None)

    return undo


def own_copy(module: M, memo: dict[int, Any] | None = None) -> M:
    """Deep-copies a module without what a fit changed on it: replaced methods are the class's own, our hooks are gone.

    Data that it holds is shared and not copied. What is sharded is sharded in the copy, too.

    Args:
        module: The module.
        memo: What takes the place of parts, by their ids, as ``copy.deepcopy`` takes it.
    """
    held = [value for part in module.modules() for value in vars(part).values()]
    data = {id(value): value for value in held if isinstance(value, _NOT_COPIED)}
    try:
        made = deep_copy(module, {**data, **(memo or {})})
    except Exception as error:
        error.add_note(
            f"This happened when {type(module).__name__} was deep-copied, to be its own teacher or to hold a peer. "
            "Keep what cannot be copied (open files, non-leaf tensors, locks) out of it, or name the network inside "
            "of it: student=..."
        )
        raise
    for part in made.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if is_ours(hook)]:
                del hooks[key]
    if hasattr(made, "_orig_mod"):  # a compiled module makes its own forward, in the copy anew
        return made
    for name in [n for n, value in vars(made).items() if inspect.isroutine(value) and hasattr(type(made), n)]:
        delattr(made, name)
    return made


def unshare(module: nn.Module) -> None:
    """Gives a module memory of its own.

    Tensors that were sent to another process (ddp_spawn) are shared with it, and every process would train them.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.is_shared():  # type: ignore[no-untyped-call]  # torch's own gap
            tensor.data = tensor.data.clone()
