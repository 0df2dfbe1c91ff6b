"""Copies of models that are sharded by ``fully_shard``, of which torch itself makes none."""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lightning_kd.sharding import is_sharded, local, reshard

M = TypeVar("M", bound=nn.Module)

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass
class Sharding:
    """One call of ``fully_shard``: which modules, and how."""

    modules: list[nn.Module]
    mesh: DeviceMesh
    settings: dict[str, Any]

    def again(self, modules: list[nn.Module], dims: Mapping[int, int], **settings: Any) -> None:
        """Shards other modules in the same way; the dimension of a parameter by its id, where it is not the first."""
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=self.mesh,
            shard_placement_fn=lambda p: Shard(dims.get(id(p), 0)),
            **self.settings,
            **settings,
        )


def deep_copy(model: M, memo: dict[int, Any]) -> M:
    """Deep-copies a model; one that is sharded is sharded again in the copy, layer by layer.

    No more than one layer of the copy is ever whole.

    Args:
        model: The model.
        memo: What takes the place of parts, by their ids, as ``copy.deepcopy`` takes it.

    Raises:
        ValueError: If the model is sharded in a way that cannot be repeated.
    """
    if not is_sharded(model) and not any(isinstance(p, DTensor) for p in model.parameters()):
        return copy.deepcopy(model, memo)
    reshard(model)
    replaced = {id(part) for m in model.modules() if id(m) in memo for part in m.modules()}
    parts = [part for part in model.modules() if id(part) not in replaced]
    shardings = shardings_of(parts)
    shards = {id(p): p for part in parts for p in part.parameters(recurse=False) if isinstance(p, DTensor)}
    _refuse_others(model, shards, shardings)
    of: dict[int, DTensor] = {}
    for key, p in shards.items():
        memo[key] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad)
        of[id(memo[key])] = p
    with ExitStack() as stack:
        for part in parts:
            _look_plain(part, stack)
        made = copy.deepcopy(model, memo)
    for sharding in shardings:
        copies = [memo[id(part)] for part in sharding.modules]
        dims = _give_memory(copies, of)
        ignored = {p for each in copies for p in each.parameters() if id(p) not in dims and not isinstance(p, DTensor)}
        sharding.again(copies, dims, reshard_after_forward=True, ignored_params=ignored)  # no backward will follow
    pairs = [
        (memo[id(part)].get_parameter(name), p)
        for part in parts
        for name, p in part.named_parameters(recurse=False)
        if isinstance(p, DTensor)
    ]
    with torch.no_grad():
        for own, value in zip(local([own for own, _ in pairs]), local([value for _, value in pairs]), strict=True):
            own.copy_(value)
    return made


def shard_as(peer: nn.Module, student: nn.Module) -> None:
    """Shards another network as the student is: the layers that have the names of sharded ones, and the whole.

    Args:
        peer: The network; nothing happens if it is sharded already, or if the student is not.
        student: The student.
    """
    if is_sharded(peer) or not is_sharded(student):
        return
    names = {id(part): name for name, part in student.named_modules()}
    there = dict(peer.named_modules())
    shardings = shardings_of(list(student.modules()))
    for sharding in shardings:
        alike = [there[names[id(part)]] for part in sharding.modules if names[id(part)] in there]
        if alike:
            sharding.again(alike, {})
    if not isinstance(peer, FSDPModule):
        shardings[-1].again([peer], {})


def shardings_of(parts: list[nn.Module]) -> list[Sharding]:
    """Returns the calls of ``fully_shard`` on some modules, those of inner layers before those around them."""
    inside = {id(part) for part in parts}
    states: dict[int, Any] = {}
    seen: set[int] = set()

    def visit(part: nn.Module) -> None:
        if id(part) not in inside or not isinstance(part, FSDPModule):
            return
        state: Any = part._get_fsdp_state()
        if id(state) not in seen:
            seen.add(id(state))
            for member in state._modules:
                for inner in member.modules():
                    visit(inner)
            states[id(state)] = state

    for part in parts:
        visit(part)
    made = []
    groups = {key: _groups(state) for key, state in states.items()}
    for key, state in states.items():
        # One that holds no parameters of its own has no group.
        group = next(iter(groups[key] or (group for own in groups.values() for group in own)), None)
        if group is None:  # and nor has anything inside
            continue
        settings = {"mp_policy": state._mp_policy, "offload_policy": group.offload_policy}
        made.append(Sharding(list(state._modules), group.mesh_info.mesh, settings))
    return made


def _groups(state: Any) -> list[Any]:
    if hasattr(state, "_fsdp_param_groups"):  # newer versions of torch: one for each mesh of parameters
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []


def _refuse_others(model: nn.Module, shards: Mapping[int, DTensor], shardings: list[Sharding]) -> None:
    """Refuses what is sharded otherwise: around the model, or over other devices, as tensor parallelism does."""
    meshes = {id(p): s.mesh for s in shardings for part in s.modules for p in part.parameters()}
    for key, p in shards.items():
        if p.device_mesh != meshes.get(key):
            name = next(name for name, own in model.named_parameters() if id(own) == key)
            raise ValueError(
                f"{name} of {type(model).__name__} is sharded, and not by fully_shard on that model or its layers "
                "alone (tensor parallelism, or fully_shard on what is around it), so that the model cannot be copied. "
                "Call fully_shard on the student itself, or let a frozen teacher or an ensemble teach."
            )


def _look_plain(part: nn.Module, stack: ExitStack) -> None:
    """Takes away what ``fully_shard`` put on a module, until the stack closes."""
    own = vars(part)
    for name in _HOOKS:
        hooks = own.get(name, {})
        users = OrderedDict((key, hook) for key, hook in hooks.items() if not _is_of_fsdp(hook))
        if len(users) < len(hooks):
            own[name] = users
            stack.callback(own.__setitem__, name, hooks)
    if isinstance(part, FSDPModule):
        for key in (STATE_KEY, REGISTRY_KEY):
            stack.callback(own.__setitem__, key, own.pop(key))
        stack.callback(setattr, part, "__class__", type(part))
        part.__class__ = type(part).__mro__[2]  # between are its own class and FSDPModule


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


def _give_memory(copies: list[nn.Module], of: Mapping[int, DTensor]) -> dict[int, int]:
    """Gives parameters that have none memory, and returns the dimensions in which they are to be sharded."""
    made: dict[int, nn.Parameter] = {}  # a parameter that two layers share stays one
    dims = {}
    for part in (part for each in copies for part in each.modules()):
        for name, empty in part.named_parameters(recurse=False):
            if id(empty) not in of:
                continue
            p = of[id(empty)]
            if id(empty) not in made:
                memory = torch.empty(p.shape, dtype=p.dtype, device=p.device)
                made[id(empty)] = nn.Parameter(memory, requires_grad=p.requires_grad)
            setattr(part, name, made[id(empty)])
            (shard,) = (placement for placement in p.placements if isinstance(placement, Shard))
            dims[id(made[id(empty)])] = shard.dim
    return dims
