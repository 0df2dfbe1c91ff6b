import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchdistill.losses.mid_level import LogitStdKDLoss

from lightning_kd import losses
from lightning_kd.functional import dkd, standardize

LOGIT_LOSSES = [losses.KD(), losses.DKD(), losses.DIST(), losses.NKD(), losses.PLD(), losses.OFA()]


def test_against_torchdistill():
    torch.manual_seed(0)
    s, t = 3 * torch.randn(6, 10), torch.randn(6, 10)
    peer = LogitStdKDLoss("x", "output", "x", "output", temperature=2.0, alpha=0)
    expected = 4 * peer({"x": {"output": s}}, {"x": {"output": t}})
    torch.testing.assert_close(losses.Standardized(losses.KD(temperature=2.0))(s, t), expected)


def test_mean_0_and_deviation_1():
    torch.manual_seed(0)
    z = standardize(5 + 3 * torch.randn(4, 10, 2))
    torch.testing.assert_close(z.mean(1), torch.zeros(4, 2))
    torch.testing.assert_close(z.std(1), torch.ones(4, 2))


@pytest.mark.parametrize("loss", LOGIT_LOSSES, ids=lambda loss: type(loss).__name__)
def test_wraps_every_logit_loss(loss: torch.nn.Module):
    torch.manual_seed(0)
    s, t, y = torch.randn(6, 10), torch.randn(6, 10), torch.randint(10, (6,))
    wrapped = losses.Standardized(loss)
    torch.testing.assert_close(wrapped(4 * s - 2, t, y), wrapped(s, t, y))


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0.01, 100), shift=st.floats(-100, 100))
def test_free_of_scale_and_offset(scale: float, shift: float):
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(standardize(scale * x + shift), standardize(x), rtol=1e-4, atol=1e-5)


def test_passes_the_target_and_the_temperature_on():
    torch.manual_seed(0)
    s, t, y = torch.randn(6, 10), torch.randn(6, 10), torch.randint(10, (6,))
    loss = losses.Standardized(losses.DKD())
    loss.temperature = 2.0
    assert loss.loss.temperature == loss.temperature == 2.0
    torch.testing.assert_close(loss(s, t, y), dkd(standardize(s), standardize(t), y, temperature=2.0))
    with pytest.raises(ValueError, match="DKD needs the labels"):
        loss(s, t)
    assert not hasattr(losses.Standardized(losses.PLD()), "temperature")


def test_one_class_is_refused():
    x = torch.zeros(4, 1)
    with pytest.raises(ValueError, match="at least three classes"):
        losses.Standardized(losses.KD(activation="sigmoid"))(x, x)


def test_two_classes_are_refused_since_their_scores_are_constant():
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="nothing could be learned"):
        losses.Standardized(losses.KD())(x, x)
