import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_kd import Distiller, Term, losses, schedules
from lightning_kd.taps import Record
from lightning_kd.teacher_layers import TeacherLayers
from lightning_kd.teachers import EMA, Ensemble, Frozen, Itself, Teacher


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, width), nn.ReLU())
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


class Failing(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        raise self.error


class Through(nn.Module):
    """A loss behind a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (self.layer(student) - teacher).square().mean()


def watched(distiller: Distiller, student: nn.Module, *args: Any, **kwargs: Any) -> Any:
    distiller.attach(student)
    with distiller.watch() as calls:
        student(*args, **kwargs)
    return calls


def hint(loss: nn.Module | None = None, **kwargs: Any) -> Term:
    return Term(loss or losses.FitNet(), **{"student": "stem", "teacher": "stem"} | kwargs)


# Construction


@pytest.mark.parametrize(
    "name", ["loss", "task", "", "a.b", "a b", "1st", "keys", "items", "training", "_modules", "forward", "train/kd"]
)
def test_names_that_cannot_be_logged_or_held_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r} cannot be a term's name"):
        Distiller({name: Term(losses.KD())}, Net(4))


@pytest.mark.parametrize("name", ["kd", "hint-3", "stage_1", "KD", "weight", "teacher"])
def test_names_that_can(name: str) -> None:
    assert list(dict(Distiller({name: Term(losses.KD())}, Net(4)).named_terms())) == [name]


def test_what_is_no_term_or_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="terms is empty"):
        Distiller({}, Net(4))
    with pytest.raises(TypeError, match="'kd' is a KD; wrap the loss"):
        Distiller({"kd": losses.KD()}, Net(4))  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="teacher is a module"):
        Distiller({"kd": Term(losses.KD())}, "resnet18")  # type: ignore[arg-type]
    for name in ("teacher_input", "student_input"):
        with pytest.raises(TypeError, match=f"{name} is a function of the arguments .* got 32"):
            Distiller({"kd": Term(losses.KD())}, Net(4), **{name: 32})  # type: ignore[arg-type]


def test_the_teacher_is_no_part_of_it() -> None:
    teacher = Net(8)
    distiller = Distiller({"hint": hint()}, teacher)
    watched(distiller, Net(4), torch.randn(5, 6))
    assert isinstance(distiller.teacher, Frozen)
    assert distiller.teacher.model is teacher
    theirs = set(map(id, teacher.parameters()))
    assert not theirs & set(map(id, distiller.parameters()))
    assert teacher not in list(distiller.modules())
    assert not distiller.state_dict()
    distiller.to(torch.float64)
    assert teacher.head.weight.dtype == torch.float32
    teacher.eval()
    distiller.train()
    assert not teacher.training


def test_a_teacher_that_is_one_is_taken_as_it_is() -> None:
    teacher = Frozen(Net(4), mode="train")
    assert Distiller({"kd": Term(losses.KD())}, teacher).teacher is teacher


# Wiring


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_an_unknown_path_names_term_side_and_closest_names(side: str) -> None:
    distiller = Distiller({"kd": Term(losses.KD()), "hint": hint(**{side: "steem"})}, Net(4))
    student = Net(4)
    with pytest.raises(ValueError, match=rf"Term 'hint': the {side} \(Net\) has no module 'steem'.*'stem'"):
        distiller.attach(student)
    assert not student._forward_hooks
    assert not student._forward_pre_hooks


def test_a_task_offers_names() -> None:
    def knowledge(model: nn.Module) -> dict[str, str]:
        return {"logits": "output.logits", "features": "stem", "wide": f"stem.{0 if model.width == 4 else 1}"}

    class Named(Net):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.width = width

        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"logits": super().forward(x)}

    terms = {
        "kd": Term(nn.MSELoss(), student="logits", teacher="logits"),
        "hint": Term(nn.MSELoss(), student="features", teacher="features"),
    }
    student, teacher, x = Named(4), Named(4), torch.randn(5, 6)
    distiller = Distiller(terms, teacher, knowledge=knowledge)
    values = distiller(watched(distiller, student, x))
    torch.testing.assert_close(values["kd"], nn.functional.mse_loss(student(x)["logits"], teacher(x)["logits"]))
    torch.testing.assert_close(values["hint"], nn.functional.mse_loss(student.stem(x), teacher.stem(x)))
    distiller.detach()
    with pytest.raises(ValueError, match=r"no module 'logit'.*The task offers 'logits', 'features'"):
        Distiller({"kd": Term(nn.MSELoss(), student="logit")}, teacher, knowledge=knowledge).attach(student)


def test_errors_name_the_term() -> None:
    student, x = Net(4), torch.randn(5, 6)
    for error, kind in [(ValueError("bad"), ValueError), (KeyError("bad"), ValueError)]:
        distiller = Distiller({"it": Term(Failing(error))}, Net(4))
        calls = watched(distiller, student, x)
        with pytest.raises(kind, match="Term 'it': bad"):
            distiller(calls)
        distiller.detach()
    distiller = Distiller({"it": Term(Failing(ZeroDivisionError("bad")))}, Net(4))
    calls = watched(distiller, student, x)
    with pytest.raises(ZeroDivisionError) as caught:
        distiller(calls)
    assert "distillation term 'it'" in caught.value.__notes__[0]


def test_shapes_that_cannot_be_bridged_name_the_term() -> None:
    class Map(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[..., None, None]

    teacher = Net(4)
    teacher.stem = nn.Sequential(teacher.stem, Map(), nn.Flatten())
    distiller = Distiller({"it": hint(teacher="stem.1")}, teacher)
    calls = watched(distiller, Net(4), torch.randn(5, 6))
    with pytest.raises(ValueError, match=r"Term 'it': student \(5, 4\) and teacher \(5, 4, 1, 1\) cannot be bridged"):
        distiller.build(calls[0])


def test_a_selector_that_finds_nothing_names_the_term() -> None:
    distiller = Distiller({"it": Term(losses.KD(), teacher="output.logits")}, Net(4))
    calls = watched(distiller, Net(4), torch.randn(5, 6))
    with pytest.raises(ValueError, match=r"Term 'it'.*'logits' is not in a tensor of shape \(5, 4\)"):
        distiller(calls)


# Calls


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


def test_without_a_call_there_is_nothing_to_distil() -> None:
    distiller = Distiller({"it": Term(nn.MSELoss())}, Net(4))
    with pytest.raises(RuntimeError, match="not attached"), distiller.watch():
        pass
    distiller.attach(Net(4))
    with distiller.watch() as calls:
        pass
    with pytest.raises(RuntimeError, match="student was not called"):
        distiller(calls)


def test_a_module_is_attached() -> None:
    distiller = Distiller({"it": Term(nn.MSELoss())}, Net(4))
    with pytest.raises(TypeError, match="the student that is attached is the module itself, got 'model'"):
        distiller.attach("model")  # type: ignore[arg-type]  # the mistake


def test_a_weight_that_is_wrong_is_told_with_its_term() -> None:
    distiller = Distiller({"it": Term(nn.MSELoss())}, Net(4))
    distiller.terms["it"].weight = -1.0
    with pytest.raises(ValueError, match="Term 'it': weight is a finite number"):
        distiller.weights()


def test_an_error_in_the_teacher_is_the_users_to_see() -> None:
    distiller = Distiller({"it": Term(nn.MSELoss())}, nn.Linear(7, 4))
    student = Net(4)
    distiller.attach(student)
    with pytest.raises(RuntimeError, match="shapes"), distiller.watch():
        student(torch.randn(5, 6))
    distiller.detach()
    student(torch.randn(5, 6))


# Losses, weights and parameters


def test_every_term_gets_its_labels() -> None:
    class Labelled(nn.Module):
        def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
            return (student.logsumexp(1) * target).mean()

    distiller = Distiller({"a": Term(Labelled()), "b": Term(losses.KD())}, Net(4))
    student, x = Net(4), torch.randn(5, 6)
    calls = watched(distiller, student, x)
    target = torch.arange(5.0)
    torch.testing.assert_close(distiller(calls, target=target)["a"], (student(x).logsumexp(1) * target).mean())
    with pytest.raises(ValueError, match="Term 'a': Labelled needs 'target'"):
        distiller(calls)
    with pytest.raises(TypeError, match=r"no loss of these terms asks for targets\. Did you mean target=\.\.\.\?"):
        distiller(calls, targets=target)
    assert distiller(calls, target=target, boxes=None, points=None, target_weight=0.3).keys() == {
        "a",
        "b",
    }  # of other terms, of views


def test_weights_follow_their_schedules() -> None:
    terms = {"a": Term(nn.MSELoss(), weight=2.0), "b": Term(nn.MSELoss(), weight=schedules.Linear(4.0, 0.0))}
    distiller = Distiller(terms, Net(4))
    assert distiller.weights() == {"a": 2.0, "b": 4.0}
    values = {"a": torch.tensor(10.0), "b": torch.tensor(1.0)}
    for progress, total in ((0.0, 24.0), (0.75, 21.0), (1.0, 20.0)):
        distiller.at(schedules.Moment(progress))
        assert float(distiller.total(values)) == total
    terms["a"].weight = 3.0
    assert distiller.weights() == {"a": 3.0, "b": 0.0}


def test_build_makes_what_is_missing_once() -> None:
    terms = {"kd": Term(losses.KD()), "hint": hint(), "own": hint(nn.MSELoss(), projector=nn.Linear(4, 8))}
    distiller = Distiller(terms, Net(8))
    assert distiller.needs_sample
    student = Net(4)
    distiller.attach(student)
    before = [p.clone() for p in student.parameters()]
    with distiller.watch() as calls:
        student(torch.randn(2, 6))
    distiller.build(calls[0])
    assert not distiller.needs_sample
    made = dict(distiller.named_parameters())
    assert set(made) == {f"terms.{name}.projector.{p}" for name in ("hint", "own") for p in ("weight", "bias")}
    distiller.build(calls[0])
    assert all(dict(distiller.named_parameters())[name] is p for name, p in made.items())
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert set(distiller(calls)) == {"kd", "hint", "own"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_projector_is_of_the_students_precision(dtype: torch.dtype) -> None:
    distiller = Distiller({"hint": hint()}, Net(8))
    student = Net(4).to(dtype)
    distiller.attach(student)
    with distiller.watch() as calls:
        student(torch.randn(2, 6, dtype=dtype))
    distiller.build(calls[0])
    assert {p.dtype for p in distiller.parameters()} == {dtype}
    assert distiller(calls)["hint"] > 0


@pytest.mark.parametrize("autocast", [False, True])
def test_a_projector_is_of_its_layers_precision(autocast: bool) -> None:
    class Mixed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x.bfloat16()).float())

    student = Mixed(nn.Linear(6, 5).bfloat16(), nn.Linear(5, 4))
    distiller = Distiller({"hint": hint(student="1")}, Net(8))
    distiller.attach(student)
    with distiller.watch() as calls, torch.autocast("cpu", torch.float16, enabled=autocast):
        student(torch.randn(2, 6))
    distiller.build(calls[0])
    assert {p.dtype for p in distiller.parameters()} == {torch.float32}


def test_what_stands_still_in_half_the_memory_does_not_decide_a_projectors_precision_under_autocast() -> None:
    distiller = Distiller({"hint": hint()}, Net(8))
    student = Net(4)
    student.standing = nn.Linear(1, 1).bfloat16().requires_grad_(False)
    distiller.attach(student)
    with torch.autocast("cpu", torch.bfloat16):
        with distiller.watch() as calls:
            student(torch.randn(2, 6))
        distiller.build(calls[0])
    assert {p.dtype for p in distiller.parameters()} == {torch.float32}


@pytest.mark.parametrize("loss", [losses.FitNet(), losses.VID(), losses.MGD()], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("given", [None, nn.Conv2d(4, 8, 1)], ids=["built", "given"])
def test_an_autocast_may_be_over(where: str, loss: nn.Module, given: nn.Module | None) -> None:
    of_image, of_teacher = (nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU()) for width in (4, 8))
    autocast = torch.autocast("cpu", torch.bfloat16)
    if where == "inside":
        of_image.forward = autocast(of_image.forward)
    term = Term(copy.deepcopy(loss), student="0", teacher="0", projector=copy.deepcopy(given))
    distiller = Distiller({"it": term}, of_teacher)
    distiller.attach(of_image)
    with distiller.watch() as calls, autocast if where == "around" else nullcontext():
        of_image(torch.randn(2, 3, 4, 4))
    distiller.build(calls[0])
    assert calls[0].student["0"][0].dtype == torch.bfloat16
    torch.manual_seed(0)
    found = distiller(calls)["it"]
    torch.manual_seed(0)
    calls[0].student["0"][0] = calls[0].student["0"][0].float()
    assert found == distiller(calls)["it"]  # in float32, from there on
    found.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in of_image.parameters())


def test_a_projector_made_after_the_optimizer_is_an_error() -> None:
    distiller = Distiller({"hint": hint()}, Net(8))
    calls = watched(distiller, Net(4), torch.randn(5, 6))
    with pytest.raises(RuntimeError, match="made only now") as caught:
        distiller(calls)
    assert "'hint'" in caught.value.__notes__[0]


def test_ranges() -> None:
    student, teacher = nn.Identity(), nn.Identity()
    distiller = Distiller({"it": Term(nn.MSELoss())}, teacher, teacher_input=lambda x: x * 10)
    distiller.attach(student)
    with distiller.watch() as calls:
        for low, high in [(-1.0, 2.0), (-3.0, 0.0)]:
            student(torch.tensor([[low, high]], requires_grad=True))
    assert distiller.ranges(calls, "it").tolist() == [-3.0, 2.0, -30.0, 20.0]


def test_a_plain_loop_learns() -> None:
    teacher = Net(16)
    student = Net(4)
    terms = {"kd": Term(losses.KD(temperature=2.0)), "hint": hint(weight=schedules.Linear(1.0, 0.5))}
    distiller = Distiller(terms, teacher)
    distiller.attach(student)
    x, labels = torch.randn(64, 6), torch.randint(0, 4, (64,))
    with distiller.watch() as calls:
        student(x[:2])
    distiller.build(calls[0])
    optimizer = torch.optim.Adam([*student.parameters(), *distiller.parameters()], lr=0.02)
    history = []
    for step in range(60):
        with distiller.watch() as calls:
            logits = student(x)
        distiller.at(schedules.Moment(progress=step / 60))
        values = distiller(calls, target=labels)
        loss = 0.01 * nn.functional.cross_entropy(logits, labels) + distiller.total(values)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({name: float(value.detach()) for name, value in values.items()})
    distiller.detach()
    assert history[-1]["kd"] < 0.5 * history[0]["kd"]
    assert history[-1]["hint"] < 0.8 * history[0]["hint"]


def test_a_teacher_that_is_no_network_answers_paths_of_its_own() -> None:
    class Cache(Teacher):
        def bind(self, student: nn.Module, paths: Collection[str]) -> None:
            self.paths = list(paths)

        def unbind(self) -> None: ...

        def forward(self, x: Tensor) -> Record:
            return {path: [torch.ones(len(x), 3)] for path in self.paths}

    student = nn.Linear(4, 3)
    distiller = Distiller({"kd": Term(losses.KD(), teacher="layer3")}, Cache())
    distiller.attach(student)
    with distiller.watch() as calls:
        student(torch.randn(2, 4))
    assert distiller(calls)["kd"] > 0


def test_a_teacher_that_remembers_takes_it_back() -> None:
    with pytest.raises(TypeError, match=r"Forgetful says in memory .* has no recall\(memory\)"):

        class Forgetful(Teacher):
            def memory(self) -> dict[str, Any]:
                return {"steps": 3}


def test_an_attribute_that_hides_a_method_of_a_teacher_is_told() -> None:
    class Ramp(Itself):
        def __init__(self) -> None:
            super().__init__()
            self.end = 3  # type: ignore[assignment,method-assign]

    with pytest.raises(TypeError, match=r"Ramp\.end is a int, and hides the method"):
        Distiller({"hint": hint()}, Ramp())


def test_a_class_is_not_a_teacher() -> None:
    with pytest.raises(TypeError, match=r"Did you mean Linear\(\.\.\.\)\?"):
        Distiller({"kd": Term(losses.KD())}, nn.Linear)


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


def test_a_projector_that_would_train_the_teacher_is_refused() -> None:
    teacher = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    paths = {"student": "stem", "teacher": "output"}
    shared = Distiller(
        {"it": Term(losses.KD(), **paths, projector=nn.Sequential(nn.Linear(4, 8), teacher[2]))}, teacher
    )
    with pytest.raises(
        ValueError, match=r"Term 'it': it has weights of the teacher .* student: 2\.weight, 2\.bias\. .*"
    ):
        shared.attach(Net(4))
    ensemble = Ensemble([nn.Linear(6, 4), teacher])
    in_the_loss = Distiller({"it": Term(Through(teacher[2]), **paths)}, ensemble)
    with pytest.raises(ValueError, match="Term 'it': it has weights of the teacher"):
        in_the_loss.attach(Net(8))
    teacher[2].requires_grad_(False)
    shared.attach(Net(4))


def test_projectors_that_leave_the_teacher_alone_are_not_refused() -> None:
    student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    own = {"student": "0", "teacher": "output", "projector": nn.Sequential(student[1], student[2])}
    for teacher in (Itself(), EMA(), copy.deepcopy(student)):
        distiller = Distiller({"it": Term(losses.KD(), **own)}, teacher)
        distiller.attach(student)
        distiller.detach()
    layers = TeacherLayers(["2"], before=nn.Linear(4, 8))
    teacher = copy.deepcopy(student)
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller({"it": Term(losses.KD(), student="stem", projector=layers)}, teacher)
    distiller(watched(distiller, Net(4), torch.randn(5, 6)))["it"].backward()
    torch.optim.SGD(distiller.parameters(), lr=1.0).step()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


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


def test_terms_on_one_layer_share_its_output_and_a_projector_if_it_is_one_object() -> None:
    student, projector = Net(4), nn.Linear(4, 6)
    terms = {"hint": hint(projector=projector), "relation": hint(losses.RKD(), projector=projector), "own": hint()}
    distiller = Distiller(terms, Frozen(Net(6)))
    calls = watched(distiller, student, torch.randn(8, 6))
    distiller.build(calls[0])
    for record in (calls[0].student, calls[0].teacher):
        assert {path: len(values) for path, values in record.items()} == {"stem": 1}
    assert len([*distiller.parameters()]) == 4  # of the shared one, and of the other's own
    found = distiller(calls)
    gradients = {}
    for name in ("hint", "relation"):
        (gradients[name],) = torch.autograd.grad(found[name], projector.weight, retain_graph=True)
        assert gradients[name].abs().sum() > 0
    torch.stack([*found.values()]).sum().backward()
    torch.testing.assert_close(projector.weight.grad, gradients["hint"] + gradients["relation"])
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
