import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from lightning_kd import losses
from lightning_kd.functional import bdkd, kd


@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("emphasis", [0.3, 2.0])
def test_sample_by_sample_against_categorical(temperature: float, emphasis: float):
    torch.manual_seed(0)
    s, t = torch.linspace(1, 6, 12)[:, None] * torch.randn(12, 7), 3 * torch.randn(12, 7)
    expected, unsure = 0.0, 0
    for i in range(12):
        p_s, p_t = Categorical(logits=s[i] / temperature), Categorical(logits=t[i] / temperature)
        forward, reverse = kl_divergence(p_t, p_s).item(), kl_divergence(p_s, p_t).item()
        if p_s.entropy() > p_t.entropy():
            unsure += 1
            expected += (forward + emphasis * reverse) / 12
        else:
            expected += (emphasis * forward + reverse) / 12
    assert 2 < unsure < 10
    assert losses.BDKD(temperature, emphasis)(s, t).item() == pytest.approx(temperature**2 * expected, rel=1e-4)


def test_hand_computed():
    """A student that knows nothing beside a teacher of (0.9, 0.1): the reverse KL counts twice, and once exchanged."""
    half, sure = torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]).log()
    to_half = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    from_half = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert bdkd(half, sure, temperature=1.0).item() == pytest.approx(to_half + 2 * from_half)
    assert bdkd(sure, half, temperature=1.0).item() == pytest.approx(2 * from_half + to_half)


def test_without_emphasis_it_is_the_sum_of_both_divergences():
    torch.manual_seed(0)
    s, t = 3 * torch.randn(6, 5, 2, 3), 3 * torch.randn(6, 5, 2, 3)
    both = kd(s, t, divergence="forward") + kd(s, t, divergence="reverse")
    torch.testing.assert_close(bdkd(s, t, emphasis=1.0), both)


def test_each_position_is_weighed_alone():
    torch.manual_seed(0)
    s, t = 3 * torch.randn(2, 5, 3, 4), 3 * torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(bdkd(s, t), bdkd(*(x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (s, t))))


def test_gradient_by_finite_differences():
    torch.manual_seed(0)
    s, t = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(losses.BDKD(2.0), (s.requires_grad_(), t))


def test_errors_give_the_remedy():
    one = torch.zeros(4, 1)
    with pytest.raises(ValueError, match=r"silently zero: use KD\(activation='sigmoid'\)"):
        losses.BDKD()(one, one)
    with pytest.raises(ValueError, match="emphasis must be a positive finite number"):
        losses.BDKD(emphasis=-1.0)
