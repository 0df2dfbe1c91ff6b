import pytest
import torch

from lightning_kd.functional import sp


def test_hand_computed():
    """Orthogonal against identical samples: rows (1, 0) against (1, 1) / sqrt(2)."""
    loss = sp(torch.eye(2), torch.ones(2, 3))
    assert loss.item() == pytest.approx(1 - 2**-0.5)


def test_free_of_rotation_and_scale():
    torch.manual_seed(0)
    s, t = torch.randn(5, 8), torch.randn(5, 6)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    torch.testing.assert_close(sp(3 * s @ rotation, t), sp(s, t))


def test_maps_are_flattened():
    torch.manual_seed(0)
    s, t = torch.randn(5, 2, 3, 3), torch.randn(5, 4, 2, 2)
    torch.testing.assert_close(sp(s, t), sp(s.flatten(1), t.flatten(1)))


def test_gradient_by_finite_differences():
    torch.manual_seed(0)
    s, t = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(sp, (s.requires_grad_(), t))


def test_a_dead_sample_has_a_bounded_gradient():
    torch.manual_seed(0)
    s = torch.randn(5, 8)
    s[2] = 0
    sp(s.requires_grad_(), torch.randn(5, 8)).backward()
    assert s.grad is not None
    assert s.grad.abs().max() < 10


@pytest.mark.parametrize("scale", [1e-15, 1e10, 1e15, 1e30])
def test_a_large_or_small_feature_is_that_of_a_common_size(scale: float):
    torch.manual_seed(0)
    s, t = torch.randn(6, 5), torch.randn(6, 5)
    found, expected = (scale * s).requires_grad_(), s.double().requires_grad_()
    for teacher in (t, scale * t):
        loss = sp(found, teacher)
        oracle = sp(expected, t.double())
        assert loss.item() == pytest.approx(oracle.item(), rel=1e-5)
        (own,), (of_oracle,) = torch.autograd.grad(loss, found), torch.autograd.grad(oracle, expected)
        torch.testing.assert_close((own.double() * scale), of_oracle, rtol=1e-4, atol=1e-6)


def test_batches_must_agree():
    with pytest.raises(ValueError, match=r"\(4, 8\) and teacher \(5, 8\)"):
        sp(torch.zeros(4, 8), torch.zeros(5, 8))
    with pytest.raises(ValueError, match="at least 2 samples are needed, got 1"):
        sp(torch.zeros(1, 8), torch.zeros(1, 8))
