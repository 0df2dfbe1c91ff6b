import copy
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_kd import Distiller, Term
from lightning_kd.taps import Taps
from lightning_kd.wiring import OUTPUT, Levels, Path, describe, find_module

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Fields:
    logits: Any
    hidden: Any = None


class ModelOutput(OrderedDict):
    """Like that of transformers: keys, attributes and integer positions."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __getitem__(self, key: str | int) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


class Net(nn.Module):
    def __init__(self, width: int = 4, inplace: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(3, width)
        self.act = nn.ReLU(inplace=inplace)
        self.blocks = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.act(self.first(x))))


class Counter(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


def hint(student: str, teacher: str | None = None) -> Term:
    return Term(nn.MSELoss(), student=student, teacher=teacher or student)


def distil(student: nn.Module, teacher: nn.Module, x: Tensor, **terms: Term) -> tuple[dict[str, Tensor], Distiller]:
    distiller = Distiller(terms, teacher)
    distiller.attach(student)
    with distiller.watch() as calls:
        student(x)
    return distiller(calls), distiller


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(getattr(m, kind))
        for m in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    yield
    torch._dynamo.reset()


# Paths


@pytest.mark.parametrize(
    ("text", "module", "selectors"),
    [
        ("output", OUTPUT, []),
        ("output.logits", OUTPUT, ["logits"]),
        ("output[0]", OUTPUT, [0]),
        ("output[-1].hidden[2]", OUTPUT, [-1, "hidden", 2]),
        ('output["a.b c"]', OUTPUT, ["a.b c"]),
        ("output['p3'][1]", OUTPUT, ["p3", 1]),
        ("layer3", "layer3", []),
        ("layer3.0.conv1", "layer3.0.conv1", []),
        ("encoder.4[0]", "encoder.4", [0]),
        ("encoder[0].hidden", "encoder", [0, "hidden"]),
        ("outputs.0", "outputs.0", []),
        ("output_layer", "output_layer", []),
    ],
)
def test_a_path_is_a_module_and_selectors(text: str, module: str, selectors: list[Any]) -> None:
    path = Path(text)
    assert (path.module, path.selectors) == (module, selectors)


@pytest.mark.parametrize(
    "text", ["", "[0]", "output.", "output[", "output[]", "output[a]", "layer[0", "layer[0]x", "output[1.5]", "a[0] "]
)
def test_what_is_not_a_path_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a path.*named_modules.*output\.logits"):
        Path(text)


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


@pytest.mark.parametrize("given", [0, None, torch.nn.ReLU()])
def test_what_is_no_text_is_no_path(given: Any) -> None:
    with pytest.raises(TypeError, match="name of a module as text"):
        Path(given)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("output", 7),
        ("output[0]", (7, 8)),
        ("output[-1]", [8, 7]),
        ("output.logits", {"logits": 7}),
        ('output["logits"]', {"logits": 7}),
        ("output.logits", Fields(7)),
        ("output.logits", ModelOutput(logits=7)),
        ("output[0]", ModelOutput(logits=7)),
        ('output["logits"]', ModelOutput(logits=7)),
        ("output.second", Pair(0, 7)),
        ("output[1]", Pair(0, 7)),
        ("output.hidden[1].p3", Fields(0, [0, {"p3": 7}])),
        ("output[0]", {0: 7}),
        ("output.keys", {"keys": 7}),  # a key, and not the method of a dict
    ],
)
def test_selectors_read_every_kind_of_output(text: str, value: Any) -> None:
    assert Path(text).select(value) == 7


@pytest.mark.parametrize(
    ("text", "value", "levels"),
    [
        ("neck[:]", (1, 2, 3), [1, 2, 3]),
        ("neck[1:]", {"p3": 1, "p4": 2, "p5": 3}, [2, 3]),
        ("output.features[:-1]", Fields(0, [1, 2, 3]), None),
        ("output.hidden[:-1]", Fields(0, [1, 2, 3]), [1, 2]),
        ("head[0][-2:]", ([1, 2, 3], [4, 5, 6]), [2, 3]),
    ],
)
def test_slices_select_levels(text: str, value: Any, levels: list[int] | None) -> None:
    if levels is None:
        with pytest.raises(KeyError, match="'features' is not in a Fields"):
            Path(text).select(value)
    else:
        assert Path(text).select(value) == levels
        assert isinstance(Path(text).select(value), Levels)


@pytest.mark.parametrize(
    ("text", "value", "said"),
    [
        ("output[2]", (1, 2), r"\[2\] is not in a tuple of 2 items"),
        ("output.hidden", {"logits": 1}, "'hidden' is not in a dict with the keys 'logits'"),
        ("output.hiden", Fields(1), "'hiden' is not in a Fields with the fields 'logits', 'hidden'"),
        ("output.a.b", {"a": torch.zeros(2, 3)}, r"'b' is not in a tensor of shape \(2, 3\)"),
        ("output[0]", 3, r"\[0\] is not in a int"),
        ("output[1:]", 3, r"\[1:\] is not in a int"),
        ("neck[2:]", (1, 2), r"\[2:\] selects nothing of a tuple of 2 items"),
    ],
)
def test_a_selector_that_finds_nothing_says_what_there_is(text: str, value: Any, said: str) -> None:
    with pytest.raises(KeyError, match=said):
        Path(text).select(value)


def test_describe_lists_keys_and_fields() -> None:
    assert describe(ModelOutput(logits=1)) == "a ModelOutput with the keys 'logits'"
    assert describe(None) == "a NoneType"


def test_an_unknown_module_lists_the_closest_names() -> None:
    with pytest.raises(ValueError, match=r"the student \(Net\) has no module 'blocks\.2'.*'blocks\.[01]'"):
        find_module(Net(), "blocks.2", "the student")
    told = r"has no module 'output'\. Closest: .*\. A path is a name of named_modules\(\)"
    with pytest.raises(ValueError, match=rf"{told}\.$"):  # which is no layer of a whole LightningModule
        find_module(nn.Sequential(nn.Identity()), "output", "the LightningModule")
    with pytest.raises(ValueError, match=rf"{told}, or 'output' for what forward\(\) returns\.$"):
        find_module(nn.Sequential(nn.Identity()), "output", "the student")
    with pytest.raises(ValueError, match=r"no module 'zzz'. Closest: 'first', 'act', 'blocks', 'head'"):
        find_module(Net(), "zzz", "the student")
    with pytest.raises(ValueError, match="it has no submodules"):
        find_module(nn.Linear(2, 2), "weight", "the student")


def test_names_of_a_compiled_model_are_those_of_the_model() -> None:
    model = Net()
    assert find_module(torch.compile(model, backend="eager"), "blocks.1", "it") is model.blocks[1]
    model.blocks = torch.compile(model.blocks, backend="eager")
    assert find_module(model, "blocks.1", "it") is model.blocks._orig_mod[1]
    with pytest.raises(ValueError, match=r"'blocks\.1'") as error:
        find_module(model, "blocks.3", "it")
    assert "_orig_mod" not in str(error.value)


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


# torch.compile, checkpoints, autocast


def wrapped(model: nn.Module, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def submodule(model: nn.Module, backend: str) -> nn.Module:
    model.blocks = torch.compile(model.blocks, backend=backend)
    return model


def submodule_in_place(model: nn.Module, backend: str) -> nn.Module:
    model.blocks.compile(backend=backend)
    return model


# Dynamo looks at .grad of inputs that are no leaves.
DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
COMPILED = {f.__name__: f for f in (wrapped, in_place, submodule, submodule_in_place)}
TERMS = {"a": ("first", "first"), "b": ("blocks.0", "blocks.0"), "c": ("output", "output")}


@DYNAMO
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("form", COMPILED)
def test_a_compiled_student_teaches_the_same(form: str, backend: str) -> None:
    student, teacher, x = Net(), Net(), torch.randn(5, 3)
    compiled = COMPILED[form](copy.deepcopy(student), backend)
    results = []
    for model in (student, compiled):
        distiller = Distiller({name: hint(*paths) for name, paths in TERMS.items()}, teacher)
        distiller.attach(model)
        for _ in range(3):  # with an evaluation between the steps
            model.zero_grad()
            with distiller.watch() as calls:
                model(x)
            losses = distiller(calls)
            distiller.total(losses).backward()
            with torch.no_grad():
                model(x)
        assert len(calls) == 1
        results.append((losses, [p.grad for p in model.parameters()]))
        distiller.detach()
    torch.testing.assert_close(*results)
    assert all(loss > 0 for loss in results[0][0].values())


@DYNAMO
@pytest.mark.parametrize("form", COMPILED)
@pytest.mark.parametrize("path", ["first", "output"])
def test_a_compiled_teacher_teaches_the_same(form: str, path: str) -> None:
    student, teacher, x = Net(), Net(), torch.randn(5, 3)
    losses, distiller = distil(student, teacher, x, it=hint(path))
    expected = float(losses["it"].detach())
    distiller.detach()
    losses, distiller = distil(student, COMPILED[form](copy.deepcopy(teacher), "aot_eager"), x, it=hint(path))
    for _ in range(3):  # with the early stop from the second on
        assert float(losses["it"].detach()) == pytest.approx(expected)
        with distiller.watch() as calls:
            student(x)
        losses = distiller(calls)


@DYNAMO
@pytest.mark.parametrize("form", COMPILED)
@pytest.mark.parametrize("path", ["blocks.0", "output"])
def test_compiled_and_called_before_teaches_the_same(form: str, path: str) -> None:
    student, teacher, x = Net(), Net(), torch.randn(5, 3)
    compiled = COMPILED[form](copy.deepcopy(student), "aot_eager")
    compiled(x).sum().backward()
    losses, _ = distil(compiled, teacher, x, it=hint(path))
    torch.testing.assert_close(losses["it"], distil(student, teacher, x, it=hint(path))[0]["it"])


class Holding(nn.Module):
    def __init__(self, inner: nn.Module, hold: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = inner
        self.hold = hold

    def forward(self, x: Tensor) -> Any:
        return self.hold(self.inner(x))


class After(nn.Module):
    """Works on what is in what it is given."""

    def __init__(self, selector: str, inplace: bool) -> None:
        super().__init__()
        self.selector = selector
        self.act = nn.ReLU(inplace=inplace)

    def forward(self, held: Any) -> Tensor:
        return self.act({"": lambda: held, "[0]": lambda: held[0], '["x"]': lambda: held["x"]}[self.selector]())


@DYNAMO
@pytest.mark.parametrize("form", COMPILED)
@pytest.mark.parametrize(
    ("hold", "selector"), [(lambda x: x, ""), (lambda x: (x,), "[0]"), (lambda x: {"x": x}, '["x"]')]
)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_what_a_compiled_model_overwrites_is_kept(side: str, hold: Any, selector: str, form: str) -> None:
    student, teacher, x = Net(), Net(), torch.randn(5, 3)
    for net in (student, teacher):
        net.blocks[0] = Holding(net.blocks[0], hold)
        net.blocks[1] = After(selector, inplace=False)
    losses = []
    for inplace in (False, True):
        models = {"student": copy.deepcopy(student), "teacher": copy.deepcopy(teacher)}
        models[side].blocks[1] = After(selector, inplace)
        models[side] = COMPILED[form](models[side], "aot_eager")
        model = models["student"]
        losses.append(distil(model, models["teacher"], x, it=hint(f"blocks.0{selector}"))[0]["it"])
        losses[-1].backward()
        assert model.first.weight.grad.abs().sum() > 0
    torch.testing.assert_close(*losses)


class Exchanged(nn.Module):
    """Works on an attribute of what it is given: in place, or by another in its place."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, held: Any) -> Tensor:
        held.logits = held.logits.relu_() if self.inplace else held.logits.relu()
        return held.logits


@DYNAMO
@pytest.mark.parametrize("form", COMPILED)
@pytest.mark.parametrize("hold", [Fields, lambda x: SimpleNamespace(logits=x)], ids=["dataclass", "object"])
def test_an_object_of_a_compiled_student_is_kept_as_it_was_returned(hold: Any, form: str) -> None:
    student, teacher, x = Net(), Net(), torch.randn(5, 3)
    student.blocks[0] = Holding(student.blocks[0], hold)
    expected = nn.functional.mse_loss(student.blocks[0].inner(student.act(student.first(x))),
                                      teacher.blocks[0](teacher.act(teacher.first(x))))  # fmt: skip
    term = Term(nn.MSELoss(), student='blocks.0["logits"]', teacher="blocks.0")
    for inplace in (False, True):
        model = copy.deepcopy(student)
        model.blocks[1] = Exchanged(inplace)
        model = COMPILED[form](model, "aot_eager")
        if inplace:
            with pytest.raises(RuntimeError, match="in the student was modified in place"):
                distil(model, teacher, x, it=term)
        else:
            torch.testing.assert_close(distil(model, teacher, x, it=term)[0]["it"], expected)


class Checkpointed(Net):
    use_reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.first(x))
        if self.use_reentrant is None:
            return self.head(self.blocks(hidden))
        return self.head(checkpoint(self.blocks, hidden, use_reentrant=self.use_reentrant))


def test_checkpointing_gives_the_same_gradient() -> None:
    student, teacher, x = Checkpointed(), Net(), torch.randn(5, 3)
    gradients = []
    for use_reentrant in (None, False):
        student.use_reentrant = use_reentrant
        student.zero_grad()
        losses, distiller = distil(student, teacher, x, a=hint("blocks.0"), b=hint("output"))
        distiller.total(losses).backward()
        gradients.append([p.grad.clone() for p in student.parameters()])
        distiller.detach()
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


def test_a_checkpointed_student_is_one_call() -> None:
    student, teacher = Net(), Counter(Net())
    distiller = Distiller({"it": hint("blocks.0", "inner.blocks.0")}, teacher)
    distiller.attach(student)
    with distiller.watch() as calls:
        checkpoint(student, torch.randn(5, 3), use_reentrant=False)
    distiller(calls)["it"].backward()
    assert len(calls) == teacher.calls == 1
    assert student.blocks[0].weight.grad.abs().sum() > 0


def test_a_reentrant_checkpoint_is_an_error() -> None:
    student = Checkpointed()
    student.use_reentrant = True
    with pytest.raises(ValueError, match=r"Term 'it'.*'blocks\.0' carries no gradient.*use_reentrant=False"):
        distil(student, Net(), torch.randn(5, 3), it=hint("blocks.0"))


def test_under_autocast_the_teacher_computes_as_the_student() -> None:
    student, teacher = Net(), Net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distiller = Distiller({"it": hint("first")}, teacher)
        distiller.attach(student)
        with distiller.watch() as calls:
            student(torch.randn(5, 3))
        loss = distiller(calls)["it"]
    (s,), (t,) = calls[0].student["first"], calls[0].teacher["first"]
    assert s.dtype == t.dtype == torch.bfloat16
    loss.backward()
    assert student.first.weight.grad.abs().sum() > 0


def test_a_part_of_the_batch_is_not_selected_by_mistake() -> None:
    with pytest.raises(KeyError, match="would be a part of the batch"):
        Path("layer1[0]").select(torch.zeros(2, 3))
    with pytest.raises(KeyError, match=r"\[:2\] of a tensor of shape \(2, 3\) would be a part of the batch"):
        Path("layer1[:2]").select(torch.zeros(2, 3))
