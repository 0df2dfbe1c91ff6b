"""Terms between networks of several precisions, and in an autocast."""

import copy
from contextlib import nullcontext

import pytest
import torch
from engine import Net, hint
from torch import Tensor, nn

from lightning_kd import Distiller, Term, losses


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
