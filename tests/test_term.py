import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_kd import Distiller, Term, losses, schedules
from lightning_kd.wiring import Levels


class NeedsTarget(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return (student - teacher).square().mean() + target.sum()


class MayHaveTarget(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        return (student - teacher).square().mean() + (0.0 if target is None else target.sum())


class Keywords(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor, *rest: Any, target: Tensor, **options: Any) -> Tensor:
        assert not rest
        assert not options
        return (student - teacher).square().mean() + target.sum()


class Learned(nn.Module):
    """With parameters from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (self.scale * student - teacher).square().mean()


class Aligned(Learned):
    align = "shape"


class Subtracted(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).abs().mean()


class Broken(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher[:, :2]).mean()


def pair(*shape: int) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.randn(shape, requires_grad=True)], [torch.randn(shape)]


@pytest.mark.parametrize("weight", [-1.0, -1e-9, math.inf, math.nan, "1", None, True, [1.0], torch.tensor(1.0)])
def test_a_weight_is_a_finite_number_that_is_not_negative(weight: Any) -> None:
    with pytest.raises(ValueError, match="weight is a finite number"):
        Term(losses.KD(), weight=weight)


@pytest.mark.parametrize("weight", [-1.0, math.nan])
def test_a_weight_that_is_assigned_later_is_held_to_the_same(weight: float) -> None:
    term = Term(losses.KD())
    term.weight = weight
    with pytest.raises(ValueError, match=f"weight is a finite number.*got {weight}"):
        _ = term.current_weight


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (schedules.Linear(1.0, -1.0), r"got Linear\(.*\), which goes from 1.0 to -1.0"),
        (schedules.Cosine(-0.5, 1.0), r"got Cosine\(.*\), which goes from -0.5 to 1.0"),
        (lambda progress: 1 - 2 * progress, r"got Custom\(<lambda>\), which goes from 1.0 to -1.0"),
    ],
)
def test_a_schedule_of_weights_is_held_to_the_same(weight: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"weight is a finite number.*{said}"):
        Term(losses.KD(), weight=weight)


def weights_at(term: Term, *progress: float) -> list[float]:
    found = []
    for x in progress:
        term.at(schedules.Moment(x))
        found.append(term.current_weight)
    return found


@pytest.mark.parametrize("weight", [0, 0.0, 3, 2.5])
def test_a_weight_is_the_same_all_along(weight: float) -> None:
    term = Term(losses.KD(), weight=weight)
    assert weights_at(term, 0.0, 0.5, 1.0) == [weight] * 3


def test_a_scheduled_weight() -> None:
    term = Term(losses.KD(), weight=schedules.Linear(4.0, 0.0))
    assert weights_at(term, 0.0, 0.5, 1.0, 2.0) == [4.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize("loss", [losses.KD, "KD", nn.functional.mse_loss, None])
def test_a_loss_is_a_module(loss: Any) -> None:
    with pytest.raises(TypeError, match=r"Did you mean KD\(\)" if loss is losses.KD else "loss is a module"):
        Term(loss)


@pytest.mark.parametrize("align", [None, "Size", "shapes"])
def test_an_unknown_alignment_is_refused(align: Any) -> None:
    class Own(nn.Module):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return (student - teacher).square().mean()

    loss = Own()
    loss.align = align
    with pytest.raises(ValueError, match=f"align of Own says .*'none', 'map', 'size', 'shape'; got {align!r}"):
        Term(loss)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_paths_are_read_at_once(side: str) -> None:
    with pytest.raises(ValueError, match=r"'layer\[' is not a path"):
        Term(losses.KD(), **{side: "layer["})


# What a loss takes of the batch


def test_a_required_label() -> None:
    term = Term(NeedsTarget())
    assert term.labels == {"target": True}
    student, teacher = pair(4, 3)
    with pytest.raises(ValueError, match=r"NeedsTarget needs 'target'.*Pass target="):
        term(student, teacher, {})
    with pytest.raises(ValueError, match="needs 'target'"):
        term(student, teacher, {"target": None})
    plain = term(student, teacher, {"target": torch.zeros(4)})
    assert float((term(student, teacher, {"target": torch.ones(4)}) - plain).detach()) == pytest.approx(4.0)


def test_an_optional_label() -> None:
    term = Term(MayHaveTarget())
    assert term.labels == {"target": False}
    student, teacher = pair(4, 3)
    without = term(student, teacher, {})
    assert float((term(student, teacher, {"target": torch.ones(4)}) - without).detach()) == pytest.approx(4.0)


def test_labels_that_a_loss_does_not_take_are_not_given() -> None:
    term = Term(nn.MSELoss())
    assert term.labels == {}
    term(*pair(4, 3), {"target": torch.ones(4), "index": torch.ones(4)})


def test_variadic_arguments_ask_for_nothing() -> None:
    term = Term(Keywords())
    assert term.labels == {"target": True}
    term(*pair(4, 3), {"target": torch.ones(4)})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_loss_gets_what_it_takes() -> None:
    student, teacher = pair(4, 3)
    labels = {"target": torch.ones(4)}
    compiled = torch.compile(MayHaveTarget(), backend="eager")
    term = Term(compiled)
    assert term.labels == {"target": False}
    assert torch.equal(term(student, teacher, labels), Term(MayHaveTarget())(student, teacher, labels))
    assert Term(torch.compile(losses.FitNet(), backend="eager")).needs_sample
    torch._dynamo.reset()


# Projectors, and parameters that need a sample


def test_who_needs_a_sample() -> None:
    assert not Term(losses.KD()).needs_sample
    assert not Term(nn.MSELoss()).needs_sample
    assert not Term(Learned()).needs_sample
    assert Term(losses.FitNet()).needs_sample
    assert Term(losses.AT()).needs_sample
    assert Term(losses.VID()).needs_sample
    assert not Term(losses.FitNet(), projector=nn.Identity()).needs_sample
    assert Term(losses.VID(), projector=nn.Identity()).needs_sample
    built = Term(losses.VID())
    built.build(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))
    assert not built.needs_sample


def test_build_makes_a_projector_for_the_shapes() -> None:
    term = Term(losses.FitNet())
    assert not list(term.parameters())
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 8, 8)
    term.build(student, teacher)
    assert sum(p.numel() for p in term.parameters()) == 3 * 5 + 5
    term([student], [teacher], {}).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())
    assert student.grad is not None


def test_a_projector_of_your_own_is_used_as_it_is() -> None:
    projector = nn.Linear(3, 5)
    term = Term(nn.MSELoss(), projector=projector)
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 5)
    expected = (projector(student) - teacher).square().mean()
    assert torch.equal(term([student], [teacher], {}), expected)
    assert term.projector is projector
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 5\)"):
        Term(losses.FitNet(), projector=nn.Identity())([student], [teacher], {})


def test_a_loss_with_build_sees_the_projected_student() -> None:
    seen: list[tuple[Any, ...]] = []

    class Builds(nn.Module):
        align = "shape"

        def build(self, student: Tensor, teacher: Tensor) -> None:
            seen.append((student.shape, teacher.shape, student.requires_grad))
            self.scale = nn.Parameter(torch.ones(student.shape[1]))

        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return (self.scale * (student - teacher).mean((2, 3))).square().mean()

    term = Term(Builds())
    term.build(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 2, 2))
    assert seen == [((2, 5, 2, 2), (2, 5, 2, 2), False)]
    assert {name for name, _ in term.named_parameters()} == {
        "loss.scale",
        "projector.project.weight",
        "projector.project.bias",
    }


@pytest.mark.parametrize("loss", [losses.FitNet, Aligned, losses.VID])
def test_parameters_made_too_late_are_an_error(loss: type[nn.Module]) -> None:
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4)
    term = Term(loss())
    for _ in range(2):  # who goes on is told again
        with pytest.raises(RuntimeError, match=r"made only now.*build\(\.\.\.\)"):
            term([student], [teacher], {})


@pytest.mark.parametrize(
    ("term", "sides", "note"),
    [
        (Term(Subtracted()), (3, 5), "Subtracted gets no projector where these differ. Take a loss that does, FitNet"),
        (Term(Subtracted(), projector=nn.Linear(3, 4)), (3, 5), "The projector that was given, Linear, gets the"),
        (Term(losses.FitNet(), projector=nn.Linear(4, 5)), (3, 5), "The projector that was given, Linear, gets the"),
        (Term(Broken()), (3, 3), None),
    ],
)
def test_what_a_loss_stumbles_over_is_told_with_the_shapes_and_what_helps(
    term: Term, sides: tuple[int, int], note: str | None
) -> None:
    student, teacher = torch.randn(2, sides[0], requires_grad=True), torch.randn(2, sides[1])
    with pytest.raises(RuntimeError) as raised:
        term([student], [teacher], {})
    shapes, *notes = raised.value.__notes__
    assert shapes == f"The student's 'output' is (2, {sides[0]}), the teacher's 'output' (2, {sides[1]})."
    assert [each.startswith(note) for each in notes] == [True] if note else not notes


def test_what_returns_nothing_is_told_so() -> None:
    with pytest.raises(ValueError, match="the student's 'output' is None, of which nothing can be selected"):
        Term(nn.MSELoss())([None], [torch.zeros(2, 3)], {})


@pytest.mark.parametrize("loss", [Learned, Aligned, losses.FitNet, nn.MSELoss])
def test_what_needs_no_new_parameters_need_not_be_built(loss: type[nn.Module]) -> None:
    term = Term(loss())
    value = term(*pair(2, 3), {})
    value.backward()
    assert all(p.grad is not None for p in term.parameters())


def test_a_term_is_saved_and_copied() -> None:
    term = Term(losses.VID(), weight=schedules.Cosine(1.0, 0.0))
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4)
    term.build(student, teacher)
    twin, other = copy.deepcopy(term), Term(losses.VID())
    other.build(student, teacher)
    other.load_state_dict(term.state_dict())
    expected = term([student], [teacher], {})
    assert torch.equal(twin([student], [teacher], {}), expected)
    assert torch.equal(other([student], [teacher], {}), expected)


# What is compared


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    Term(nn.MSELoss())([student], [teacher], {}).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_a_student_without_gradient_teaches_nothing() -> None:
    term, student, teacher = Term(nn.MSELoss()), torch.randn(2, 3), torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"'output' carries no gradient.*frozen layers.*use_reentrant=True"):
        term([student], [teacher], {})
    with torch.no_grad():  # to measure, not to learn
        assert term([student], [teacher], {}) > 0


def test_a_student_without_gradient_may_wait_while_the_weight_is_zero() -> None:
    later = schedules.Piecewise([(0.0, 0.0), (0.5, 1.0)], interpolate=False)
    term, student, teacher = Term(nn.MSELoss(), weight=later), torch.randn(2, 3), torch.randn(2, 3)
    assert term([student], [teacher], {}) > 0
    term.at(schedules.Moment(progress=0.5))
    with pytest.raises(ValueError, match=r"carries no gradient.*a weight that is 0 until then"):
        term([student], [teacher], {})


def test_of_several_calls_the_mean() -> None:
    students, teachers = zip(*((s[0], t[0]) for s, t in (pair(2, 3), pair(5, 3))), strict=True)
    value = Term(nn.MSELoss())(students, teachers, {})
    by_hand = [nn.functional.mse_loss(s, t) for s, t in zip(students, teachers, strict=True)]
    torch.testing.assert_close(value, (by_hand[0] + by_hand[1]) / 2)


@pytest.mark.parametrize(("students", "teachers"), [(0, 0), (1, 2), (2, 1), (0, 1)])
def test_calls_that_cannot_be_paired(students: int, teachers: int) -> None:
    with pytest.raises(ValueError, match=f"called {students} times and the teacher's 'output' {teachers} times"):
        Term(nn.MSELoss()).pairs([torch.zeros(2)] * students, [torch.zeros(2)] * teachers)


def test_a_path_has_to_select_a_tensor() -> None:
    with pytest.raises(ValueError, match=r"the teacher's 'output' is a tuple of 2 items.*'output\[0\]'"):
        Term(nn.MSELoss()).pairs([torch.zeros(2)], [(torch.zeros(2), torch.zeros(2))])
    with pytest.raises(ValueError, match=r"the student's 'output\.x' is None"):
        Term(nn.MSELoss(), student="output.x").pairs([{"x": None}], [torch.zeros(2)])


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_loss_returns_a_scalar(reduction: str) -> None:
    term = Term(nn.MSELoss(reduction=reduction))
    if reduction == "sum":
        assert term(*pair(2, 3), {}).ndim == 0
        return
    with pytest.raises(ValueError, match=r"MSELoss returned a tensor of shape \(2, 3\) and not a scalar"):
        term(*pair(2, 3), {})


def test_the_wiring_is_printed() -> None:
    assert "student='a', teacher='b', weight=2.0" in repr(Term(nn.MSELoss(), 2.0, "a", "b"))


def test_a_schedule_that_leaves_its_range_midway_is_refused() -> None:
    class Dips(schedules.Schedule):
        def __call__(self, progress: float) -> float:
            return 1.0 - 8.0 * progress * (1.0 - progress)

    term = Term(losses.KD(), weight=Dips())
    assert weights_at(term, 1.0) == [1.0]
    with pytest.raises(ValueError, match=r"gave -1.0 at 50.0% of the run"):
        weights_at(term, 0.5)


def test_a_projector_is_a_module() -> None:
    with pytest.raises(TypeError, match="projector is a module"):
        Term(losses.FitNet(), projector=nn.Linear)  # type: ignore[arg-type]  # the mistake


def pyramid(channels: int, *sides: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, channels, side, side, requires_grad=True) for side in sides)


def test_levels_are_compared_one_by_one_and_summed() -> None:
    students, teachers = pyramid(3, 8, 4), pyramid(3, 8, 4)
    term = Term(losses.FitNet(), student="neck[:]", teacher="neck[:]")
    expected = sum(nn.functional.mse_loss(s, t) for s, t in zip(students, teachers, strict=True))
    torch.testing.assert_close(term([students], [dict(enumerate(teachers))], {}), expected)
    some = Term(losses.FitNet(), student="neck[:1]", teacher="neck[-2:-1]")
    torch.testing.assert_close(some([students], [teachers], {}), nn.functional.mse_loss(students[0], teachers[0]))


def test_every_level_has_its_projector_and_its_copy_of_a_loss_that_learns() -> None:
    students, teachers = pyramid(3, 8, 4), pyramid(5, 4, 4)
    hint = Term(losses.FitNet(), student="neck[:]", teacher="neck[:]")
    select = [Levels(students)], [Levels(teachers)]
    hint.build(*hint.pairs(*select)[0])
    shapes = {name: tuple(p.shape) for name, p in hint.named_parameters() if name.endswith("weight")}
    assert shapes == {f"projector.levels.{i}.project.weight": (5, 3, 1, 1) for i in (0, 1)}
    vid = Term(losses.VID(), student="neck[:]", teacher="neck[:]")
    vid.build(*vid.pairs(*select)[0])
    learned = list(vid.parameters())
    vid(*select, {}).backward()
    assert len(learned) == 2 * len(list(vid.loss.parameters())) > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)


def test_what_is_scheduled_is_so_at_every_level() -> None:
    class Scaled(Learned):
        temperature = 1.0

        def build(self, student: Tensor, teacher: Tensor) -> None:
            self.channels = student.shape[1]

    term = Term(Scaled(), student="neck[:]", teacher="neck[:]")
    term.build(Levels(pyramid(3, 8)), Levels(pyramid(3, 8)))
    assert not term.deeper
    term = Term(Scaled(), student="neck[:]", teacher="neck[:]")
    term.schedules["temperature"] = schedules.Linear(8.0, 1.0)
    term.build(Levels(pyramid(3, 8, 4)), Levels(pyramid(3, 8, 4)))
    term.at(schedules.Moment(0.5))
    assert [loss.temperature for loss in (term.loss, *term.deeper)] == [4.5, 4.5]


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        (pyramid(3, 8, 4), pyramid(3, 8), r"2 levels, \(2, 3, 8, 8\), \(2, 3, 4, 4\) and .* 1 levels"),
        (pyramid(3, 8), torch.zeros(2, 3, 8, 8), r"1 levels, .* and the teacher's 'neck' \(2, 3, 8, 8\): levels"),
        ((torch.zeros(1), 3), pyramid(3, 8, 4), r"'neck\[:\]' is a Levels of 2 items, and a loss compares tensors"),
    ],
)
def test_levels_that_do_not_belong_together(student: Any, teacher: Any, said: str) -> None:
    path = "neck" if isinstance(teacher, Tensor) else "neck[:]"
    with pytest.raises(ValueError, match=said):
        Term(losses.FitNet(), student="neck[:]", teacher=path)([student], [teacher], {})


def test_a_tuple_is_not_taken_for_levels_unasked() -> None:
    with pytest.raises(ValueError, match=r"as levels: 'neck\[:\]'"):
        Term(losses.FitNet(), student="neck", teacher="neck")([pyramid(3, 8)], [pyramid(3, 8)], {})


def test_a_projector_that_was_built_follows_images_of_changing_size() -> None:
    term = Term(losses.FitNet(), student="a", teacher="b")
    term.build(torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, 4, 4))
    for height, width in ((8, 8), (12, 20), (3, 3)):
        s, t = torch.randn(1, 3, height, width, requires_grad=True), torch.randn(1, 5, height // 2, width // 2)
        pooled = nn.functional.adaptive_avg_pool2d(s, (height // 2, width // 2))
        expected = nn.functional.mse_loss(term.projector.project(pooled), t)
        torch.testing.assert_close(term([s], [t], {}), expected)


@pytest.mark.parametrize(
    "loss", [losses.FitNet(), losses.AT(), losses.CWD(), losses.PKD(), losses.KD()], ids=lambda x: type(x).__name__
)
def test_maps_that_were_equal_first_follow_images_of_changing_size(loss: nn.Module) -> None:
    term = Term(loss)
    before = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 8, 8)
    term.build(*before)
    assert not term.state_dict()
    torch.testing.assert_close(term(*([side] for side in before), {}), loss(*before))
    s, t = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 9, 9)
    larger = nn.functional.interpolate(s, (9, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(term([s], [t], {}), loss(larger, t))


def test_a_loss_that_knows_no_mask_is_refused_where_there_is_one() -> None:
    s, t = [torch.randn(2, 3, 4, 4, requires_grad=True)], [torch.randn(2, 3, 4, 4)]
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"DIST takes no mask.*losses\.Pixelwise"):
        Term(losses.DIST())(s, t, {"mask": mask})
    assert Term(losses.DIST())(s, t, {"mask": None}) > 0
    vectors = [x.mean((2, 3)) for x in s], [x.mean((2, 3)) for x in t]
    assert Term(losses.DIST())(*vectors, {"mask": mask}) > 0


@pytest.mark.parametrize("loss", [losses.KD(), losses.Standardized(losses.KD()), losses.CTKD(losses.KD())])
def test_maps_of_logits_are_brought_to_the_teachers_resolution_without_a_sample(loss: nn.Module) -> None:
    term = Term(loss)
    assert not term.needs_sample
    for side in (4, 8, 6):
        s, t = torch.randn(2, 3, side, side, requires_grad=True), torch.randn(2, 3, 8, 8)
        larger = s if side == 8 else nn.functional.interpolate(s, (8, 8), mode="bilinear", align_corners=False)
        torch.testing.assert_close(term([s], [t], {}), loss(larger, t))
    with pytest.raises(ValueError, match=r"student \(2, 4, 8, 8\) and teacher \(2, 3, 8, 8\) must have the same shape"):
        term([torch.randn(2, 4, 8, 8, requires_grad=True)], [t], {})


def test_classes_in_another_dimension_are_not_resized() -> None:
    s, t = [torch.randn(2, 4, 4, 3, requires_grad=True)], [torch.randn(2, 8, 8, 3)]
    with pytest.raises(ValueError, match="must have the same shape"):
        Term(losses.KD(dim=-1))(s, t, {})


class Weighed(nn.Module):
    """A loss that says which label it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Any] = []

    def forward(self, student: Tensor, teacher: Tensor, worth: Any) -> Tensor:
        self.given.append(worth)
        return (student - teacher).square().mean()


def test_a_label_that_is_levels_is_given_level_by_level_or_call_by_call() -> None:
    levels = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    for path, captured in (("neck[:]", [levels]), ("head", levels)):
        term = Term(Weighed(), student=path, teacher=path)
        term(captured, captured, {"worth": Levels("abc")})
        term(captured, captured, {"worth": "the same"})
        assert term.loss.given == ["a", "b", "c", *["the same"] * 3]
    with pytest.raises(ValueError, match="'worth' is there for 2 levels, and the term compares 3"):
        Term(Weighed(), student="neck[:]", teacher="neck[:]")([levels], [levels], {"worth": Levels("ab")})


def test_what_an_output_has_to_select_from_is_named() -> None:
    term = Term(losses.KD())
    logits = torch.zeros(2, 3)
    both = {"loss": torch.zeros(()), "logits": logits, "past": None}
    with pytest.raises(ValueError, match=r"""Select one: "output\['loss'\]", "output\['logits'\]"\.$"""):
        term([both], [both], {})
    with pytest.raises(ValueError, match=r"Select one: 'output\[1\]'\.$"):
        term([(None, logits)], [logits], {})
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.zeros(2, 3, 4), torch.tensor([3, 2]), batch_first=True)
    with pytest.raises(ValueError, match=r"Select one: 'output\[0\]\.data'\.$"):
        Term(losses.KD(), student="output[0]")([(packed, None)], [logits], {})
    with pytest.raises(ValueError, match=r"Select one: 'output\.logits'\.$"):
        term([SimpleNamespace(logits=logits)], [logits], {})
    with pytest.raises(ValueError, match=r"'output\[0\]', 'output\[1\]', or all of them as levels: 'output\[:\]'\.$"):
        term([[logits, logits]], [logits], {})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_of_a_transformer_are_told() -> None:
    def encoder() -> nn.TransformerEncoder:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    teacher, student, mask = encoder(), encoder(), torch.tensor([[False, False, False], [False, True, True]])
    told = "the teacher's 'layers.0' is a nested tensor.*enable_nested_tensor=False, or tap what the encoder itself"
    for path in ("layers.0", "output"):
        distiller = Distiller({"hint": Term(losses.FitNet(), student=path, teacher=path)}, teacher)
        distiller.attach(student.train())
        with distiller.watch() as calls:
            student(torch.randn(2, 3, 8), src_key_padding_mask=mask)
        if path == "output":
            assert distiller(calls)["hint"] > 0
        else:
            with pytest.raises(ValueError, match=told):
                distiller(calls)
        distiller.detach()
