"""The student's feature through the teacher's head: what is compared, and what is left alone."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_kd import Distiller, Term, losses, teachers
from lightning_kd.models import detectors
from lightning_kd.projectors import TeacherLayers

# Where a student's feature is taken, and the teacher's layers behind it, of torchvision's heads.
HEADS: dict[str, tuple[str, list[str]]] = {
    "RetinaNet cls": (
        "head.classification_head.conv.2",
        ["head.classification_head.conv[3:]", "head.classification_head.cls_logits"],
    ),
    "RetinaNet reg": ("head.regression_head.conv.3", ["head.regression_head.bbox_reg"]),
    "FCOS cls": (
        "head.classification_head.conv.2",
        [*(f"head.classification_head.conv.{i}" for i in (3, 4, 5)), "head.classification_head.cls_logits"],
    ),
}
IMAGES = [torch.rand(3, 64, 64), torch.rand(3, 56, 60)]
TARGETS = [{"boxes": torch.tensor([[5.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1])}] * 2


def detector(kind: str, channels: int = 32) -> nn.Module:
    convs = {"convs": 2} if kind == "FCOS" else {}
    sizes: dict[str, Any] = {"backbone": "mobilenet_v3_small", "min_size": 64, "max_size": 64}
    model: nn.Module = getattr(detectors, kind)(num_classes=3, channels=channels, **sizes, **convs)
    for parameter in model.parameters():  # as they are made, heads are next to constant
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def crossed(
    head: str, student: nn.Module, teacher: nn.Module, loss: nn.Module, before: nn.Module | None = None
) -> tuple[Distiller, Tensor]:
    """Returns a distiller of one term that has watched a call, and the term's loss."""
    path, layers = HEADS[head]
    term = Term(loss, student=path, teacher=layers[-1], projector=TeacherLayers(layers, before))
    distiller = Distiller({"cross": term}, teacher, teacher_input=lambda images, targets: (images,))
    distiller.attach(student)
    with distiller.watch() as calls:
        student(IMAGES, TARGETS)
    return distiller, distiller(calls)["cross"]


@pytest.mark.parametrize("head", HEADS)
def test_who_has_the_teachers_features_says_what_it_says(head: str) -> None:
    torch.manual_seed(0)
    teacher = detector(head.partition(" ")[0]).eval()
    student = copy.deepcopy(teacher)
    student.train()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    distiller, value = crossed(head, student, teacher, losses.QFL())
    assert value == 0
    distiller.detach()
    last = student.get_submodule(HEADS[head][1][-1])
    last.weight.data += 1.0  # its own answer is another one: that is not what is compared
    distiller, value = crossed(head, student, teacher, losses.QFL())
    assert value == 0


@pytest.mark.parametrize("head", HEADS)
def test_the_gradient_reaches_the_student_as_far_as_its_tap_and_nothing_of_the_teacher(head: str) -> None:
    torch.manual_seed(0)
    student, teacher = (detector(head.partition(" ")[0]) for _ in range(2))
    before = copy.deepcopy(teacher.state_dict())
    distiller, value = crossed(head, student, teacher, losses.QFL())
    value.backward()
    path, layers = HEADS[head]
    tapped = next(student.get_submodule(path.rpartition(".")[0])[0].parameters())
    assert tapped.grad is not None
    assert tapped.grad.abs().sum() > 0
    assert student.get_submodule(layers[-1]).weight.grad is None
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not list(distiller.parameters())


def test_other_channels_are_refused_or_bridged() -> None:
    student, teacher = detector("FCOS"), detector("FCOS", channels=64)
    said = (
        r"Term 'cross': the student's feature \(2, 32, 16, 16\) does not fit the teacher's layer "
        r"'head.classification_head.conv.3', which takes 64 channels: .* before=nn.Conv2d\(32, 64, 1\)"
    )
    with pytest.raises(ValueError, match=said):
        crossed("FCOS cls", student, teacher, losses.QFL())
    distiller, value = crossed("FCOS cls", student, teacher, losses.QFL(), before=nn.Conv2d(32, 64, 1))
    value.backward()
    assert {name: p.grad.abs().sum() > 0 for name, p in distiller.named_parameters()} == {
        "terms.cross.projector.before.weight": True,
        "terms.cross.projector.before.bias": True,
    }


class Norm(nn.Module):
    """A teacher with statistics, and a layer that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.rest = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rest(self.stem(x).clone())
        return out


def test_a_pool_may_come_before_the_classifier() -> None:
    teacher = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(8, 4))
    reused = TeacherLayers(["1", "2"])
    reused.meet(teacher.eval())
    feature = torch.randn(2, 8, 3, 3)
    assert torch.equal(reused(feature), teacher[2](teacher[1](feature)))


class Head(nn.Module):
    """A classifier that pools by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(9 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.flatten(1))
        return out


def test_what_a_layer_does_before_its_own_layers_it_alone_knows() -> None:
    teacher = nn.Sequential(nn.Conv2d(3, 8, 1), Head())
    reused = TeacherLayers(["1"])
    reused.meet(teacher.eval())
    feature = torch.randn(2, 8, 3, 3)
    assert torch.equal(reused(feature), teacher[1](feature))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        reused(torch.randn(2, 5, 3, 3))
    assert r"The student's feature (2, 5, 3, 3) went through the teacher's layers ['1']" in caught.value.__notes__[0]


def test_the_layers_are_in_evaluation_mode_and_overwrite_nothing() -> None:
    teacher, feature = Norm(), torch.randn(2, 4, 5, 5)
    projector = TeacherLayers(["rest[:]"])
    projector.meet(teacher)
    kept, before = feature.clone(), copy.deepcopy(teacher.state_dict())
    teacher.train()
    value = projector(feature)
    assert torch.equal(feature, kept)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    torch.testing.assert_close(value, teacher.eval().rest(kept))


class Doubling(nn.Module):
    """Works in place, and does not say so."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 4)),
        nn.Sequential(nn.Dropout(), nn.Sequential(nn.Hardswish(inplace=True)), nn.Linear(8, 4)),
        nn.Sequential(Doubling(), nn.Linear(8, 4)),
    ],
    ids=["first", "behind what passes on", "unsaid"],
)
def test_a_block_that_works_in_place_leaves_the_students_feature_as_it_is(head: nn.Module) -> None:
    projector, feature = TeacherLayers(["1"]), torch.randn(3, 8)
    projector.meet(nn.Sequential(nn.Linear(6, 8), head).eval())
    kept = feature.clone()
    value = projector(feature)
    assert torch.equal(feature, kept)
    assert torch.equal(value, head(kept))


def test_layers_that_the_student_has_too_stay_in_its_mode() -> None:
    head = nn.Sequential(nn.Dropout(), nn.Linear(8, 4)).requires_grad_(requires_grad=False)
    teacher, student = (nn.Sequential(nn.Linear(6, 8), head) for _ in range(2))
    term = Term(losses.KD(), student="0", teacher="output", projector=TeacherLayers(["1"]))
    distiller, x = Distiller({"cross": term}, teacher), torch.randn(16, 6)
    distiller.attach(student)
    head[1].eval()  # part of it stands still there
    for _ in range(2):
        with distiller.watch() as calls:
            student(x)
        value = distiller(calls)["cross"]
        torch.testing.assert_close(value, losses.KD()(head[1](student[0](x)), head[1](teacher[0](x))))
        assert [part.training for part in head.modules()] == [True, True, False]


def test_a_teacher_of_another_type_is_asked_in_its_own() -> None:
    teacher = Norm().double()
    projector = TeacherLayers(["rest"])
    projector.meet(teacher)
    assert projector(torch.randn(2, 4, 5, 5)).dtype == torch.float64


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_takes_no_teacher_along(clone: Any) -> None:
    projector = TeacherLayers(["rest"], before=nn.Conv2d(4, 4, 1))
    projector.meet(Norm())
    other = clone(projector)
    with pytest.raises(RuntimeError, match="has met no teacher"):
        other(torch.randn(2, 4, 5, 5))
    assert set(other.state_dict()) == {"before.weight", "before.bias"}


def test_what_cannot_be_found_is_refused() -> None:
    with pytest.raises(ValueError, match="layers are a list of paths in the teacher"):
        TeacherLayers("rest")
    with pytest.raises(ValueError, match=r"the teacher \(Norm\) has no module 'rests'. Closest: 'rest'"):
        TeacherLayers(["rests"]).meet(Norm())
    for path in ("stem[0:]", "rest[0]"):
        with pytest.raises(ValueError, match=rf"'{path[:4]}.*' names no layers: a slice takes some of a Sequential"):
            TeacherLayers([path]).meet(Norm())


def test_the_teacher_is_one_that_stands_still() -> None:
    term = Term(nn.MSELoss(), student="stem", teacher="rest", projector=TeacherLayers(["rest"]))
    distiller = Distiller({"cross": term}, teachers.EMA())
    with pytest.raises(ValueError, match=r"Term 'cross': TeacherLayers calls layers .* the teacher is no frozen model"):
        distiller.attach(Norm())
