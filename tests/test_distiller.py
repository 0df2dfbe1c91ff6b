import copy
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from engine import Net, hint, watched
from torch import Tensor, nn

from lightning_kd import Distiller, Term, losses, schedules
from lightning_kd.taps import Record
from lightning_kd.teacher_layers import TeacherLayers
from lightning_kd.teachers import EMA, Ensemble, Frozen, Itself, Teacher


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


class Own(Teacher):
    """A teacher whose answer is made by a function of its logits."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def bind(self, student: nn.Module, paths: Collection[str]) -> None: ...

    def unbind(self) -> None: ...

    def forward(self, x: Tensor) -> Any:
        return self.answer(torch.ones(len(x), 3))


@pytest.mark.parametrize("student_input", [None, lambda x, *, teacher: x])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda z: z, TypeError, r"forward of Own returned a tensor of shape \(., 3\). A teacher returns by path"),
        (lambda z: {"output": z}, TypeError, r"forward of Own returned a tensor .* at 'output'. A teacher returns by"),
        (lambda z: {"output": (z, z)}, TypeError, "returned a tuple of 2 items at 'output'"),
        (lambda z: {"output": {"logits": z}}, TypeError, "returned a dict with the keys 'logits' at 'output'"),
        (lambda z: {"output.logits": [z]}, ValueError, "Own was asked for 'output' and answered 'output.logits'. A te"),
        (lambda z: {}, ValueError, "Own was asked for 'output' and answered nothing"),
    ],
)
def test_an_answer_of_another_form_is_told(
    answer: Callable[[Tensor], Any], error: type[Exception], message: str, samples: int, student_input: Any
) -> None:
    student = nn.Linear(4, 3)
    distiller = Distiller({"kd": Term(losses.KD())}, Own(answer), student_input=student_input)
    with pytest.raises(error, match=message):
        distiller(watched(distiller, student, torch.randn(samples, 4)))


@pytest.mark.parametrize("labels", [("target",), {"target"}, ["target"], {"target": "yes"}, {1: True}])
@pytest.mark.parametrize("of_class", [True, False])
def test_labels_of_a_teacher_say_whether_they_are_needed(labels: Any, of_class: bool) -> None:
    teacher = (type("Own", (Own,), {"labels": labels}) if of_class else Own)(lambda z: {"output": [z]})
    if not of_class:
        teacher.labels = labels
    with pytest.raises(TypeError, match=r"labels of Own say what .*\{'target': True\}; got [\[({]'?[t1]"):
        Distiller({"kd": Term(losses.KD())}, teacher)


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
