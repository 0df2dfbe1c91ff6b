"""The kernels of dense divergences, on a GPU; `test_triton_without_gpu.py` runs them in Triton's interpreter."""

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_kd import functional
from lightning_kd.losses import _dense

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

KINDS: dict[str, Any] = {"forward": 0.0, "reverse": 1.0, "jsd": 0.3}


def exact(student: Tensor, teacher: Tensor, temperature: float, beta: float, dim: int, here: Tensor | None) -> Tensor:
    """Return the divergence by softmax and log in float64, the sum over what counts."""
    p_s, p_t = ((x.double() / temperature).movedim(dim, -1).softmax(-1) for x in (student, teacher))
    if here is not None:
        p_s, p_t = p_s[here], p_t[here]

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p.log() - q.log())).sum()

    mixed = beta * p_t + (1 - beta) * p_s
    if beta in (0, 1):
        return kl(p_t, p_s) if beta == 0 else kl(p_s, p_t)
    return beta * kl(p_t, mixed) + (1 - beta) * kl(p_s, mixed)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dense, "_by_kernels", lambda *maps: True)


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many tiles":
        kernels = _dense._kernels()
        monkeypatch.setattr(kernels, "LONGEST", {False: 2, True: 2})
        monkeypatch.setattr(kernels, "PART", {False: (8, 4), True: (8, 8)})
        monkeypatch.setattr(kernels, "CHUNK", 2)  # so that a row has several of these


def pair(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    student, teacher = ((scale * torch.randn(shape, device=DEVICE)).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def both(student: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Return value and gradient."""
    value = _dense.divergence(student, *rest)
    (gradient,) = torch.autograd.grad(2.5 * value, student)
    return value.detach(), gradient


def check(student: Tensor, teacher: Tensor, temperature: float, beta: float, dim: int, here: Tensor | None) -> None:
    value, gradient = both(student, teacher, temperature, beta, dim, here)
    expected = exact(student, teacher, temperature, beta, dim, here)
    (slope,) = torch.autograd.grad(2.5 * expected, student)
    near: dict[str, float] = {"rtol": max(2e-4, 2 * torch.finfo(student.dtype).eps), "atol": 1e-6}
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, slope, **near)
    with pytest.MonkeyPatch.context() as patch:  # the same block by block
        patch.setattr(_dense, "_by_kernels", lambda *maps: False)
        value_of_blocks, gradient_of_blocks = both(student, teacher, temperature, beta, dim, here)
    torch.testing.assert_close(value, value_of_blocks, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, gradient_of_blocks, **near)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return the same numbers, elsewhere in memory."""
    if layout == "pixels":
        return x.detach().contiguous()
    if layout == "channels_last":
        return x.detach().contiguous(memory_format=torch.channels_last)
    return x.detach().repeat_interleave(2, 3)[..., ::2]  # of no map that is a whole


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_the_chain(kind: str, masked: bool) -> None:
    student, teacher = pair(2, 19, 3, 3)
    here = torch.rand(2, 3, 3, device=DEVICE) > 0.4 if masked else None
    check(student, teacher, 2.0, KINDS[kind], 1, here)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("layouts", [("channels_last",) * 2, ("pixels", "channels_last"), ("apart", "pixels")])
def test_any_layout(layouts: tuple[str, str]) -> None:
    student, teacher = (laid_out(x, layout) for x, layout in zip(pair(2, 18, 3, 3), layouts, strict=True))
    here = torch.rand(2, 3, 3, device=DEVICE) > 0.4
    check(student.requires_grad_(), teacher, 2.0, 0.3, 1, here)
    (gradient,) = torch.autograd.grad(_dense.divergence(student, teacher, 2.0, 0.0, 1), student)
    if layouts[0] == "channels_last":
        assert gradient.stride() == student.stride()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dim", [0, -1])
def test_wherever_the_classes_are(dim: int) -> None:
    student, teacher = pair(9, 2, 9)
    here = torch.rand(student.sum(dim).shape, device=DEVICE) > 0.4
    check(student, teacher, 2.0, 0.0, dim, here)


@pytest.mark.usefixtures("tiles")
def test_cwd_of_either_layout() -> None:
    student, teacher = pair(2, 3, 3, 7)
    p_s, p_t = (x.double().flatten(2).softmax(2) for x in (student / 2, teacher / 2))
    expected = 4 * (p_t * (p_t.log() - p_s.log())).sum(2).mean()
    (slope,) = torch.autograd.grad(expected, student)
    for layout in "pixels", "channels_last":
        ours = laid_out(student, layout).requires_grad_()
        value = functional.cwd(ours, laid_out(teacher, layout), 2.0)
        torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.autograd.grad(value, ours)[0], slope, rtol=2e-4, atol=1e-8)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = pair(1, 19, 2, 3, dtype=dtype)
    value = _dense.divergence(student, teacher, 4.0, 0.0, 1)
    expected = exact(student, teacher, 4.0, 0.0, 1, None)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    scale = 2.0**10  # of a gradient scaler
    (ours,), (slope,) = (torch.autograd.grad(x * scale, student) for x in (value, expected))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, slope, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.usefixtures("tiles")
def test_the_teachers_type_may_differ() -> None:
    student, teacher = pair(1, 19, 2, 3)
    check(student, teacher.bfloat16(), 2.0, 0.0, 1, None)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_what_is_no_number_reaches_nothing_from_behind_a_mask(kind: str) -> None:
    student, teacher = pair(2, 19, 2, 2)
    here = torch.ones(2, 2, 2, dtype=torch.bool, device=DEVICE)
    here[0, 1], here[1] = False, False
    value, gradient = both(student, teacher, 1.0, KINDS[kind], 1, here)
    broken, taught = student.detach().clone(), teacher.clone()
    broken[0, :, 1], broken[1] = math.nan, math.inf
    taught[0, :, 1], taught[1] = math.inf, -math.inf
    again, same = both(broken.requires_grad_(), taught, 1.0, KINDS[kind], 1, here)
    assert torch.equal(value, again)
    assert torch.equal(gradient, same)
    assert not gradient.movedim(1, -1)[~here].any()
    nothing, flat = both(broken, taught, 1.0, KINDS[kind], 1, torch.zeros_like(here))
    assert nothing == 0
    assert not flat.any()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("wrong", "kind"), [(math.nan, "forward"), (math.nan, "jsd"), (-math.inf, "reverse")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_what_is_no_number_is_not_hidden(wrong: float, kind: str) -> None:
    student, teacher = pair(1, 19, 2, 3)
    broken = student.detach().clone()
    broken[0, 7, 1, 1] = wrong
    assert not _dense.divergence(broken, teacher, 1.0, KINDS[kind], 1).isfinite()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    ("dtype", "size", "kind"),
    [(torch.float32, 1e4, "forward"), (torch.float32, 1e4, "reverse"), (torch.float16, 6e4, "jsd")],
)
def test_large_logits(dtype: torch.dtype, size: float, kind: str) -> None:
    student, teacher = pair(1, 19, 2, 3, dtype=dtype, scale=0.0)
    student.data.add_(size * torch.randn_like(student).sign())
    teacher.add_(size * torch.randn_like(teacher).sign())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dense, "_by_kernels", lambda *maps: False)
        expected, slope = both(student, teacher, 1.0, KINDS[kind], 1)
    value, gradient = both(student, teacher, 1.0, KINDS[kind], 1)
    assert gradient.isfinite().all()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_of_all_logits_changes_nothing(kind: str) -> None:
    student, teacher = (x.detach().mul(8).round() / 8 for x in pair(1, 19, 2, 3))  # so that sums are exact
    value, gradient = both(student.requires_grad_(), teacher, 1.0, KINDS[kind], 1)
    shifted = (student.detach() + 2.0**16).requires_grad_()
    again, same = both(shifted, teacher - 2.0**16, 1.0, KINDS[kind], 1)
    torch.testing.assert_close(again, value, rtol=1e-6, atol=0)
    torch.testing.assert_close(same, gradient, rtol=1e-5, atol=1e-7)
    assert _dense.divergence(shifted, shifted - 3.0, 1.0, KINDS[kind], 1).abs() < 1e-4


@pytest.mark.usefixtures("tiles")
def test_through_the_loss_again_and_twice() -> None:
    student, teacher = pair(1, 19, 2, 3)
    temperature = torch.tensor(2.0, device=DEVICE)
    value = functional.kd(student, teacher, temperature)
    torch.testing.assert_close(value.double(), 4 * exact(student, teacher, 2.0, 0.0, 1, None) / 6, rtol=1e-5, atol=0)
    (once,), (again,) = (torch.autograd.grad(value, student, retain_graph=True) for _ in range(2))
    assert torch.equal(once, again)
    (made,) = torch.autograd.grad(value, student, create_graph=True)
    torch.testing.assert_close(made, once, rtol=1e-4, atol=1e-7)
    (second,) = torch.autograd.grad(made.square().sum(), student)
    assert second.any()


if not INTERPRETED:  # which is too slow for these

    @pytest.fixture
    def unwaited() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        yield
        torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", [(2, 19, 512, 512), (2, 150, 256, 256), (1, 1000, 64, 64), (1, 2000, 33, 35)])
    def test_pixels_of_real_size(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
        student, teacher = pair(*shape, dtype=dtype)
        for layout in "pixels", "channels_last":
            check(laid_out(student, layout).requires_grad_(), laid_out(teacher, layout), 4.0, KINDS[kind], 1, None)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", [(2, 19, 512 * 512), (1, 150, 64 * 64), (2, 7, 333 * 333), (8, 196, 32000)])
    def test_rows_of_real_length(shape: tuple[int, ...], kind: str) -> None:
        check(*pair(*shape), 2.0, KINDS[kind], 2, torch.rand(shape[:2], device=DEVICE) > 0.2)

    @pytest.mark.usefixtures("unwaited")
    @pytest.mark.parametrize("loss", [functional.kd, functional.cwd])
    def test_a_step_waits_for_nothing_and_makes_one_map(loss: Callable[..., Tensor]) -> None:
        student, teacher = pair(2, 19, 512, 512)
        loss(student, teacher).backward()  # compiles
        student.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss(student, teacher).backward()
        made = torch.cuda.max_memory_allocated() - before
        assert made < 1.05 * student.numel() * student.element_size()

    def test_more_elements_than_32_bits_count() -> None:
        shape = (1, 3, 27000, 27000)
        if torch.cuda.mem_get_info()[0] < 24 * math.prod(shape):
            pytest.skip("too little memory on this GPU")
        student, teacher = (torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        value, gradient = both(student.requires_grad_(), teacher, 1.0, 0.0, 1)
        parts = [both(s, t, 1.0, 0.0, 1) for s, t in zip(student.split(9000, 2), teacher.split(9000, 2), strict=True)]
        torch.testing.assert_close(value, torch.stack([part for part, _ in parts]).sum(), rtol=1e-5, atol=0)
        for whole, (_, part) in zip(gradient.split(9000, 2), parts, strict=True):
            assert (whole - part).abs().amax() < 0.05  # of slopes up to 2.5, in bfloat16
