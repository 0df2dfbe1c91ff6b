"""Networks that are compiled, compute again in their backward pass, or run under autocast."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tapped import Counter, Fields, Net, distil, hint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_kd import Distiller, Term


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    yield
    torch._dynamo.reset()


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
