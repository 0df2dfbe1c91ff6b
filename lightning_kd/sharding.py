"""Models that are sharded over devices by ``torch.distributed.fsdp.fully_shard`` (FSDP2)."""

from collections.abc import Mapping
from typing import Any

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


def whole(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state dict with the whole of every shard; every process has to call it."""
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}


def sharded_as(state: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the opposite of ``whole``: sharded where ours is."""

    def shard(value: Tensor, own: Any) -> Tensor:
        if not isinstance(own, DTensor):
            return value
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)

    return {key: shard(value, ours.get(key)) for key, value in state.items()}


def refuse_sharded(student: nn.Module, teacher: nn.Module) -> None:
    """Refuses a teacher that cannot be made of, or beside, a sharded student.

    Raises:
        ValueError: If the student is sharded.
    """
    if is_sharded(student):
        raise ValueError(
            f"The student is sharded (fully_shard), and {type(teacher).__name__} does not work with that: a sharded "
            "model cannot be copied. Train with strategy='ddp', or let a frozen teacher or an ensemble teach."
        )
