import pytest
import torch
from torch import Tensor, nn

from lightning_kd import losses
from lightning_kd.functional import kd


def _triple(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(shape), 3 * torch.randn(shape), torch.randint(shape[1], (shape[0], *shape[2:]))


def _nll(logits: Tensor, labels: Tensor) -> float:
    """The mean of -log p(label), in float64, position by position."""
    rows = logits.double().movedim(1, -1).reshape(-1, logits.shape[1])
    return float(-rows.softmax(1)[torch.arange(len(rows)), labels.reshape(-1)].log().mean())


@pytest.mark.parametrize("shape", [(6, 10), (2, 5, 3, 3)])
def test_the_temperature_is_that_of_the_gap(shape: tuple[int, ...]):
    s, t, y = _triple(*shape)
    t = t.scatter(1, y.unsqueeze(1), 6.0)  # a teacher that is mostly right
    gap = _nll(s, y) - _nll(t, y)
    assert gap > 0.5
    loss = losses.DTS(losses.KD(), low=2.0, high=6.0)
    torch.testing.assert_close(loss(s, t, y), kd(s, t, temperature=2.0 + 4.0 * gap / (1.0 + gap)))
    assert float(loss.values["gap"]) == pytest.approx(gap, rel=1e-5)


def test_soft_while_the_student_lags_and_sharp_when_it_has_caught_up():
    y = torch.arange(10)
    teacher, loss, temperatures = 9 * torch.eye(10), losses.DTS(losses.KD()), []
    for learned in (0.0, 1.0, 3.0, 9.0, 20.0):
        loss(learned * torch.eye(10), teacher, y)
        temperatures.append(float(loss.values["temperature"]))
    assert temperatures == sorted(temperatures, reverse=True)
    assert temperatures[-2:] == [1.0, 1.0]  # better than the teacher is not sharper still
    loss(-1e4 * torch.eye(10), teacher, y)
    assert 7.9 < float(loss.values["temperature"]) < 8.0


def test_no_gradient_flows_through_the_temperature():
    s, t, y = _triple(6, 10)
    s.requires_grad_()
    loss = losses.DTS(losses.KD())
    (gradient,) = torch.autograd.grad(loss(s, t, y), s)
    (plain,) = torch.autograd.grad(kd(s, t, temperature=float(loss.values["temperature"])), s)
    torch.testing.assert_close(gradient, plain)
    assert loss.loss.temperature == 4.0


def test_it_needs_a_temperature_to_set():
    with pytest.raises(ValueError, match=r"DTS sets the temperature.*PLD has none"):
        losses.DTS(losses.PLD())
    with pytest.raises(ValueError, match="0 < low < high"):
        losses.DTS(losses.KD(), low=8.0, high=1.0)
    assert isinstance(losses.DTS(losses.Standardized(losses.KD())), nn.Module)
