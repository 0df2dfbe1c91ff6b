import math
import pickle

import pytest
import torch
from torch import Tensor

from lightning_kd.finite import FiniteCheck

RANGES = {"kd": [-2.0, 3.0, -4.0, 5.0], "hint": [-math.inf, 1e20, 0.0, 1.0]}


def ranges(name: str, device: str = "cpu") -> Tensor:
    return torch.tensor(RANGES[name], device=device)


def unasked(name: str) -> Tensor:
    raise AssertionError("ranges are looked at only when something is wrong")


@pytest.mark.parametrize("value", [0.0, -5.0, 3e38])
def test_numbers_pass_and_nothing_else_is_computed(value: float) -> None:
    FiniteCheck()(3, {"kd": torch.tensor(value), "hint": torch.tensor(1.0, dtype=torch.float16)}, unasked)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_error_gives_step_term_and_ranges(value: float) -> None:
    with pytest.raises(FloatingPointError) as caught:
        FiniteCheck()(7, {"kd": torch.tensor(1.0), "hint": torch.tensor(value)}, ranges)
    said = str(caught.value)
    assert f"Step 7: the distillation term 'hint' is {value:g} (student in [-inf, 1e+20], teacher in [0, 1])" in said
    assert "'kd'" not in said
    assert "learning rate" in said


def test_every_term_that_is_wrong_is_named() -> None:
    nan = torch.tensor(math.nan)
    with pytest.raises(FloatingPointError, match=r"'kd' is nan \(student in \[-2, 3\].* and 'hint' is nan"):
        FiniteCheck()(0, {"kd": nan, "hint": nan}, ranges)


def test_a_loss_in_half_precision_that_overflowed() -> None:
    with pytest.raises(FloatingPointError, match="'kd' is inf"):
        FiniteCheck()(0, {"kd": torch.tensor(70000.0).half()}, ranges)


def test_a_float64_loss_beyond_float32_is_a_number() -> None:
    wide = torch.tensor(1e300, dtype=torch.float64)
    FiniteCheck()(0, {"kd": wide, "hint": torch.tensor(1.0)}, unasked)
    with pytest.raises(FloatingPointError, match="'hint' is inf") as caught:
        FiniteCheck()(0, {"kd": wide, "hint": wide * wide}, ranges)
    assert "'kd'" not in str(caught.value)


def test_it_does_not_touch_the_graph() -> None:
    loss = torch.tensor(2.0, requires_grad=True)
    FiniteCheck()(0, {"kd": loss * 1}, unasked)
    (loss * 3).backward()
    assert loss.grad == 3.0


def test_the_own_loss_is_blamed_only_for_earlier_steps() -> None:
    check, nan = FiniteCheck(), torch.tensor(math.nan)
    check(0, {"kd": torch.tensor(1.0)}, ranges, torch.tensor(2.0))
    with pytest.raises(FloatingPointError, match="learning rate"):
        check(1, {"kd": nan}, ranges, nan)
    check(2, {"kd": torch.tensor(1.0)}, ranges, nan)
    check(3, {"kd": torch.tensor(1.0)}, ranges, torch.tensor(2.0))
    with pytest.raises(FloatingPointError, match="own loss was not finite in an earlier step"):
        check(4, {"kd": nan}, ranges, torch.tensor(2.0))


def test_it_finishes_and_pickles() -> None:
    check = FiniteCheck()
    check.finish()
    pickle.loads(pickle.dumps(check)).finish()


@pytest.mark.gpu
def test_on_a_gpu_no_step_waits_and_the_error_names_its_step() -> None:
    def on_gpu(name: str) -> Tensor:
        return ranges(name, "cuda")

    check = FiniteCheck()
    good, bad = torch.tensor(1.0, device="cuda"), torch.tensor(math.nan, device="cuda")
    on_gpu("kd")
    torch.cuda.synchronize()
    values = {"kd": good, "hint": good}
    inputs = {name: ranges(name, "cuda") for name in RANGES}
    torch.cuda.set_sync_debug_mode("error")
    try:
        check(1, values, inputs.__getitem__)
        torch.cuda._sleep(10_000_000)
        check(2, {"kd": bad, "hint": good}, inputs.__getitem__)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(FloatingPointError, match=r"Step 2: the distillation term 'kd' is nan \(student in \[-2, 3\]"):
        check.finish()
    check.finish()  # said once


@pytest.mark.gpu
def test_on_a_gpu_a_later_step_says_it() -> None:
    inputs = {name: ranges(name, "cuda") for name in RANGES}
    good, bad = torch.tensor(1.0, device="cuda"), torch.tensor(math.inf, device="cuda")
    check = FiniteCheck()
    torch.cuda._sleep(1_000_000_000)  # so that the first step does not read its own numbers
    check(1, {"kd": good, "hint": bad}, inputs.__getitem__)
    torch.cuda.synchronize()
    with pytest.raises(FloatingPointError, match="Step 1: the distillation term 'hint' is inf"):
        check(2, {"kd": good, "hint": good}, inputs.__getitem__)
