"""Copies of a user's modules."""

import inspect
from typing import Any, TypeVar

from lightning.pytorch import LightningDataModule
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, Dataset

from lightning_kd.sharded_copies import deep_copy

M = TypeVar("M", bound=nn.Module)

_NOT_COPIED = (Dataset, DataLoader, LightningDataModule, DeviceMesh)


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
            for key in [k for k, hook in hooks.items() if getattr(hook, "__module__", "").startswith("lightning_kd.")]:
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
