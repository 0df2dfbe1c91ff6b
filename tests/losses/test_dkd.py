import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from lightning_kd import losses
from lightning_kd.functional import dkd, kd


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return 3 * torch.randn(5, 7, dtype=dtype), 3 * torch.randn(5, 7, dtype=dtype), torch.randint(7, (5,))


def test_parts_against_distributions():
    s, t, y = _inputs()
    keep = torch.arange(7) != y[:, None]
    probabilities = [(x / 4).softmax(1).gather(1, y[:, None]).squeeze(1) for x in (s, t)]
    tckd = kl_divergence(Bernoulli(probabilities[1]), Bernoulli(probabilities[0])).mean()
    rest = [Categorical(logits=x[keep].reshape(5, 6) / 4) for x in (s, t)]
    nckd = kl_divergence(rest[1], rest[0]).mean()
    torch.testing.assert_close(dkd(s, t, y, alpha=1.0, beta=0.0), 16 * tckd)
    torch.testing.assert_close(dkd(s, t, y, alpha=0.0, beta=1.0), 16 * nckd)
    torch.testing.assert_close(dkd(s, t, y), 16 * tckd + 8 * 16 * nckd)


def test_is_kd_with_the_teachers_non_target_mass_as_beta():
    """Zhao et al., section 3.1: KD = TCKD + (1 - p_t[y]) NCKD, sample by sample."""
    s, t, y = _inputs()
    beta = 1 - (t / 4).softmax(1).gather(1, y[:, None]).squeeze(1)
    each = [dkd(s[i : i + 1], t[i : i + 1], y[i : i + 1], 1.0, beta[i].item()) for i in range(5)]
    torch.testing.assert_close(torch.stack(each).mean(), kd(s, t))


def test_gradient_by_finite_differences():
    s, t, y = _inputs()
    assert torch.autograd.gradcheck(lambda x: losses.DKD()(x, t, y), s.requires_grad_())


def test_certain_of_the_target_is_finite_and_right():
    """At 200 the other classes' probability is 0 in float32, so the log of their sum is infinite."""
    s = torch.tensor([[200.0, -200.0, -200.0]], requires_grad=True)
    t = torch.tensor([[-200.0, 200.0, -200.0]])
    y = torch.tensor([0])
    loss = dkd(s, t, y, beta=0.0, temperature=1.0)
    assert loss.item() == pytest.approx(400.0, abs=1.0)  # KL((0, 1) || (1, 2 e^-400)) = 400 - log 2
    loss.backward()
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()
    assert s.grad[0, 0] > 0


def test_dense_logits_are_samples():
    torch.manual_seed(0)
    s, t, y = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (s, t)]
    torch.testing.assert_close(dkd(s, t, y), dkd(*flat, y.flatten()))


def test_two_classes_are_refused_with_the_remedy():
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"undefined: use KD\(\)"):
        losses.DKD()(x, x, torch.zeros(4, dtype=torch.int64))
