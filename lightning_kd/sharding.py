"""Models that are sharded over devices by ``torch.distributed.fsdp.fully_shard`` (FSDP2)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether some of a model's layers are sharded."""
    return any(isinstance(part, FSDPModule) for part in model.modules())


def reshard(model: nn.Module) -> None:
    """Frees the whole parameters that a forward without backward left, and puts the shards in their place."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def shard_like(student: nn.Module, parts: list[nn.Module]) -> None:
    """Shards what learns beside a sharded student over the same devices, so that its gradients are averaged, too.

    One optimizer then has parameters of one kind.

    Args:
        student: The student; nothing happens if it is not sharded.
        parts: Modules that are called as such.

    Raises:
        ValueError: If a parameter cannot be sharded.
    """
    if not is_sharded(student):
        return
    mesh = next(p.device_mesh for p in student.parameters() if isinstance(p, DTensor))
    for part in parts:
        scalars = [name for name, p in part.named_parameters() if not p.ndim]
        if scalars:
            raise ValueError(
                f"The student is sharded (fully_shard), and {type(part).__name__} learns a number, {scalars[0]}, which "
                "cannot be: leave that term out, or train with strategy='ddp'."
            )
        if not is_sharded(part) and any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns what this process holds of tensors, in the same memory; what is done to it is done to the shards."""
    with torch.no_grad():
        return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


def whole(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state dict with the whole of every shard, on the CPU; every process has to call it."""

    def gather(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        # After a fit a shard may be on the CPU, where its devices cannot gather it.
        there: Any = value.to(value.device_mesh.device_type)
        return there.full_tensor().cpu()

    return {key: gather(value) for key, value in state.items()}


def sharded_as(state: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the opposite of ``whole``: sharded where ours is."""

    def shard(value: Tensor, own: Any) -> Tensor:
        if not isinstance(own, DTensor):
            return value
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)

    return {key: shard(value, ours.get(key)) for key, value in state.items()}
