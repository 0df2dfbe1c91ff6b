import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

from lightning_kd import losses
from lightning_kd.functional import kd, standardize
from lightning_kd.losses.sample_temperature import confidence


def _pair(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(shape), 2 * torch.randn(shape)


def test_confidence_goes_from_0_to_1():
    logits = torch.tensor([[0.0] * 5, [200.0, 0, 0, 0, 0]])
    for by in ("probability", "entropy"):
        torch.testing.assert_close(confidence(logits, by), torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)


def test_confidence_by_entropy_is_scipys():
    _, t = _pair(6, 10)
    expected = 1.0 - entropy(t.double().softmax(1).numpy(), axis=1, base=10)
    torch.testing.assert_close(confidence(t, "entropy").double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by", ["probability", "entropy"])
def test_each_sample_has_its_own(by: str):
    s, t = _pair(6, 10)
    loss = losses.SampleTemperature(losses.KD(temperature=3.0), spread=1.5, by=by)
    temperatures = loss.temperatures(t)
    assert 2.0 < temperatures.min() < temperatures.max() < 4.5
    assert torch.equal(temperatures.argsort(), confidence(t, by).argsort())
    each = [kd(s[i : i + 1], t[i : i + 1], temperature=float(x)) for i, x in enumerate(temperatures)]
    torch.testing.assert_close(loss(s, t), torch.stack(each).mean())
    assert float(loss.values["mean_temperature"]) == pytest.approx(float(temperatures.mean()))
    assert loss.temperature == loss.loss.temperature == 3.0


def test_without_spread_it_is_the_loss_itself():
    s, t = _pair(6, 10)
    y = torch.arange(6)
    for inner in (losses.KD(), losses.DKD(), losses.Standardized(losses.DKD())):
        loss = losses.SampleTemperature(inner, spread=1.0)
        plain = inner(s, t) if isinstance(inner, losses.KD) else inner(s, t, y)
        torch.testing.assert_close(loss(s, t, y), plain)


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 3, 4)])
def test_each_position_is_a_sample(shape: tuple[int, ...]):
    s, t = _pair(*shape)
    rows = [x.movedim(1, -1).reshape(-1, 5) for x in (s, t)]
    y = torch.randint(5, (2, *shape[2:]))
    for inner in (losses.KD(), losses.DKD()):
        loss = losses.SampleTemperature(inner)
        torch.testing.assert_close(loss(s, t, y), loss(*rows, y.reshape(-1)))
    tokens = losses.SampleTemperature(losses.KD(dim=-1), dim=-1)
    torch.testing.assert_close(tokens(s.movedim(1, -1), t.movedim(1, -1)), losses.SampleTemperature(losses.KD())(s, t))


def test_certainty_is_that_of_the_teacher_before_it_is_standardised():
    s, t = _pair(6, 10)
    temperatures = losses.SampleTemperature(losses.KD()).temperatures(t)
    expected = kd(standardize(s), standardize(t), temperatures)
    torch.testing.assert_close(losses.SampleTemperature(losses.Standardized(losses.KD()))(s, t), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.SampleTemperature(losses.NKD()), "NKD takes one temperature for all samples"),
        (lambda: losses.SampleTemperature(losses.Standardized(losses.DIST())), "Standardized takes one temperature"),
        (lambda: losses.SampleTemperature(losses.PLD()), "PLD has none that could be set"),
        (lambda: losses.SampleTemperature(losses.KD(), spread=0.0), "spread must be a positive"),
        (lambda: losses.SampleTemperature(losses.KD(), by="margin"), "by is 'probability' or 'entropy', got 'margin'"),
    ],
)
def test_mistakes_are_told(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
