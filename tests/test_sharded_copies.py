"""Copies of sharded models: as their originals are, and apart from them; two processes are in test_strategies.py."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_kd import teachers
from lightning_kd.schedules import Moment
from lightning_kd.sharded_copies import deep_copy, shard_as, shardings_of
from lightning_kd.sharding import whole


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Tied(nn.Module):
    """A small language model: its first and its last layer share their weight, and one parameter is not sharded."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(6, width)
        self.block = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width))
        self.head = nn.Linear(width, 6, bias=False)
        self.head.weight = self.words.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("offset", torch.arange(6.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.words(x))) * self.scale + self.offset


def sharded(mesh: DeviceMesh, model: Tied) -> Tied:
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    columns = model.block[0].weight
    fully_shard(model.block[0], mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p is columns else None)
    fully_shard([model.block[2], model.block[1]], mesh=mesh, mp_policy=half)
    fully_shard(model, mesh=mesh, ignored_params={model.scale})
    return model


def calls_of(model: nn.Module) -> list[tuple[list[str], torch.dtype | None]]:
    names = {id(part): name for name, part in model.named_modules()}
    found = shardings_of(list(model.modules()))
    return [([names[id(part)] for part in call.modules], call.settings["mp_policy"].param_dtype) for call in found]


WORDS = torch.tensor([0, 3, 5])


def test_a_copy_is_sharded_as_its_original_and_apart_from_it(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    model, seen = sharded(mesh, Tied()).eval(), []
    model.block.register_forward_hook(lambda *_: seen.append(1))
    model(WORDS).sum().backward()  # lazily made hooks are there, and gradients
    made = deep_copy(model, {})
    assert calls_of(made) == calls_of(model)
    assert {type(part) for part in made.modules()} == {type(part) for part in model.modules()}
    assert made.head.weight is made.words.weight
    assert not isinstance(made.scale, DTensor)
    assert [p.placements for p in made.block.parameters()] == [p.placements for p in model.block.parameters()]
    assert all(p.grad is None for p in made.parameters())
    seen.clear()
    torch.testing.assert_close(made(WORDS), model(WORDS), rtol=0, atol=0)
    assert len(seen) == 2  # the user's hook is in both
    assert dict(made.named_modules()).keys() == dict(model.named_modules()).keys()
    before = copy.deepcopy(whole(made.state_dict()))
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    torch.testing.assert_close(whole(made.state_dict()), before, rtol=0, atol=0)


def test_the_average_of_half_precision_is_kept_in_float32(mesh: DeviceMesh) -> None:
    student = sharded(mesh, Tied()).to(torch.bfloat16)
    teacher = teachers.EMA(decay=0.5)
    teacher.bind(student, ["output"])
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}
    before = teacher.model.head.weight.full_tensor().clone()
    with torch.no_grad():
        student.head.weight.add_(1.0)
    teacher.update(Moment(step=1))
    want = before.lerp(student.head.weight.full_tensor().float(), 0.5)
    torch.testing.assert_close(teacher.model.head.weight.full_tensor(), want)
    with torch.no_grad():
        out = teacher(WORDS)["output"][0]
    assert out.dtype == torch.float32
    assert not out.requires_grad


def test_a_peer_is_sharded_where_it_has_the_students_layers(mesh: DeviceMesh) -> None:
    peer = Tied(width=8)
    peer.scale = nn.Parameter(torch.ones(1))  # torch shards no single number
    shard_as(peer, sharded(mesh, Tied()))
    assert calls_of(peer) == calls_of(sharded(mesh, Tied()))
    other = nn.Sequential(nn.Linear(2, 2))
    shard_as(other, peer)
    assert [isinstance(part, FSDPModule) for part in other.modules()] == [True, False]
    untouched = nn.Linear(2, 2)
    shard_as(untouched, nn.Linear(2, 2))
    assert not isinstance(untouched, FSDPModule)


def test_around_a_peer_nothing_is_sharded_where_nothing_learns(mesh: DeviceMesh) -> None:
    around = nn.Sequential(nn.Linear(2, 2))
    student, peer = around[0], nn.Linear(2, 3)
    fully_shard(student, mesh=mesh)
    fully_shard(around, mesh=mesh)
    made = deep_copy(around, {id(student): peer})
    assert made[0] is peer
    assert made(torch.ones(1, 2)).shape == (1, 3)
    assert not isinstance(made, FSDPModule)


def test_what_is_sharded_otherwise_is_refused(mesh: DeviceMesh) -> None:
    inside = nn.Sequential(nn.Linear(2, 2))
    fully_shard(nn.Sequential(inside), mesh=mesh)
    tensor_parallel = nn.Linear(2, 2)
    tensor_parallel.weight = nn.Parameter(distribute_tensor(tensor_parallel.weight.detach(), mesh, [Replicate()]))
    for model, name in ((inside, "0.weight"), (tensor_parallel, "weight")):
        with pytest.raises(ValueError, match=f"{name} of .* is sharded, and not by fully_shard on that model"):
            teachers.PastSelf().bind(model, ["output"])
