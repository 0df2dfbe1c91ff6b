import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torchdistill.losses.mid_level import KDLoss

from lightning_kd import losses, schedules
from lightning_kd.functional import kd


def _pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 3 * torch.randn(shape, dtype=dtype), 3 * torch.randn(shape, dtype=dtype)


def test_against_torchdistill():
    s, t = _pair(6, 10)
    peer = KDLoss("x", "output", "x", "output", temperature=4.0, alpha=0)
    expected = 16 * peer({"x": {"output": s}}, {"x": {"output": t}})
    torch.testing.assert_close(kd(s, t, temperature=4.0), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_against_categorical(temperature: float):
    s, t = _pair(6, 10)
    p_s, p_t = Categorical(logits=s / temperature), Categorical(logits=t / temperature)
    for divergence, expected in (("forward", kl_divergence(p_t, p_s)), ("reverse", kl_divergence(p_s, p_t))):
        torch.testing.assert_close(
            losses.KD(temperature, divergence)(s, t), temperature**2 * expected.mean(), msg=divergence
        )


def test_sigmoid_against_bernoulli():
    s, t = _pair(6, 10)
    p_s, p_t = Bernoulli(logits=s / 2), Bernoulli(logits=t / 2)
    for divergence, expected in (("forward", kl_divergence(p_t, p_s)), ("reverse", kl_divergence(p_s, p_t))):
        loss = losses.KD(2.0, divergence, activation="sigmoid")
        torch.testing.assert_close(loss(s, t), 4 * expected.sum(1).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_a_binary_logit_is_a_softmax_over_it_and_zero(divergence: str):
    s, t = _pair(6, 1)
    zero = torch.zeros_like(s)
    two = losses.KD(divergence=divergence)(torch.cat((s, zero), 1), torch.cat((t, zero), 1))
    torch.testing.assert_close(losses.KD(divergence=divergence, activation="sigmoid")(s, t), two)


def test_hand_computed():
    s, t = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert kd(s, t, temperature=1.0).item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))


def test_high_temperature_matches_centred_logits():
    """Hinton et al., section 2.1: T^2 KL tends to the mean squared difference of centred logits over 2."""
    s, t = _pair(6, 10, dtype=torch.float64)
    difference = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    torch.testing.assert_close(kd(s, t, temperature=1e4), difference.square().mean() / 2, rtol=1e-3, atol=0)


def test_positions_are_averaged_like_samples():
    s, t = _pair(2, 5, 3, 4)
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (s, t)]
    torch.testing.assert_close(kd(s, t), kd(*flat))
    torch.testing.assert_close(kd(s, t), kd(s.movedim(1, -1), t.movedim(1, -1), dim=-1))
    torch.testing.assert_close(kd(s, t, activation="sigmoid"), kd(*flat, activation="sigmoid"))


def test_jsd_is_symmetric_and_at_most_log_2():
    s, t = _pair(6, 10)
    jsd = losses.KD(1.0, "jsd")
    torch.testing.assert_close(jsd(s, t), jsd(t, s))
    far = torch.tensor([[200.0, -200.0]])
    assert jsd(far, -far).item() == pytest.approx(math.log(2))


def test_jsd_tends_to_both_kls():
    s, t = _pair(6, 10, dtype=torch.float64)
    for end, near, divergence in ((0.0, 1e-6, "forward"), (1.0, 1 - 1e-6, "reverse")):
        limit = kd(s, t, divergence="jsd", beta=near) / 1e-6
        torch.testing.assert_close(limit, kd(s, t, divergence=divergence), rtol=1e-4, atol=0)
        torch.testing.assert_close(kd(s, t, divergence="jsd", beta=end), kd(s, t, divergence=divergence))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_gradient_by_finite_differences(divergence: str, activation: str):
    s, t = _pair(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(losses.KD(2.0, divergence, activation), (s.requires_grad_(), t))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("scale", "dtype"), [(200.0, torch.float32), (60000.0, torch.float16)])
def test_extremes(divergence: str, activation: str, scale: float, dtype: torch.dtype):
    s = (scale * torch.tensor([[1.0, -1.0, -1.0], [0.0, 1.0, -1.0]])).to(dtype).requires_grad_()
    t = (scale * torch.tensor([[-1.0, 1.0, 1.0], [1.0, -1.0, 0.0]])).to(dtype)
    loss = losses.KD(1.0, divergence, activation)(s, t)
    loss.backward()
    assert torch.isfinite(loss)
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    classes=st.integers(2, 12),
    temperature=st.floats(0.1, 20.0),
    divergence=st.sampled_from(["forward", "reverse", "jsd"]),
    shift=st.floats(-50, 50),
)
def test_is_a_divergence(seed: int, classes: int, temperature: float, divergence: str, shift: float):
    s, t = 5 * torch.randn(2, 4, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss = losses.KD(temperature, divergence)
    assert loss(s, t) >= 0
    assert loss(t, t).abs() < 1e-9
    torch.testing.assert_close(loss(s + shift, t), loss(s, t), rtol=1e-6, atol=1e-9)


def test_errors_give_the_remedy():
    one = torch.zeros(4, 1)
    with pytest.raises(ValueError, match=r"silently zero: use KD\(activation='sigmoid'\)"):
        losses.KD()(one, one)
    with pytest.raises(ValueError, match=r"student \(4, 1\) and teacher \(4, 2\)"):
        losses.KD()(one, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="unsqueeze"):
        losses.KD(activation="sigmoid")(torch.zeros(4), torch.zeros(4))
    for wrong in ({"divergence": "kl"}, {"activation": "tanh"}, {"beta": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            losses.KD(**wrong)
    with pytest.raises(ValueError, match=r"dim is the number of a dimension.*got 'x'"):
        losses.KD(dim="x")
    for schedule in (schedules.Linear(8.0, 1.0), lambda progress: 8 - progress):
        with pytest.raises(ValueError, match=r"temperature must be a positive .* callbacks\.TemperatureScheduler"):
            losses.KD(temperature=schedule)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_temperature_for_each_sample_is_the_mean_over_samples(divergence: str, activation: str):
    s, t = _pair(6, 10)
    temperatures = torch.linspace(0.5, 8.0, 6)
    each = [
        kd(s[i : i + 1], t[i : i + 1], float(temperature), divergence, activation)
        for i, temperature in enumerate(temperatures)
    ]
    torch.testing.assert_close(kd(s, t, temperatures, divergence, activation), torch.stack(each).mean())


@pytest.mark.parametrize("dim", [1, -1])
def test_a_temperature_for_each_sample_or_position(dim: int):
    s, t = (x.movedim(1, dim) for x in _pair(2, 5, 3))
    temperatures = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    each = [
        kd(s.movedim(dim, 1)[b, :, n][None], t.movedim(dim, 1)[b, :, n][None], float(temperatures[b, n]))
        for b in range(2)
        for n in range(3)
    ]
    torch.testing.assert_close(kd(s, t, temperatures, dim=dim), torch.stack(each).mean())
    by_sample = kd(s, t, torch.tensor([2.0, 6.0]), dim=dim)
    torch.testing.assert_close(by_sample, (kd(s[:1], t[:1], 2.0, dim=dim) + kd(s[1:], t[1:], 6.0, dim=dim)) / 2)


def test_one_temperature_is_one_number_in_whatever_it_comes():
    s, t = _pair(6, 10)
    for same in (torch.tensor(3.0), torch.full((6,), 3.0)):
        torch.testing.assert_close(kd(s, t, same), kd(s, t, 3.0))
