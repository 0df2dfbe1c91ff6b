from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_kd import Distiller, Term, holding, losses
from lightning_kd.overwriting import Given, overwritten, tensors_in, versions_of


class Batch:
    def __init__(self, images: Any) -> None:
        self.images = images


@dataclass
class Fields:
    images: Any


@dataclass(slots=True)
class Slots:
    images: Any


class Private:
    __slots__ = ("__images",)

    def __init__(self, images: Any) -> None:
        self.__images = images

    @property
    def images(self) -> Any:
        return self.__images

    @images.setter
    def images(self, images: Any) -> None:
        self.__images = images


def tells(call: Callable[..., Any], *args: Any, left: Any = None) -> bool:
    given = Given((args, {}), WeakIdKeyDictionary() if left is None else left)
    call(*args)
    return given.overwritten() is not None or given.exchanged() is not None


def tensors(number: int = 3) -> list[Tensor]:
    return [torch.randn(2) for _ in range(number)]


# What is told


def new_list(batch: Any) -> None:
    batch.images = type(batch.images)(x - 1.0 for x in batch.images)


def new_item(batch: Any) -> None:
    batch.images[1] = batch.images[1] - 1.0


def in_place(batch: Any) -> None:
    batch.images[1].sub_(1.0)


@pytest.mark.parametrize("of", [Batch, Fields, Slots, Private])
def test_a_list_in_an_object_is_looked_into(of: Callable[[Any], Any]) -> None:
    for call in (new_list, new_item, in_place):
        assert tells(call, of(tensors()))
    for call in (new_list, in_place):
        assert tells(call, of(tuple(tensors())))
    for call in (new_item, in_place):
        assert tells(call, of(dict(enumerate(tensors()))))
        assert tells(call, of([None, *tensors()]))
    assert tells(lambda batch: batch.images[0].update(x=torch.ones(2)), of([{"x": torch.zeros(2)}]))
    assert tells(lambda batch: in_place(batch.images[0]), of([of(tensors())]))
    assert not tells(lambda batch: setattr(batch, "images", [x.detach() for x in batch.images]), of(tensors()))
    assert not tells(lambda batch: batch.images.append(torch.ones(2)), of(tensors()))


def test_a_teacher_that_normalizes_a_list_in_an_object_is_refused() -> None:
    class Normalizing(nn.Linear):
        def forward(self, batch: Any) -> Tensor:
            new_list(batch)
            return super().forward(torch.stack(batch.images))

    student = Normalizing(2, 3)
    distiller = Distiller({"kd": Term(losses.KD())}, Normalizing(2, 3))
    distiller.attach(student)
    with distiller.watch(), pytest.raises(ValueError, match=r"exchanges what it is given: .*copy\.deepcopy\(batch\)"):
        student(Batch(tensors()))


def test_objects_that_are_shared_or_moved_are_no_exchange() -> None:
    def moved(batch: Any) -> None:
        batch.first = Batch(batch.images)  # a way that is shorter than the one before
        batch.images = [*batch.images]

    def tidied(batch: Any) -> None:
        del batch.images[0].same

    batch, shared = Batch([Batch(tensors())]), Batch(tensors())
    shared.me, batch.images[0].same, batch.also = shared, shared, shared
    left = WeakIdKeyDictionary()
    assert not tells(moved, batch, left=left)
    for call in (new_list, new_item, in_place):
        assert tells(call, batch.images[0], left=left)  # another name for it has left nothing there
    assert tells(tidied, batch, left=left)


# What others have left


def masked(batch: Any) -> None:
    batch.mask = torch.ones(2)


def test_what_was_left_in_one_object_is_in_that_one() -> None:
    def inner(batch: Any) -> None:
        masked(batch.images)

    left, batch = WeakIdKeyDictionary(), Batch(tensors())
    for _ in range(3):
        assert not tells(masked, batch, left=left)
    other = Batch(tensors())
    other.mask = torch.zeros(2)
    assert tells(masked, other, left=left)
    assert tells(new_item, batch, left=left)

    kept = Batch(tensors())
    for _ in range(3):  # the batch is another each time, and what it holds is not
        assert not tells(inner, Batch(kept), left=left)
    assert tells(inner, Batch(other), left=left)


def test_what_was_left_in_a_mapping_that_is_made_anew() -> None:
    def filled(batch: Any) -> None:
        batch.images = UserDict(batch.images)
        batch.images["mask"] = torch.ones(2)

    left, batch = WeakIdKeyDictionary(), Batch(UserDict(x=torch.ones(2)))
    for _ in range(3):
        assert not tells(filled, batch, left=left)
        batch.images = UserDict(batch.images)  # as the student, which is the same kind


def test_what_was_left_in_an_object_without_weak_references_is_known_by_the_way() -> None:
    def filled(batch: Any) -> None:
        batch.images["mask"] = torch.ones(2)

    left, batch = WeakIdKeyDictionary(), Slots({"x": torch.ones(2)})
    for _ in range(3):
        assert not tells(filled, batch, left=left)


def test_objects_are_not_kept() -> None:
    left, batch = WeakIdKeyDictionary(), Batch(tensors())
    tells(masked, batch, left=left)
    assert len(left) == 1
    del batch
    assert len(left) == 0


# What it costs


class Counted:
    """Tells how often somebody asks for what it holds."""

    asked = 0

    def __init__(self) -> None:
        self.__holds: dict[Any, Any] = {}

    __slots__ = ("__holds",)

    @property  # type: ignore[misc]
    def __dict__(self) -> dict[Any, Any]:  # type: ignore[override]
        Counted.asked += 1
        return self.__holds


def asked(batch: Any) -> int:
    Counted.asked = 0
    assert not tells(lambda _: None, batch)
    return Counted.asked


def test_objects_that_hold_each_other_are_looked_into_once() -> None:
    linked = [Counted() for _ in range(8)]
    for one in linked:
        one.__dict__.update({str(i): each for i, each in enumerate(linked)}, x=torch.ones(2))
    assert asked(linked[0]) == 2 * 8  # before and after
    linked[7].__dict__["x"].add_(1.0)
    assert tells(lambda batch: linked[7].__dict__["x"].add_(1.0), linked[0])


def test_an_output_of_objects_that_know_each_other_is_told_and_not_walked_for_ever() -> None:
    several = [SimpleNamespace(x=torch.zeros(2)) for _ in range(12)]
    for one in several:
        one.others = several
    found = list(tensors_in(several[0]))
    assert {id(x) for x in found} == {id(one.x) for one in several}
    assert len(found) < 2000
    before = versions_of(several[0])
    several[5].x.add_(1)
    assert overwritten(several[0], before)


def test_of_many_things_some_are_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(Batch({i: Counted() for i in range(1_500)})) == 2 * 1_000
    assert tells(new_list, Batch(tensors(1_500)))
    assert tells(lambda batch: batch.images.pop(0), Batch(tensors(1_500)))
    many = [Counted() for _ in range(20)]
    for one in many:
        one.__dict__.update(enumerate(range(10)))
    assert asked(Batch(many)) == 2 * 20
    monkeypatch.setattr(holding, "_MOST", 100)
    assert 0 < asked(Batch(many)) < 2 * 10


class Reading(Mapping[str, Tensor]):
    """Computes its items, and keeps one tensor."""

    def __init__(self) -> None:
        self.reads, self.kept = 0, torch.ones(2)

    def __getitem__(self, name: str) -> Tensor:
        self.reads += 1
        return 2 * self.kept

    def __iter__(self) -> Iterator[str]:
        return iter(map(str, range(10)))

    def __len__(self) -> int:
        return 10


def test_items_that_are_computed_are_not() -> None:
    lazy = Reading()
    assert not tells(lambda _: None, lazy)
    assert not tells(lambda _: None, Batch(lazy))
    assert lazy.reads == 0
    assert tells(lambda batch: batch.kept.add_(1.0), lazy)
