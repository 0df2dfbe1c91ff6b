import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd import losses
from lightning_kd.losses.ctkd import reverse_gradient
from lightning_kd.schedules import Constant, Moment


class Reversal(torch.autograd.Function):
    """As the authors' code has it: the gradient times a number that goes from 0 to -1."""

    @staticmethod
    def forward(ctx, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.strength * gradient, None


def authors_cosine(epoch: int, loops: int = 10) -> float:
    return (math.cos(min(epoch, loops) * math.pi / loops) + 1.0) * 0.5 - 1.0


def _pair() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 3 * torch.randn(6, 10, dtype=torch.float64), 3 * torch.randn(6, 10, dtype=torch.float64)


@pytest.mark.parametrize("epoch", [0, 3, 10])
def test_against_the_authors_reversal_and_bounds(epoch: int):
    s, t = _pair()
    theta = torch.ones(1, dtype=torch.float64, requires_grad=True)
    temperature = 1 + 20 * torch.sigmoid(Reversal.apply(theta, authors_cosine(epoch)))
    kl = nn.KLDivLoss(reduction="batchmean")
    expected = kl(F.log_softmax(s / temperature, 1), F.softmax(t / temperature, 1)) * temperature**2
    expected.backward()

    loss = losses.CTKD(losses.KD()).double()
    loss.at(Moment(progress=epoch / 10))
    value = loss(s, t)
    value.backward()
    torch.testing.assert_close(value, expected.squeeze())
    torch.testing.assert_close(loss.theta.grad, theta.grad.squeeze())
    assert loss.values["reversal"] == pytest.approx(-authors_cosine(epoch))
    assert float(loss.values["temperature"]) == pytest.approx(float(temperature.detach()))


def test_the_temperature_raises_what_the_student_lowers():
    s, t = _pair()
    loss = losses.CTKD(losses.KD(), reversal=Constant(1.0))
    before = float(loss(s, t).detach())
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss(s, t).backward()
        optimizer.step()
    assert float(loss(s, t).detach()) > before
    assert 1.0 < float(loss.values["temperature"]) < 21.0


def test_the_gradient_is_reversed_and_the_value_is_not():
    x = torch.tensor(0.3, requires_grad=True)
    y = reverse_gradient(x, 0.25)
    (3.0 * y).backward()
    assert y.item() == x.item()
    assert x.grad == -0.75


def test_the_wrapped_loss_has_its_temperature_again_and_the_student_the_plain_gradient():
    s, t = _pair()
    loss = losses.CTKD(losses.KD(temperature=3.0), low=2.0, high=4.0)
    s.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(s, t), s)
    assert loss.loss.temperature == 3.0
    (plain,) = torch.autograd.grad(losses.KD(2.0 + 2.0 * float(torch.tensor(1.0).sigmoid()))(s, t), s)
    torch.testing.assert_close(gradient, plain)


def test_around_other_wrappers():
    s, t = _pair()
    for inner in (losses.Standardized(losses.KD()), losses.SampleTemperature(losses.KD())):
        loss = losses.CTKD(inner, reversal=Constant(1.0))
        loss(s, t).backward()
        assert loss.theta.grad.abs() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: losses.CTKD(nn.MSELoss()),
            "CTKD sets the temperature of the loss.*MSELoss has none",
        ),
        (lambda: losses.CTKD(losses.KD(), low=0.0), "0 < low < high; got 0.0 and 21.0"),
        (lambda: losses.CTKD(losses.KD(), low=4.0, high=4.0), "0 < low < high"),
        (lambda: losses.Standardized(losses.CTKD(losses.KD())), r"it is the outermost: CTKD\(Standardized\(\.\.\.\)\)"),
    ],
)
def test_mistakes_are_told(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
