"""A batch as it came: what is copied of it, and what a step put there."""

from collections import UserDict, deque
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_kd.attachment.batches import add_new, as_it_comes
from lightning_kd.holding import Made


class Encoded(UserDict[str, Any]):
    """As the batches of transformers."""


class Keys(dict[str, Any]):
    """Whose keys are attributes."""

    def __init__(self, **given: Any) -> None:
        super().__init__(given)
        self.__dict__ = self


class Stored:
    """As the graphs of torch_geometric: what it holds is in another object, which its own copy copies."""

    def __init__(self, **given: Any) -> None:
        self.__dict__["store"] = Encoded(given)

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["store"][name]

    def __copy__(self) -> "Stored":
        return Stored(**self.store)


class ReadOnly:
    def __init__(self, y: Tensor) -> None:
        self.__dict__["y"] = y

    y = property(lambda self: self.__dict__["y"])


@dataclass
class Mixable:
    y: Tensor
    mixed: Tensor | None = None


@dataclass(slots=True)
class Slotted:
    y: Tensor
    mixed: Tensor | None = None


def test_every_part_has_a_copy_of_its_own() -> None:
    """Copies of dicts that an object's copy makes on the way are freed, and ids with them."""
    for seed in range(50):
        torch.manual_seed(seed)
        parts = [Encoded(text=Encoded(y=torch.tensor([i])), lang=torch.tensor([i])) for i in range(8)]
        came = as_it_comes([*parts, {"deep": parts[::-1]}])
        assert [int(part["text"]["y"]) for part in came[:8]] == [*range(8)]
        assert [int(part["lang"]) for part in came[8]["deep"]] == [*range(8)][::-1]


def test_what_is_one_stays_one() -> None:
    y = torch.arange(3)
    came = as_it_comes({"ids": y, "labels": y, "all": [y]})
    assert came["ids"] is came["labels"] is came["all"][0] is not y
    keys = as_it_comes(Keys(y=y))
    keys["y"] = keys["y"] + 1
    assert torch.equal(keys.y, y + 1)


@pytest.mark.parametrize("make", [ReadOnly, lambda y: Stored(y=y), lambda y: Keys(y=y), Mixable])
def test_what_a_step_exchanges_is_there_again(make: Any) -> None:
    batch, y = make(torch.arange(3)), torch.arange(3)
    came = as_it_comes(batch)
    (batch.store if isinstance(batch, Stored) else vars(batch))["y"] = None
    assert torch.equal(came.y, y)


def test_items_of_a_deque_and_of_a_list() -> None:
    for batch in (deque([torch.arange(2), torch.arange(3)]), [torch.arange(2), torch.arange(3)]):
        came = as_it_comes(batch)
        batch.pop().fill_(0)
        assert torch.equal(came[1], torch.arange(3))


def test_images_are_copied_where_nothing_tells_that_they_are_overwritten() -> None:
    image = torch.zeros(2)
    assert as_it_comes(image) is image
    with torch.inference_mode():
        image = torch.zeros(2)
        assert as_it_comes(image) is not image


def test_what_is_new_goes_before_what_was_nothing() -> None:
    y, mixed = torch.arange(3), torch.ones(3)
    kinds: list[tuple[Any, Any]] = [
        (Mixable(y), lambda batch: batch),
        (Encoded(y=y, mixed=None), lambda batch: batch),
        ([torch.zeros(2), {"y": y}], lambda batch: batch[1]),
        ({"t": {"y": y}}, lambda batch: batch["t"]),
    ]
    for batch, part in kinds:
        made: Made = {}
        came, added = as_it_comes(batch, made), set()  # type: ignore[var-annotated]
        for value in (mixed, mixed + 1):
            names = vars(part(batch)) if isinstance(batch, Mixable) else part(batch)
            names["mixed"], names["y"] = value, value
            add_new(came, batch, made, added)
            found = vars(part(came)) if isinstance(batch, Mixable) else part(came)
            assert found["mixed"] is value
            assert torch.equal(found["y"], y)


def test_what_is_new_is_found_in_slots_and_lists() -> None:
    for part in (Slotted(torch.arange(2)), [torch.zeros(2), None], [torch.zeros(2)]):
        made: Made = {}
        came, added, new = as_it_comes(part, made), set(), torch.ones(2)
        if isinstance(part, Slotted):
            part.mixed = new
        else:
            part[1:] = [new]
        for _ in range(2):  # who asks again finds it again
            add_new(came, part, made, added)
            assert (came.mixed if isinstance(came, Slotted) else came[1]) is new


@pytest.mark.parametrize(
    "change",
    [
        lambda labels: [label for label in labels if label is not None],
        lambda labels: [torch.tensor(9), *labels],
        lambda labels: [label for label in labels for _ in range(2)],
        lambda labels: [torch.tensor(7)] * 3,
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_new_in_another_list_is_none_of_the_one_that_came(change: Any, in_place: bool) -> None:
    batch: dict[str, Any] = {"y": [torch.tensor(0), None, torch.tensor(2)]}
    made: Made = {}
    came = as_it_comes(batch, made)
    if in_place:
        batch["y"][:] = change(batch["y"])
    else:
        batch["y"] = change(batch["y"])
    add_new(came, batch, made, set())
    assert came["y"] == [0, None, 2]


def test_attributes_of_labels_come_along() -> None:
    labels = torch.arange(3)
    labels.classes = ["a", "b", "c"]
    assert as_it_comes([labels])[0].classes == labels.classes


def test_labels_of_different_lengths_have_copies_of_their_own() -> None:
    jagged = torch.nested.nested_tensor_from_jagged(torch.arange(4), torch.tensor([0, 1, 4]))
    (came,) = as_it_comes([jagged])
    jagged.values().zero_()
    assert came.values().tolist() == [0, 1, 2, 3]


def test_what_is_new_in_parts_that_changed_places_is_each_ones_own() -> None:
    batch = {"targets": [{"y": torch.tensor(i)} for i in range(3)]}
    made: Made = {}
    came = as_it_comes(batch, made)
    batch["targets"].reverse()
    for target in batch["targets"]:
        target["late"] = target["y"] + 10
    add_new(came, batch, made, set())
    assert [(int(each["y"]), int(each["late"])) for each in came["targets"]] == [(0, 10), (1, 11), (2, 12)]
