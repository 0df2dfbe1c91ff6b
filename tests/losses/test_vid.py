import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal

from lightning_kd import losses
from lightning_kd.functional import vid


def test_against_the_normal_distribution():
    torch.manual_seed(0)
    mean, teacher, rho = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5), torch.randn(3)
    scale = (F.softplus(rho) + 1e-5).sqrt().reshape(1, 3, 1, 1)
    expected = -Normal(mean, scale).log_prob(teacher).mean() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(vid(mean, teacher, rho), expected)


def test_starts_at_the_given_variance():
    loss = losses.VID(variance=0.3)
    loss.build(torch.zeros(2, 4), torch.zeros(2, 6))
    torch.testing.assert_close(F.softplus(loss.rho) + 1e-5, torch.full((6,), 0.3))


@pytest.mark.parametrize("variance", [0.0, 1e-5, float("inf"), float("nan"), "5", None])
def test_a_variance_that_is_none(variance):
    with pytest.raises(ValueError, match="variance must be finite and above"):
        losses.VID(variance=variance)


def test_a_dimension_that_is_not_there():
    with pytest.raises(ValueError, match=r"channels in dimension 99, got student \(2, 4\) and teacher \(2, 6\)"):
        losses.VID(dim=99).build(torch.zeros(2, 4), torch.zeros(2, 6))


def test_variance_learns_the_error():
    """The likelihood is stationary where the variance is the mean squared error of the channel."""
    torch.manual_seed(0)
    mean, teacher = torch.randn(64, 3), torch.randn(64, 3) * torch.tensor([1.0, 2.0, 5.0])
    error = (mean - teacher).square().mean(0)
    rho = torch.log(torch.expm1(error - 1e-5)).requires_grad_()
    vid(mean, teacher, rho).backward()
    torch.testing.assert_close(rho.grad, torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("student", "teacher", "dim"),
    [
        ((2, 4), (2, 6), 1),
        ((2, 4, 8, 8), (2, 6, 4, 4), 1),
        ((2, 4, 4, 8), (2, 6, 8, 4), 1),
        ((2, 9, 4), (2, 9, 6), -1),
    ],
)
def test_vectors_maps_and_tokens(student: tuple[int, ...], teacher: tuple[int, ...], dim: int):
    s, t = torch.randn(student), torch.randn(teacher)
    loss = losses.VID(dim=dim)
    loss.build(s, t)
    loss(s, t).backward()
    assert all(p.grad is not None for p in loss.parameters())


def test_different_token_counts_are_refused():
    s, t = torch.randn(2, 9, 4), torch.randn(2, 16, 6)
    loss = losses.VID(dim=-1)
    loss.build(s, t)
    with pytest.raises(ValueError, match=r"\(2, 9, 6\) and teacher \(2, 16, 6\)"):
        loss(s, t)


def test_bfloat16_weights():
    """Lightning's "bf16-true" casts every module that it finds, this one with them."""
    s, t = torch.randn(2, 4, 3, 3), torch.randn(2, 6, 3, 3)
    loss = losses.VID()
    loss.build(s, t)
    assert loss.bfloat16()(s.bfloat16(), t.bfloat16()).dtype == torch.float32
