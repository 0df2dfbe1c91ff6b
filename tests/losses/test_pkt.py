import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torchdistill.losses.mid_level import PKTLoss

from lightning_kd import losses
from lightning_kd.functional import pkt


def test_with_self_pairs_against_torchdistill():
    torch.manual_seed(0)
    s, t = torch.randn(6, 8), torch.randn(6, 12)
    peer = PKTLoss("x", "output", "x", "output")
    expected = peer({"x": {"output": s}}, {"x": {"output": t}})
    torch.testing.assert_close(losses.PKT(self_pairs=True)(s, t), expected, rtol=1e-4, atol=1e-9)


def test_without_self_pairs_against_categorical():
    torch.manual_seed(0)
    s, t = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 12, dtype=torch.float64)
    others = ~torch.eye(6, dtype=torch.bool)
    kernels = [
        torch.stack([torch.cosine_similarity(row, x) for row in x])[others].reshape(6, 5) / 2 + 0.5 for x in (s, t)
    ]
    expected = kl_divergence(Categorical(kernels[1]), Categorical(kernels[0])).sum() / 36
    torch.testing.assert_close(pkt(s, t), expected, rtol=1e-4, atol=0)


def test_gradient_by_finite_differences():
    torch.manual_seed(0)
    s, t = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(pkt, (s.requires_grad_(), t))


def test_opposite_samples_are_finite():
    s = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss = pkt(s, torch.eye(3))
    loss.backward()
    assert torch.isfinite(loss)
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()


def test_too_few_samples_are_refused():
    x = torch.eye(3)
    with pytest.raises(ValueError, match="at least 3 samples are needed, got 2"):
        losses.PKT()(x[:2], x[:2])
    assert torch.isfinite(losses.PKT(self_pairs=True)(x[:2], x[:2]))
