"""What student and teacher are called with: their views of a batch, and what either does to it."""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engine import Net, watched
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_kd import Distiller, Term, losses
from lightning_kd.teachers import Frozen


def test_the_teacher_sees_what_the_student_saw() -> None:
    class Keywords(Net):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return super().forward(scale * x)

    student, teacher, x = Keywords(4), Keywords(8), torch.randn(5, 6)
    distiller = Distiller({"it": Term(nn.MSELoss())}, teacher)
    values = distiller(watched(distiller, student, x, scale=3.0))
    torch.testing.assert_close(values["it"], nn.functional.mse_loss(student(x, scale=3.0), teacher(x, scale=3.0)))


@pytest.mark.parametrize(
    "made",
    [lambda x: x * 2, lambda x: (x * 2,), lambda x: {"x": x * 2}],
    ids=["tensor", "tuple", "dict"],
)
def test_the_teacher_may_see_something_else(made: Any) -> None:
    student, teacher, x = Net(4), Net(8), torch.randn(5, 6)
    distiller = Distiller({"it": Term(nn.MSELoss())}, teacher, teacher_input=made)
    values = distiller(watched(distiller, student, x))
    torch.testing.assert_close(values["it"], nn.functional.mse_loss(student(x), teacher(x * 2)))


def test_an_error_of_teacher_input_is_told_as_its_own() -> None:
    distiller = Distiller({"it": Term(nn.MSELoss())}, Net(4), teacher_input=lambda x, y: x)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'") as caught:
        watched(distiller, Net(4), torch.randn(5, 6))
    assert "when teacher_input was called with the student's arguments" in caught.value.__notes__[0]
    other = Distiller({"it": Term(nn.MSELoss())}, Net(4), teacher_input=lambda x: x[:, :2])
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught_later:
        watched(other, Net(4), torch.randn(5, 6))
    assert "when the teacher was called with what teacher_input returned" in caught_later.value.__notes__[0]


def test_the_students_input_may_be_made_of_what_the_teacher_said() -> None:
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    asked: list[Tensor] = []

    def sharpened(x: Tensor, *, teacher: Tensor) -> Tensor:
        asked.append(teacher)
        return x + teacher.sum()

    class Both(nn.Module):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return (student - teacher).square().mean()

    distiller = Distiller({"kd": Term(Both())}, teacher, student_input=sharpened)
    distiller.attach(student)
    x = torch.randn(4, 3)
    with distiller.watch() as calls:
        out = student(x)
    said = teacher(x)
    torch.testing.assert_close(asked, [said.detach()])
    torch.testing.assert_close(out, student(x + said.sum()))
    torch.testing.assert_close(distiller(calls)["kd"], (out - said).square().mean())


def test_a_student_that_is_computed_again_in_backward_lacks_what_student_input_made() -> None:
    student = Net(4)
    distiller = Distiller({"kd": Term(losses.KD())}, Net(8), student_input=lambda x: 2.0 * x)
    distiller.attach(student)
    with distiller.watch():
        whole = checkpoint(student, torch.randn(5, 6), use_reentrant=False)
    with pytest.raises(ValueError, match="computed again in backward"):
        whole.sum().backward()
    distiller.detach()
    distiller = Distiller({"kd": Term(losses.KD())}, Net(8))
    distiller.attach(student)
    with distiller.watch() as calls:
        whole = checkpoint(student, torch.randn(5, 6), use_reentrant=False)
    (whole.sum() + distiller.total(distiller(calls))).backward()
    assert len(calls) == 1


def noisy(x: Tensor) -> Tensor:
    return x.add_(1.0)


def noisy_for_the_teacher(x: Tensor, *, teacher: Tensor) -> Tensor:
    return x.add_(teacher.mean())


def replacing(x: list[Tensor]) -> list[Tensor]:
    x[0] = x[0] + 1.0
    return x


@pytest.mark.parametrize("made", [noisy, noisy_for_the_teacher, replacing])
def test_a_view_for_the_student_that_the_teacher_would_see_is_refused(made: Any) -> None:
    class Listed(Net):
        def forward(self, x: Any) -> Tensor:
            return super().forward(x[0] if isinstance(x, list) else x)

    x = torch.randn(5, 6)
    distiller = Distiller({"kd": Term(losses.KD())}, Listed(8), student_input=made)
    with pytest.raises(ValueError, match=r"student_input changes what it is given \(a tensor of shape \(5, 6\)\)"):
        watched(distiller, Listed(4), [x] if made is replacing else x)


def test_an_answer_that_is_overwritten_before_it_is_compared_is_refused() -> None:
    class Halving(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(0.5))

    class Buffered(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.held = getattr(self, "held", torch.empty(len(x), self.out_features))
            return self.held.copy_(super().forward(x))

    told = "Term 'it': the teacher's 'output' was overwritten in place after it had answered"
    terms = {"it": Term(nn.MSELoss())}
    for teacher in (nn.Identity(), nn.Unflatten(1, (6,))):  # the input, and a view of it
        distiller = Distiller(terms, teacher)
        calls = watched(distiller, Halving(6, 6), torch.randn(5, 6))
        with pytest.raises(ValueError, match=told):
            distiller(calls)
        distiller.detach()
    distiller, student = Distiller(terms, Buffered(6, 4)), Net(4)
    distiller.attach(student)
    for times in (1, 2, 1):
        with distiller.watch() as calls:
            for _ in range(times):
                student(torch.randn(5, 6))
        if times == 1:
            assert distiller(calls)["it"] > 0
        else:
            with pytest.raises(ValueError, match=told):
                distiller(calls)


def test_what_is_overwritten_and_not_compared_does_not_matter() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"input": x, "twice": 2 * x}

    student = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))
    distiller = Distiller({"it": Term(nn.MSELoss(), teacher="output.twice")}, Both())
    x = torch.randn(5, 6)
    calls = watched(distiller, student, x)
    x.zero_()
    assert distiller(calls)["it"] > 0


@pytest.mark.parametrize("draws", ["teacher_input", "dropout", "nothing"])
def test_a_student_that_is_computed_again_draws_what_it_drew(draws: str) -> None:
    x = torch.randn(5, 6)
    teacher = Frozen(nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5)), mode="train" if draws == "dropout" else "eval")
    noise = (lambda x: x + torch.randn_like(x)) if draws == "teacher_input" else None
    student = nn.Sequential(Net(16), nn.Dropout(0.5))
    distiller = Distiller({"kd": Term(losses.KD())}, teacher, teacher_input=noise)
    distiller.attach(student)

    def more(x: Tensor) -> Tensor:  # what a checkpoint may have around a student
        return nn.functional.dropout(student(nn.functional.dropout(x, 0.1)), 0.1)

    found = []
    for again in (False, True):
        torch.manual_seed(1)
        student.zero_grad()
        with distiller.watch() as calls:
            outputs = [checkpoint(more, x, use_reentrant=False) if again else more(x) for _ in range(2)]
        loss = distiller.total(distiller(calls)) + torch.stack(outputs).square().mean()
        drawn = torch.rand(3)
        loss.backward()
        found.append([loss, drawn, torch.rand(3), *(p.grad for p in student.parameters())])
    assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_teacher_input_that_changes_a_batch_is_refused() -> None:
    class OfDict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 4)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.net(batch["x"])

    def larger(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor]]:
        batch["x"] = batch["x"] * 100
        return (batch,)

    student = OfDict()
    distiller = Distiller({"kd": Term(losses.KD())}, OfDict(), teacher_input=larger)
    distiller.attach(student)
    with pytest.raises(ValueError, match=r"teacher_input changes what it is given"), distiller.watch():
        student({"x": torch.randn(3, 6)})
    distiller.detach()


def test_inputs_with_a_field_that_is_not_set() -> None:
    @dataclasses.dataclass
    class Batch:
        x: Tensor
        cache: Tensor = dataclasses.field(init=False)

    class OfBatch(nn.Linear):
        def forward(self, batch: Batch) -> Tensor:
            return super().forward(batch.x)

    student = OfBatch(6, 4)
    distiller = Distiller({"kd": Term(losses.KD())}, OfBatch(6, 4))
    distiller.attach(student)
    with distiller.watch() as calls:
        student(Batch(torch.randn(3, 6)))
    assert distiller(calls)["kd"] > 0
    distiller.detach()


class Graph:
    def __init__(self, x: Tensor) -> None:
        self.store = UserDict({"x": x})


@dataclass
class Points:
    x: Tensor
    counts: Tensor | None = None


class Attributes(dict[str, Tensor]):
    """As of Addict, which is no dict to pytrees."""


class OnObjects(nn.Module):
    """Leaves its features in the object that it is given, as graph networks do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, width), nn.Linear(width, 6)

    def forward(self, batch: Any) -> Tensor:
        there = getattr(batch, "store", batch if isinstance(batch, Attributes) else vars(batch))
        there["counts"] = torch.ones(1)  # this is nothing that the student would read
        there["x"] = self.last(self.first(there["x"]).relu())
        return there["x"]


@pytest.mark.parametrize("of", [Graph, Points, lambda x: Attributes(x=x)])
def test_what_the_teacher_leaves_in_an_object_is_no_input_of_the_student(of: Callable[[Tensor], Any]) -> None:
    student, x = OnObjects(4), torch.randn(5, 6)
    distiller = Distiller({"kd": Term(losses.KD())}, OnObjects(8))
    distiller.attach(student)
    with distiller.watch(), pytest.raises(ValueError, match=r"exchanges what it is given: .*copy\.copy"):
        student(of(x))
    distiller.detach()
    expected, seen = student(of(x)), []
    student.first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    distiller = Distiller({"kd": Term(losses.KD())}, OnObjects(8), teacher_input=lambda batch: (copy.deepcopy(batch),))
    distiller.attach(student)
    with distiller.watch() as calls:
        assert torch.equal(student(of(x)), expected)
    assert seen[0] is x
    assert distiller(calls)["kd"] > 0


def test_an_object_whose_contents_stay_may_be_filled_and_moved() -> None:
    class Model(OnObjects):
        def forward(self, batch: Any) -> Tensor:
            batch.store = UserDict(batch.store)  # as BatchEncoding.to
            batch.store["x"] = batch.store["x"].detach()
            batch.store["hidden"] = self.first(batch.store["x"])  # new, and in the next step there
            return self.last(batch.store["hidden"])

    student, graph = Model(4), Graph(torch.randn(5, 6))
    distiller = Distiller({"kd": Term(losses.KD())}, Model(8))
    distiller.attach(student)
    for _ in range(3):
        with distiller.watch() as calls:
            student(graph)
        assert distiller(calls)["kd"] > 0


class Lazy(Mapping[str, Tensor]):
    """Makes its items when asked, and one of them cannot be made."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __getitem__(self, name: str) -> Tensor:
        if name == "missing":
            raise RuntimeError(name)
        return torch.ones(5, 6)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@pytest.mark.parametrize("names", [("x",), ("x", "missing")])
def test_a_mapping_that_makes_its_items_is_no_exchange(names: tuple[str, ...]) -> None:
    class Model(OnObjects):
        def forward(self, batch: Any) -> Tensor:
            return self.last(self.first(batch["x"]))

    student = Model(4)
    distiller = Distiller({"kd": Term(losses.KD())}, Model(8))
    distiller.attach(student)
    with distiller.watch() as calls:
        student(Lazy(*names))
    assert distiller(calls)["kd"] > 0


def test_an_input_that_exchanges_parts_of_an_object_is_refused() -> None:
    def noisy(batch: Points) -> Points:
        batch.x = batch.x + 1.0
        return batch

    for side in ("teacher_input", "student_input"):
        student = OnObjects(4)
        distiller = Distiller({"kd": Term(losses.KD())}, OnObjects(8), **{side: noisy})
        distiller.attach(student)
        with distiller.watch(), pytest.raises(ValueError, match=f"{side} changes what it is given"):
            student(Points(torch.randn(5, 6)))


class Doubling(nn.ModuleList):
    """A module whose truth value is False, since it holds none."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x


def test_an_input_without_a_length_is_an_input() -> None:
    student, teacher, x = Net(4), Net(8).eval(), torch.randn(5, 6)
    distiller = Distiller({"kd": Term(losses.KD())}, teacher, teacher_input=Doubling())
    distiller.attach(student)
    with distiller.watch() as calls:
        student(x)
    torch.testing.assert_close(calls[0].teacher["output"][0], teacher(2.0 * x).detach())


def test_what_a_students_input_makes_of_the_answer_is_no_answer() -> None:
    class Answering(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x)}

    def exchanging(x: Tensor, *, teacher: dict[str, Tensor]) -> Tensor:
        teacher["logits"] = teacher["logits"].softmax(1)
        return x + teacher["logits"].sum()

    student, teacher, x = Net(4), Answering(8), torch.randn(5, 6)
    term = Term(nn.MSELoss(), teacher="output.logits")
    distiller = Distiller({"it": term}, teacher, student_input=exchanging)
    values = distiller(watched(distiller, student, x))
    said = teacher(x)["logits"]
    torch.testing.assert_close(values["it"], nn.functional.mse_loss(student(x + said.softmax(1).sum()), said))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_that_makes_the_teachers_arguments_is_called_as_a_teacher_is(dtype: torch.dtype) -> None:
    encoder = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    encoder[1].eval()
    student, teacher, x = Net(4).to(dtype), Net(8), torch.randn(5, 6)
    for given in ({"teacher_input": encoder}, {"teacher": Frozen(teacher, input=encoder)}):
        distiller = Distiller({"it": Term(nn.MSELoss())}, **{"teacher": teacher} | given)
        values = distiller(watched(distiller, student, x.to(dtype)))
        assert [part.training for part in encoder] == [True, False, True]
        with torch.no_grad():
            said = teacher(copy.deepcopy(encoder).eval()(x.to(dtype).float()))
        expected = nn.functional.mse_loss(student(x.to(dtype)).detach().double(), said.double())
        torch.testing.assert_close(
            values["it"].double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
        )
        distiller.detach()
