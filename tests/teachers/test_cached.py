"""A cached teacher gives what the live one gives, and refuses what it was not made of."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lightning_kd.caching.shards import Shards
from lightning_kd.schedules import Moment
from lightning_kd.teachers import Cached, Ensemble, Frozen, Router, Teacher


class Network(nn.Module):
    """A trunk with two levels and a head, whose output is of a kind."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.neck = Neck()
        self.head = nn.Linear(4, 12)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        logits = self.head(self.neck(self.stem(x))[0].mean((2, 3)))
        return {"tensor": logits, "dict": {"logits": logits, "aux": None, "classes": logits.argmax(1)}}[self.kind]


class Neck(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x, F.avg_pool2d(x, 2)


IMAGES = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(5))
PATHS = ["output", "neck"]


def bound(folder: Path, teacher: nn.Module | None = None, paths: list[str] | None = None, **options: Any) -> Cached:
    cached = Cached(folder, teacher, **options)
    cached.bind(nn.Identity(), paths or PATHS)
    cached.begin()
    return cached


def ask(cached: Cached, keys: list[int], images: Tensor = IMAGES) -> dict[str, list[Any]]:
    cached.look({"position": keys})
    return cached(images[keys])


def filled(folder: Path, **options: Any) -> dict[str, list[Any]]:
    """Fill a cache with the samples 0 to 9, and return what the teacher says of them."""
    network = Network()
    cached = bound(folder, network, **options)
    for keys in ([3, 1, 4, 0], [5, 9, 2, 6, 8, 7]):
        ask(cached, keys)
    cached.unbind()
    live = Frozen(network)
    live.bind(nn.Identity(), options.get("paths") or PATHS)
    return live(IMAGES)


@pytest.mark.parametrize("kind", ["tensor", "dict"])
def test_float32_is_what_the_teacher_says_bit_by_bit(kind: str, tmp_path: Path) -> None:
    network = Network(kind)
    live = Frozen(network)
    live.bind(nn.Identity(), PATHS)
    first = bound(tmp_path, network, storage="float32", shard_size=1)
    for keys in ([3, 1], [4, 0, 2]):
        ask(first, keys)
    first.unbind()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    read = bound(tmp_path)
    keys = [2, 3, 0]  # of both shards
    found, expected = ask(read, keys), live(IMAGES[keys])
    assert found.keys() == expected.keys()
    assert [type(x) for x in found["neck"]] == [tuple]
    for path in PATHS:
        for one, other in zip(tree_leaves(found[path]), tree_leaves(expected[path]), strict=True):
            assert one is other is None or (torch.equal(one, other) and one.dtype == other.dtype)


def test_a_filling_run_sees_what_later_runs_read(tmp_path: Path) -> None:
    cached = bound(tmp_path, Network())
    first = ask(cached, [0, 1])["output"][0]
    cached.begin_epoch(Moment(epoch=1))
    network = cached.teacher
    assert isinstance(network, Frozen)
    network.model.register_forward_pre_hook(lambda *_: pytest.fail("the teacher ran"))
    second = ask(cached, [0, 1])["output"][0]
    assert torch.equal(first, second)
    live = Network()(IMAGES[:2])
    assert not torch.equal(first, live)
    torch.testing.assert_close(first, live, rtol=2**-11, atol=1e-6)  # float16 has 11 bits


def test_a_batch_of_which_a_part_is_there(tmp_path: Path) -> None:
    cached = bound(tmp_path, Network(), storage="float32")
    ask(cached, [0, 1])
    cached.begin_epoch(Moment(epoch=1))
    ask(cached, [1, 2])
    cached.unbind()
    read = bound(tmp_path)
    torch.testing.assert_close(ask(read, [2, 1, 0])["output"][0], Network()(IMAGES[[2, 1, 0]]).detach())
    assert read.lacking(4) == [3]


def test_two_processes_fill_one_folder(tmp_path: Path) -> None:
    ranks = [bound(tmp_path, Network()) for _ in range(2)]  # neither finds a cache
    for rank, cached in enumerate(ranks):
        ask(cached, [rank, rank + 2])
    for cached in ranks:
        cached.begin_epoch(Moment(epoch=1))
    ranks[0].begin_epoch(Moment(epoch=2))
    for cached in ranks:
        assert cached.lacking(4) == []
    assert json.loads((tmp_path / "cache.json").read_text())["format"] == 1


def test_what_is_not_written_yet_is_written_in_the_end(tmp_path: Path) -> None:
    cached = bound(tmp_path, Network())
    ask(cached, [0, 1])
    assert not list(tmp_path.glob("*.safetensors"))
    cached.end()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert bound(tmp_path).lacking(2) == []


def test_a_rehearsal_knows_no_samples_and_writes_nothing(tmp_path: Path) -> None:
    cached = Cached(tmp_path, Network())
    cached.bind(nn.Identity(), PATHS)
    assert cached(IMAGES[:2])["output"][0].shape == (2, 12)
    assert not list(tmp_path.iterdir())
    filled(tmp_path)
    read = Cached(tmp_path)
    read.bind(nn.Identity(), PATHS)
    assert read(IMAGES[:2])["neck"][0][1].shape == (2, 4, 4, 4)


@pytest.mark.parametrize("teacher", [Ensemble([Network(), Network()]), None])
def test_pickles_as_a_folder(teacher: Teacher | None, tmp_path: Path) -> None:
    bound(tmp_path, Ensemble([Network(), Network()])).unbind()
    cached = bound(tmp_path, Ensemble([Network(), Network()]), paths=["output"])
    expected = ask(cached, [0, 1])["output"][0]
    cached.end()
    copied = pickle.loads(pickle.dumps(cached if teacher is not None else bound(tmp_path, paths=["output"])))
    copied.bind(nn.Identity(), ["output"])
    copied.begin()
    assert torch.equal(ask(copied, [0, 1])["output"][0], expected)


def test_the_index_of_the_batch_where_the_sampler_says_nothing(tmp_path: Path) -> None:
    filled(tmp_path)
    read = bound(tmp_path)
    read.look({"index": torch.tensor([2, 0])})
    expected = ask(bound(tmp_path), [2, 0])["output"][0]
    assert torch.equal(read(IMAGES[[2, 0]])["output"][0], expected)


class Words(nn.Module):
    """The mean of the words of a text that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words = nn.Embedding(1000, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return (self.words(ids) * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("others", ["longer", "shorter"])
def test_a_text_is_the_same_beside_others_that_are_longer(others: str, tmp_path: Path) -> None:
    texts = [torch.randint(1, 1000, (length,)) for length in (9, 9, 60 if others == "longer" else 2)]

    def padded(chosen: list[int]) -> tuple[Tensor, Tensor]:
        ids = nn.utils.rnn.pad_sequence([texts[i] for i in chosen], batch_first=True)
        return ids, (ids > 0).long()

    cached = bound(tmp_path, Words(), ["output"], storage="float32")
    for keys in ([0], [1, 2]):
        cached.look({"position": keys})
        cached(*padded(keys))
    cached.unbind()
    read = bound(tmp_path, paths=["output"])
    read.look({"position": [2, 0, 1]})
    found = read(*padded([2, 0, 1]))["output"][0]
    torch.testing.assert_close(found, Words()(*padded([2, 0, 1])).detach())
    texts[1] = texts[1].flip(0)
    read.begin_epoch(Moment(epoch=1))
    read.look({"position": [0, 1]})
    with pytest.raises(ValueError, match="Sample 1, and 0 more of the 2 samples in this batch, are not what"):
        read(*padded([0, 1]))


def test_bf16_inputs_are_taken_for_the_same(tmp_path: Path) -> None:
    filled(tmp_path)
    ask(bound(tmp_path), list(range(10)), IMAGES.bfloat16())


def changed_weights(folder: Path) -> None:
    network = Network()
    with torch.no_grad():
        network.head.bias[0] += 1e-6
    bound(folder, network)


def other_layers(folder: Path) -> None:
    network = Network()
    network.neck = nn.Sequential(network.neck)
    bound(folder, network)


def said(folder: Path, **changes: Any) -> None:
    file = folder / "cache.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    bound(folder)


def cut(folder: Path) -> None:
    (shard,) = folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    bound(folder)


def of_another(folder: Path) -> None:
    network = Network()
    network.head = nn.Linear(4, 12)
    bound(folder / "other", network)
    other = bound(folder / "other", network)
    ask(other, [0])
    other.unbind()
    (shard,) = (folder / "other").glob("*.safetensors")
    shard.rename(folder / shard.name)
    bound(folder)


def half_a_file(folder: Path) -> None:
    (folder / "cache.json").write_text((folder / "cache.json").read_text()[:100])
    bound(folder)


def twice(folder: Path) -> None:
    read, labels = bound(folder), {"position": [0]}
    for _ in range(2):
        read.look(labels)
        read(IMAGES[:1])


def without(folder: Path, labels: dict[str, Any]) -> None:
    read = bound(folder)
    read.look(labels)
    read(IMAGES[:2])


class Data:
    """Ten samples of which each is another one when it is asked again."""

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return IMAGES[index] + self.noise * torch.randn(3, 8, 8), 0


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other weights": (changed_weights, "is of another teacher"),
    "other layers": (other_layers, "is of another teacher"),
    "another path": (lambda folder: bound(folder, paths=["stem"]), "has no 'stem'; it has 'neck', 'output'"),
    "another storage": (lambda folder: bound(folder, Network(), storage="float32"), "as float16, and not as 'float32'"),
    "a later format": (lambda folder: said(folder, format=2), "has format 2, and this version reads 1"),
    "no paths": (lambda folder: said(folder, forms=None), "is damaged"),
    "half a file": (half_a_file, "is damaged"),
    "a shard cut short": (cut, "is damaged .*Delete it"),
    "another cache's shard": (of_another, "belongs to another cache"),
    "a sample that lacks": (lambda folder: ask(bound(folder), [9, 11], IMAGES.repeat(2, 1, 1, 1)), "lacks samples"),
    "other inputs": (lambda folder: ask(bound(folder), [0, 1], IMAGES.flip(3)), "are not what the teacher saw"),
    "other samples": (lambda folder: ask(bound(folder), [0, 1], IMAGES.roll(1, 0)), "are not what the teacher saw"),
    "a shift": (lambda folder: ask(bound(folder), [0, 1, 2], IMAGES.roll(1, 3)), "are not what the teacher saw"),
    "data that lack": (lambda folder: bound(folder).order(range(12), None), "lacks 2 of the 12 training samples"),
    "two calls": (twice, "called twice in one step"),
    "no samples": (lambda folder: without(folder, {}), "needs to know which samples"),
    "no numbers": (lambda folder: without(folder, {"index": torch.rand(2)}), "are whole numbers"),
    "negative ones": (lambda folder: without(folder, {"index": [-1, 0]}), "are from 0 to"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what: str, tmp_path: Path) -> None:
    filled(tmp_path)
    act, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        act(tmp_path)


def test_refuses_neither_cache_nor_teacher(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No cache of a teacher"):
        bound(tmp_path / "none")


def test_refuses_an_empty_cache(tmp_path: Path) -> None:
    filled(tmp_path)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    read = Cached(tmp_path)
    read.bind(nn.Identity(), PATHS)
    with pytest.raises(ValueError, match="is empty"):
        read(IMAGES[:2])


def test_refuses_data_that_are_random(tmp_path: Path) -> None:
    cached = bound(tmp_path, Network())
    state = torch.get_rng_state()
    assert cached.order(Data(0.0), "batches") == "batches"
    with pytest.raises(ValueError, match="give another sample each time"):
        cached.order(Data(0.1), "batches")
    assert torch.equal(torch.get_rng_state(), state)


class Odd(nn.Module):
    """A teacher whose answer cannot be kept."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda x: x.mean(), {}, "samples in its first dimension"),
        (lambda x: {"logits": "text"}, {}, "a cache keeps tensors"),
        (lambda x: x[:, :, : int(x.shape[0])], {}, "have not one shape"),
        (lambda x: x * 1e5, {}, "which float16 cannot hold"),
        (lambda x: x, {"storage": "top3"}, "keeps 3 of the classes"),
    ],
)
def test_refuses_answers(make: Callable[[Tensor], Any], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    cached = bound(tmp_path, Odd(make), paths=["output"], **options)

    def ask_twice() -> None:
        for keys in ([0, 1], [2, 3, 4]):
            ask(cached, keys)

    with pytest.raises(ValueError, match=message):
        ask_twice()


def test_refuses_what_does_not_stand_still() -> None:
    for teacher in (Frozen(Network(), mode="train"), Ensemble([Network()] * 2, weights=Router(2, 12))):
        with pytest.raises(TypeError, match="keeps what does not change"):
            Cached("folder", teacher)
    with pytest.raises(TypeError, match="a trained model or None"):
        Cached("folder", "teacher.ckpt")  # type: ignore[arg-type]  # on purpose
    for storage in ("int8", "top0", {"output": "half"}):
        with pytest.raises(ValueError, match="storage is 'float16'"):
            Cached("folder", storage=storage)
    with pytest.raises(ValueError, match="number of bytes"):
        Cached("folder", shard_size=0)
    with pytest.raises(RuntimeError, match="not bound"):
        Cached("folder")(IMAGES)


def test_a_full_disk_is_told_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = bound(tmp_path, Network())
    cached.order(Data(0.0), None)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5000}))  # ten samples are 6.8 kB
    with pytest.raises(OSError, match=r"needs 6\.8 kB more .* 5 kB are free"):
        ask(cached, [0, 1])
    assert not list(tmp_path.glob("*.safetensors"))


def test_top_k_by_another_way(tmp_path: Path) -> None:
    logits = 3 * torch.randn(6, 50, 2, generator=torch.Generator().manual_seed(3))
    cached = bound(tmp_path, Odd(lambda x: x), paths=["output"], storage="top7")
    cached.look({"position": range(6)})
    cached(logits)
    cached.unbind()
    read = bound(tmp_path, paths=["output"])
    read.look({"position": torch.arange(6)})
    restored = read(logits)["output"][0]
    p = logits.softmax(1)
    ranks = p.argsort(1, descending=True).argsort(1)
    rest = (p * (ranks >= 7)).sum(1, keepdim=True) / 43
    expected = torch.where(ranks < 7, p, rest.expand_as(p))
    torch.testing.assert_close(restored.exp(), expected, rtol=5e-3, atol=0)  # log p in float16: |log p| < 10 +- 2^-8
    torch.testing.assert_close(restored.softmax(1).sum(1), torch.ones(6, 2))
    student = torch.randn(6, 50, 2)
    divergence = F.kl_div(student.log_softmax(1), restored.log_softmax(1), log_target=True, reduction="sum")
    exact = (expected * (expected.log() - student.log_softmax(1))).sum()
    torch.testing.assert_close(divergence, exact, rtol=1e-3, atol=1e-3)


def test_shards_are_read_by_rows(tmp_path: Path) -> None:
    shards = Shards(tmp_path, "a", {"x": ([3], "F32")})
    for keys in ([7, 2], [2, 4, 100]):
        shards.write(torch.tensor(keys), {"x": torch.tensor(keys, dtype=torch.float32)[:, None].repeat(1, 3)})
    assert len(shards) == 4
    assert shards.has(torch.tensor([0, 2, 4, 100, 101, 10**6])).tolist() == [False, True, True, True, False, False]
    wanted = torch.tensor([100, 2, 7, 2])
    assert torch.equal(shards.read(wanted)["x"], wanted[:, None].repeat(1, 3).float())


@pytest.mark.gpu
def test_rows_for_a_gpu_are_pinned(tmp_path: Path) -> None:
    shards = Shards(tmp_path, "a", {"x": ([3], "F32")})
    for keys in ([0, 1], [2]):
        shards.write(torch.tensor(keys), {"x": torch.tensor(keys, dtype=torch.float32)[:, None].repeat(1, 3)})
    for wanted in (torch.tensor([1, 0]), torch.tensor([2, 0])):
        found = shards.read(wanted, pinned=True)["x"]
        assert found.is_pinned()
        assert torch.equal(found, wanted[:, None].repeat(1, 3).float())


def test_what_no_term_reads_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = filled(tmp_path, storage="float32")
    read, own = [], Shards.read

    def reading(self: Shards, *args: Any, **options: Any) -> dict[str, Tensor]:
        found = own(self, *args, **options)
        read.append(sorted(found))
        return found

    monkeypatch.setattr(Shards, "read", reading)
    cached = bound(tmp_path, paths=["output"])
    for _ in range(2):
        torch.testing.assert_close(ask(cached, [3, 1])["output"][0], live["output"][0][[3, 1]])
    assert read == [["input"], ["output#.0"], ["output#.0"]]  # the inputs are compared once
