import copy
import pickle
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tapped import Counter, Fields, ModelOutput, Net, distil, hint
from torch import Tensor, nn

from lightning_kd import Distiller
from lightning_kd.taps import Taps
from lightning_kd.wiring import OUTPUT, Path


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(getattr(m, kind))
        for m in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


# Captures


def test_one_record_holds_every_call_and_is_independent_of_the_next() -> None:
    model = Net()
    taps = Taps(model, ["first", "blocks.0", OUTPUT, "first"], "it")
    taps.attach()
    x = torch.randn(2, 3)
    model(x)  # no record is open
    record = taps.run(x)
    assert {path: len(calls) for path, calls in record.items()} == {"first": 1, "blocks.0": 1, OUTPUT: 1}
    assert torch.equal(record["first"][0], model.first(x))
    assert torch.equal(record[OUTPUT][0], model(x))
    model(x)
    assert len(record["first"]) == 1
    taps.detach()


class SharedHead(nn.Module):
    """One head over three levels, as in detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Linear(3, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.head(level(x)) for level in self.levels]


def test_a_module_called_several_times_pairs_call_by_call() -> None:
    student, teacher, x = SharedHead(), SharedHead(), torch.randn(5, 3)
    losses, _ = distil(student, teacher, x, head=hint("head"))
    by_hand = [nn.functional.mse_loss(s, t) for s, t in zip(student(x), teacher(x), strict=True)]
    torch.testing.assert_close(losses["head"], sum(by_hand) / 3)


def test_calls_that_cannot_be_paired_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"Term 'head'.*'head' was called 3 times and the teacher's 'head' 1 times"):
        distil(SharedHead(), Net(), torch.randn(5, 3), head=hint("head"))


def test_two_views_pair_with_two_calls_of_the_teacher() -> None:
    student, teacher = Net(), Net()
    distiller = Distiller({"it": hint(OUTPUT)}, teacher)
    distiller.attach(student)
    views = torch.randn(5, 3), torch.randn(5, 3)
    with distiller.watch() as calls:
        for view in views:
            student(view)
    assert len(calls) == 2
    by_hand = [nn.functional.mse_loss(student(view), teacher(view)) for view in views]
    torch.testing.assert_close(distiller(calls)["it"], sum(by_hand) / 2)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradient_do_not_count(context: Any) -> None:
    student, teacher, x = Net(), Counter(Net()), torch.randn(5, 3)
    distiller = Distiller({"it": hint(OUTPUT)}, teacher)
    distiller.attach(student)
    with distiller.watch() as calls:
        with context():
            student(x)
        student(x)
    assert len(calls) == teacher.calls == 1
    with distiller.watch() as calls, context():
        student(x)
    with pytest.raises(RuntimeError, match="only under no_grad"):
        distiller(calls)


def test_calls_outside_of_a_watch_are_not_kept() -> None:
    student, teacher = Net(), Counter(Net())
    distiller = Distiller({"it": hint("blocks.0", "inner.blocks.0")}, teacher)
    distiller.attach(student)
    student(torch.randn(5, 3))
    assert teacher.calls == 0


def test_a_recursive_call_is_part_of_its_call() -> None:
    class Recursive(Net):
        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            return (self(x, again=False) if again else 0.0) + super().forward(x)

    student, teacher = Recursive(), Recursive()
    distiller = Distiller({"it": hint("first")}, teacher)
    distiller.attach(student)
    with distiller.watch() as calls:
        student(torch.randn(5, 3))
    assert len(calls) == 1
    assert len(calls[0].student["first"]) == len(calls[0].teacher["first"]) == 2


def test_a_student_that_failed_does_not_disturb_the_next_step() -> None:
    student, teacher, x = Net(inplace=True), Net(), torch.randn(5, 3)
    distiller = Distiller({"it": hint("blocks.0")}, teacher)
    distiller.attach(student)
    student.blocks[1] = nn.Linear(9, 9)
    with pytest.raises(RuntimeError, match="shapes"), distiller.watch():
        student(x)
    student.blocks[1] = nn.Linear(4, 4)
    with distiller.watch() as calls:
        student(x)
    assert len(calls) == len(calls[0].student["blocks.0"]) == 1


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("wrap", [None, lambda x: (x,), lambda x: SimpleNamespace(x=x)], ids=["", "tuple", "object"])
def test_an_output_that_is_overwritten_in_place_is_refused(side: str, wrap: Any) -> None:
    class Wrapped(Net):
        def __init__(self, inplace: bool = False) -> None:
            super().__init__(inplace=inplace)
            linear = self.first

            class First(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.linear = linear

                def forward(self, x: Tensor) -> Any:
                    out = self.linear(x)
                    return wrap(out) if wrap else out

            self.first = First()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.act(path.select(self.first(x)))))

    path = Path("first[0]" if isinstance(wrap and wrap(0), tuple) else 'first["x"]' if wrap else "first")
    student, teacher = Wrapped(inplace=side == "student"), Wrapped(inplace=side == "teacher")
    with pytest.raises(RuntimeError, match=rf"'first' in the {side} was modified in place.*inplace=False"):
        distil(student, teacher, torch.randn(5, 3), it=hint(path.text))
    # The in-place layer itself is a fine thing to tap.
    distil(student, teacher, torch.randn(5, 3), it=hint("act"))


def _replace(holder: Any, x: Any) -> None:
    if hasattr(holder, "__setitem__"):
        holder[0 if isinstance(holder, list) else "x"] = x
    else:
        holder.x = x


class Asking:
    """Which looks attributes up in one that a copy does not have at first."""

    def __init__(self, x: Tensor) -> None:
        self.data = {"x": x}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError as error:
            raise AttributeError(name) from error


class Named(namedtuple("Named", ["levels"])):
    def __new__(cls, x: Tensor) -> "Named":
        made = super().__new__(cls, [x])
        made.extra = x
        return made


HOLDERS: dict[str, tuple[Callable[[Tensor], Any], str, Callable[[Any], Any]]] = {
    "item": (lambda x: {"x": x}, '["x"]', lambda out: _replace(out, out["x"].softmax(1))),
    "key": (lambda x: {"x": x}, '["x"]', lambda out: out.pop("x")),
    "last": (lambda x: [x], "[-1]", lambda out: out.pop()),
    "levels": (lambda x: [2 * x, x], "[:]", lambda out: out.pop()),
    "deep": (lambda x: ({"x": [x]},), '[0]["x"][0]', lambda out: out[0]["x"].clear()),
    "output": (lambda x: ModelOutput(x=x), '["x"]', lambda out: _replace(out, None)),
    "fields": (Fields, '["logits"]', lambda out: setattr(out, "logits", out.logits.softmax(1))),
    "asking": (Asking, '["x"]', lambda out: out.data.update(x=1 - out.x)),
    "named": (Named, '["extra"]', lambda out: out.levels.clear()),
    "object": (lambda x: SimpleNamespace(x=x), '["x"]', lambda out: _replace(out, 1 - out.x)),
}


@pytest.mark.parametrize("kind", HOLDERS)
@pytest.mark.parametrize("who", ["student", "teacher", "step"])
def test_what_holds_an_output_is_read_as_it_was_returned(who: str, kind: str) -> None:
    hold, selector, change = HOLDERS[kind]

    class Returning(Net):
        """Calls a module that returns an object, and goes on with that."""

        def __init__(self, changes: bool = False) -> None:
            super().__init__()
            self.holding = Holding()
            self.changes = changes

        def forward(self, x: Tensor) -> Any:
            hidden = self.act(self.first(x))
            held = self.holding(hidden)
            if self.changes:
                change(held)
            self.head(self.blocks(hidden))
            return hold(hidden)

    class Holding(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return hold(x)

    student, teacher = Returning(who == "student"), Returning(who == "teacher")
    paths = [f"holding{selector}"] if who != "step" else [f"output{selector}", f"holding{selector}"]
    distiller = Distiller({path[:6]: hint(path) for path in paths}, teacher)
    distiller.attach(student)
    x = torch.randn(5, 3)
    hidden = [model.act(model.first(x)) for model in (student, teacher)]
    expected = nn.functional.mse_loss(*hidden) * (5.0 if kind == "levels" else 1.0)
    for _ in range(2):  # the teacher runs as far as is read from the second on
        with distiller.watch() as calls:
            output = student(x)
            if who == "step":
                change(output)
        for loss in distiller(calls).values():
            torch.testing.assert_close(loss, expected)


def test_the_own_output_overwritten_in_place_is_refused() -> None:
    student = Net()
    distiller = Distiller({"it": hint(OUTPUT)}, Net())
    distiller.attach(student)
    with pytest.raises(RuntimeError, match="'output' in the student was modified in place"), distiller.watch():
        student(torch.randn(5, 3)).mul_(2.0)


def test_what_no_term_reads_may_be_overwritten() -> None:
    class WithLoss(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = super().forward(x)
            return {"logits": logits, "loss": logits.mean() * 1.0}

    student = WithLoss()
    distiller = Distiller({"it": hint("output.logits")}, WithLoss())
    distiller.attach(student)
    with distiller.watch() as calls:
        out = student(torch.randn(5, 3))
        out["loss"] /= 2
    assert distiller(calls)["it"] > 0
    with pytest.raises(RuntimeError, match="'output' in the student was modified"), distiller.watch():
        student(torch.randn(5, 3))["logits"].mul_(2.0)


def test_a_shared_module_is_tapped_under_both_names() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.alias = self.first

    student, teacher, x = Tied(), Tied(), torch.randn(5, 3)
    losses, distiller = distil(student, teacher, x, a=hint("first"), b=hint("alias"))
    assert torch.equal(losses["a"], losses["b"])
    with distiller.watch() as calls:  # the teacher stops early now
        student(x)
    assert torch.equal(distiller(calls)["b"], losses["b"])


# Only as far as needed


@pytest.mark.parametrize(
    ("paths", "expected"),
    [(["first"], 1), (["first", "blocks.0"], 1), (["head"], 3), ([OUTPUT], 3), (["first", OUTPUT], 3)],
)
def test_the_model_runs_only_as_far_as_the_deepest_tap(paths: list[str], expected: int) -> None:
    model = Net()
    model.blocks[1] = later = Counter(model.blocks[1])
    taps = Taps(model, paths, "it")
    taps.attach()
    records = [taps.run(torch.ones(1, 3)) for _ in range(3)]
    assert later.calls == expected
    for path in paths:
        assert len(records[2][path]) == 1
        assert torch.equal(records[2][path][0], records[0][path][0])


def test_a_model_with_a_module_called_twice_runs_whole() -> None:
    model = SharedHead()
    taps = Taps(model, ["head", "levels.0"], "it")
    taps.attach()
    for _ in range(3):
        assert len(taps.run(torch.ones(1, 3))["head"]) == 3


def test_an_error_in_the_model_is_not_swallowed() -> None:
    taps = Taps(Net(), ["first"], "it")
    taps.attach()
    with pytest.raises(RuntimeError, match="shapes"):
        taps.run(torch.ones(1, 4))
    assert not taps.recording


# Nothing is left behind


def test_detach_leaves_no_hook_and_objects_copy_and_pickle() -> None:
    student, teacher = Net(), Net()
    _, distiller = distil(student, teacher, torch.randn(5, 3), a=hint("first"), b=hint(OUTPUT))
    assert hooks_of(student) == 3
    assert hooks_of(teacher) == 1
    distiller.attach(student)  # again
    assert hooks_of(student) == 3
    assert hooks_of(teacher) == 1
    distiller.detach()
    distiller.detach()
    assert hooks_of(student) == hooks_of(teacher) == 0
    for made in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        again = Net()
        made.attach(again)
        with made.watch() as calls:
            again(torch.randn(5, 3))
        assert set(made(calls)) == {"a", "b"}
        made.detach()
    assert pickle.loads(pickle.dumps(student)).first.weight.equal(student.first.weight)
    assert hooks_of(copy.deepcopy(student)) == 0
    with pytest.raises(RuntimeError, match="not attached"), distiller.watch():
        pass


def test_a_deep_copy_made_meanwhile_records_nothing() -> None:
    student, teacher = Net(), Counter(Net())
    distiller = Distiller({"it": hint("first", "inner.first")}, teacher)
    distiller.attach(student)
    twin = copy.deepcopy(student)
    with distiller.watch() as calls:
        twin(torch.randn(5, 3))
        assert not calls
        student(torch.randn(5, 3))
        twin(torch.randn(5, 3))
    assert teacher.calls == 1
    assert len(calls) == len(calls[0].student["first"]) == 1


def test_hooks_of_the_user_stay() -> None:
    student, seen = Net(), []
    student.first.register_forward_hook(lambda *_: seen.append(1))
    _, distiller = distil(student, Net(), torch.randn(5, 3), it=hint("first"))
    distiller.detach()
    student(torch.randn(5, 3))
    assert len(seen) == 2


def test_a_dataclass_with_slots() -> None:
    @dataclass(slots=True)
    class Output:
        logits: torch.Tensor

    class Net(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return Output(super().forward(x))

    taps = Taps(Net(2, 3), ["output"], "the net")
    taps.attach()
    record = taps.run(torch.zeros(1, 2))
    assert Path("output.logits").select(record["output"][0]).shape == (1, 3)
