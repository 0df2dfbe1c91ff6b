"""Divergences of maps, block by block, against the chain of torch's own functions that they replace."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_kd import functional, losses
from lightning_kd.losses import _dense

DIVERGENCES = ["forward", "reverse", "jsd"]
BETA = 0.3


def chain(
    student: Tensor, teacher: Tensor, temperature: float, divergence: str, dim: int = 1, mask: Tensor | None = None
) -> Tensor:
    """Return the tempered divergence by softmax and log, the mean over what counts, in float64."""
    s, t = ((x.double() / temperature).movedim(dim, -1) for x in (student, teacher))
    if mask is not None:
        s, t = s[mask], t[mask]
    p_s, p_t = s.flatten(0, -2).softmax(1), t.flatten(0, -2).softmax(1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p.log() - q.log())).sum(1).mean()

    mixed = BETA * p_t + (1 - BETA) * p_s
    value = {
        "forward": lambda: kl(p_t, p_s),
        "reverse": lambda: kl(p_s, p_t),
        "jsd": lambda: BETA * kl(p_t, mixed) + (1 - BETA) * kl(p_s, mixed),
    }[divergence]()
    return temperature**2 * value


@pytest.fixture(params=[1, 17, 40])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_dense.BLOCK, "cpu", request.param)


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (3 * torch.randn(shape)).to(dtype).requires_grad_(), (3 * torch.randn(shape)).to(dtype)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradient_are_those_of_the_chain(divergence: Any, masked: bool) -> None:
    student, teacher = pair(3, 5, 4, 7)
    mask = torch.rand(3, 4, 7) > 0.4 if masked else None
    value = functional.kd(student, teacher, 2.0, divergence, beta=BETA, mask=mask)
    expected = chain(student, teacher, 2.0, divergence, 1, mask)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    (ours,), (theirs,) = torch.autograd.grad(value, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dim", [1, 2, -1])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_by_differences_wherever_the_classes_are(divergence: Any, dim: int) -> None:
    student, teacher = pair(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: functional.kd(s, teacher, 3.0, divergence, beta=BETA, dim=dim), (student,)
    )


@pytest.mark.usefixtures("block")
def test_cwd_is_the_same_over_positions() -> None:
    student, teacher = pair(2, 3, 4, 5)
    value = functional.cwd(student, teacher, 2.0)
    rows = [x.flatten(2).flatten(0, 1) for x in (student, teacher)]
    expected = F.kl_div((rows[0] / 2).log_softmax(1), (rows[1] / 2).softmax(1), reduction="batchmean") * 4
    torch.testing.assert_close(value, expected)
    (ours,), (theirs,) = torch.autograd.grad(value, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_is_no_number_reaches_nothing_from_behind_a_mask(divergence: Any) -> None:
    student, teacher = pair(2, 3, 4, 4)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, 1] = False
    broken, taught = student.detach().clone(), teacher.clone()
    broken[0, :, 1] = math.nan
    taught[0, :, 1] = math.inf
    broken.requires_grad_()
    value = functional.kd(broken, taught, divergence=divergence, mask=mask)
    assert value == functional.kd(student, teacher, divergence=divergence, mask=mask)
    (gradient,) = torch.autograd.grad(value, broken)
    assert not gradient[0, :, 1].any()
    assert gradient.isfinite().all()


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_second_derivatives_are_those_of_the_chain(divergence: Any, masked: bool) -> None:
    student, teacher = pair(2, 3, 4, 4, dtype=torch.float64)
    mask = torch.rand(2, 4, 4) > 0.4 if masked else None

    def curvature(value: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(value, student, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), student)
        return second

    ours = curvature(functional.kd(student, teacher, 2.0, divergence, beta=BETA, mask=mask))
    assert ours.any()
    torch.testing.assert_close(ours, curvature(chain(student, teacher, 2.0, divergence, mask=mask)))


@pytest.mark.usefixtures("block")
def test_transforms_of_functions_work() -> None:
    student, teacher = pair(4, 3, 5, 5)
    expected = torch.autograd.grad(functional.kd(student, teacher), student)[0]
    torch.testing.assert_close(torch.func.grad(functional.kd)(student.detach(), teacher), expected)


@pytest.mark.usefixtures("block")
def test_what_is_overwritten_after_the_loss() -> None:
    student, teacher = pair(2, 3, 4, 4)
    expected = torch.autograd.grad(functional.kd(student, teacher), student)[0]
    logits = student * 1
    value = functional.kd(logits, teacher, mask=None)
    logits.relu_()
    torch.testing.assert_close(torch.autograd.grad(value, student, retain_graph=True)[0], expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, student)


@pytest.mark.usefixtures("block")
def test_a_teachers_logits_of_inference_mode() -> None:
    student, teacher = pair(2, 3, 4, 4)
    with torch.inference_mode():
        inferred = teacher * 1
    value = functional.kd(student, inferred)
    assert value == functional.kd(student, teacher)
    value.backward()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"divergence": "revers"}, "divergence must be"),
        ({"activation": "sigmod"}, "activation must be"),
        ({"temperature": 0.0}, "temperature must be a positive finite number, got 0.0"),
        ({"temperature": -1.0}, "temperature must be a positive finite number, got -1.0"),
        ({"divergence": "jsd", "beta": 2.0}, "beta is the teacher's share"),
    ],
)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 4)])
def test_the_function_checks_what_the_module_checks(wrong: dict[str, Any], told: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=told):
        functional.kd(*pair(*shape), **wrong)


@pytest.mark.usefixtures("block")
def test_a_retained_graph_is_asked_again() -> None:
    student, teacher = pair(2, 3, 4, 4)
    value = functional.kd(student, teacher)
    (once,), (again,) = (torch.autograd.grad(value, student, retain_graph=True) for _ in range(2))
    (scaled,) = torch.autograd.grad(3 * value, student)
    assert torch.equal(once, again)
    torch.testing.assert_close(scaled, 3 * once)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = pair(2, 150, 8, 8, dtype=dtype)
    value = functional.kd(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), chain(student, teacher, 4.0, "forward"), rtol=1e-5, atol=0)
    scale = 2.0**16  # of a gradient scaler
    (ours,) = torch.autograd.grad(value * scale, student)
    (exact,) = torch.autograd.grad(chain(student, teacher, 4.0, "forward") * scale, student)
    assert ours.dtype == dtype
    cancelled = torch.finfo(torch.float32).eps * float(exact.abs().max())  # two probabilities that are nearly equal
    torch.testing.assert_close(ours, exact, rtol=2 * torch.finfo(dtype).eps, atol=cancelled)


class Maps(TorchDispatchMode):
    """Holds every new tensor that is as large as a map."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().nbytes() >= self.size:
            self.made[result.untyped_storage().data_ptr()] = result
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [functional.kd, functional.cwd])
def test_of_both_maps_one_copy_is_made_which_is_the_gradient(
    loss: Callable[..., Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_dense.BLOCK, "cpu", 64)
    student, teacher = pair(4, 19, 16, 16, dtype=dtype)
    given = {x.untyped_storage().data_ptr() for x in (student, teacher)}
    with Maps(student.numel() * student.element_size()) as maps:
        (gradient,) = torch.autograd.grad(loss(student, teacher), student)
    assert maps.made.keys() - given == {gradient.untyped_storage().data_ptr()}


def test_a_frozen_student_costs_no_gradient() -> None:
    student, teacher = pair(2, 3, 4, 4)
    with torch.no_grad():
        value = functional.kd(student, teacher)
    assert not value.requires_grad
    assert value == functional.kd(student, teacher).detach()


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("asked", ["1", "0", ""])
def test_kernels_are_for_gpus_only(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_KD_TRITON", asked)
    monkeypatch.setattr(_dense, "_kernels", lambda: pytest.fail("a CPU has none"))
    student, teacher = pair(2, 3, 4, 4)
    functional.kd(student, teacher).backward()


def test_kernels_that_were_asked_for_and_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dense, "_by_kernels", lambda *maps: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "lightning_kd.losses._triton", raising=False)
    monkeypatch.delattr(losses, "_triton", raising=False)
    with pytest.raises(ModuleNotFoundError, match="pip install triton, or unset it"):
        functional.kd(*pair(2, 3, 4, 4))
