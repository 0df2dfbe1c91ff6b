import pytest
import torch
from torch import Tensor, nn

from lightning_kd import Distiller, Term, losses
from lightning_kd.teachers import Itself


class Exits(nn.Module):
    """Two stages with a classifier each: what is returned is what the deeper one says."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.exit, self.head = nn.Linear(6, 3), nn.Linear(6, 3)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.exit(x)
        logits: Tensor = self.head(self.second(x))
        return logits.mul_(2) if self.inplace else logits


def test_an_early_exit_learns_of_the_output_which_learns_nothing_of_it() -> None:
    torch.manual_seed(0)
    student, images = Exits(), torch.randn(8, 4)
    distiller = Distiller({"exit": Term(losses.KD(temperature=2.0), student="exit", teacher="output")}, Itself())
    distiller.attach(student)
    for _ in range(2):
        student.zero_grad()
        with distiller.watch() as calls:
            output = student(images)
        loss = distiller(calls)["exit"]
        loss.backward()
    expected = losses.KD(temperature=2.0)(student.exit(student.first(images)), output.detach())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss > 0
    assert student.head.weight.grad is None
    assert student.second.weight.grad is None
    assert student.exit.weight.grad is not None
    assert student.exit.weight.grad.any()
    distiller.detach()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in student.modules())


def test_a_call_that_fails_or_is_not_watched_leaves_nothing_behind() -> None:
    student = Exits()
    distiller = Distiller({"exit": Term(losses.KD(), student="exit", teacher="output")}, Itself())
    distiller.attach(student)
    student(torch.randn(2, 4))
    with distiller.watch() as calls:
        with pytest.raises(RuntimeError):
            student(torch.randn(2, 5))
        student(torch.randn(2, 4))
        student(torch.randn(3, 4))
    assert [len(call.teacher["output"][0]) for call in calls] == [2, 3]
    assert not any(call.teacher["output"][0].requires_grad for call in calls)


def test_what_is_overwritten_is_refused() -> None:
    student = Exits(inplace=True)
    distiller = Distiller({"exit": Term(losses.KD(), student="exit", teacher="head")}, Itself())
    distiller.attach(student)
    told = "'head' in the student, which is its own teacher, was modified in place"
    with distiller.watch(), pytest.raises(RuntimeError, match=told):
        student(torch.randn(2, 4))


def test_a_layer_that_would_teach_itself_is_refused() -> None:
    distiller = Distiller({"exit": Term(losses.KD(), student="exit", teacher="exit")}, Itself())
    with pytest.raises(ValueError, match="Term 'exit': it compares 'exit' of the student with itself, so it is"):
        distiller.attach(Exits())
    own = Term(losses.FitNet(), student="first", teacher="first", projector=nn.Linear(6, 6))
    Distiller({"own": own}, Itself()).attach(Exits())


def test_one_tensor_under_two_names_is_refused() -> None:
    student = Exits()
    student.alias = student.exit
    with pytest.raises(
        ValueError, match="Term 'it': it compares 'exit' of the student with 'alias', which is the same"
    ):
        Distiller({"it": Term(losses.KD(), student="exit", teacher="alias")}, Itself()).attach(student)
    flat = nn.Sequential(student.first, nn.Flatten())  # of vectors: what it is given
    for model, here, there in [(student, "head", "output"), (flat, "0", "1")]:
        distiller = Distiller({"it": Term(losses.FitNet(), student=here, teacher=there)}, Itself())
        distiller.attach(model)
        with distiller.watch() as calls:
            model(torch.randn(8, 4))
        with pytest.raises(ValueError, match=f"'{here}' of the student with '{there}', which is the same, so it is"):
            distiller(calls)
        distiller.detach()


def test_what_the_step_overwrites_is_refused() -> None:
    student, images = Exits(), torch.randn(8, 4)
    distiller = Distiller({"exit": Term(losses.KD(), student="exit", teacher="output")}, Itself())
    distiller.attach(student)
    with distiller.watch() as calls:
        expected = student(images) * 10
    before = distiller(calls)
    with distiller.watch() as calls:
        logits = student(images)
        assert torch.equal(logits.mul_(10), expected)
    with pytest.raises(ValueError, match="Term 'exit': the teacher's 'output' was overwritten in place after it had"):
        distiller(calls)
    with distiller.watch() as calls:
        student(images).square()
    assert torch.equal(distiller(calls)["exit"], before["exit"])


def test_before_it_is_bound_it_answers_nothing() -> None:
    with pytest.raises(RuntimeError, match="not bound"):
        Itself()(torch.randn(2, 4))
