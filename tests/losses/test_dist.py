import numpy as np
import pytest
import torch
from torch import Tensor
from torchdistill.losses.mid_level import DISTLoss

from lightning_kd import losses
from lightning_kd.functional import dist


def _pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 2 * torch.randn(6, 5, dtype=dtype), 2 * torch.randn(6, 5, dtype=dtype)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_against_torchdistill(temperature: float):
    s, t = _pair()
    peer = DISTLoss("x", "output", "x", "output", beta=2.0, gamma=0.5, tau=temperature)
    expected = peer({"x": {"output": s}}, {"x": {"output": t}})
    torch.testing.assert_close(losses.DIST(2.0, 0.5, temperature)(s, t), expected)


def test_against_numpys_correlation():
    s, t = _pair(torch.float64)
    p_s, p_t = s.softmax(1).numpy(), t.softmax(1).numpy()
    rows = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p_s, p_t, strict=True)])
    columns = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p_s.T, p_t.T, strict=True)])
    assert dist(s, t).item() == pytest.approx(2 - rows - columns)


def test_gradient_by_finite_differences():
    s, t = _pair(torch.float64)
    assert torch.autograd.gradcheck(losses.DIST(), (s.requires_grad_(), t))


def test_uniform_student_has_a_bounded_gradient():
    """A head that starts at zero: its rows have no direction, and 1/eps must not reach the weights."""
    _, t = _pair()
    s = torch.zeros_like(t, requires_grad=True)
    dist(s, t).backward()
    assert s.grad is not None
    assert s.grad.abs().max() < 1


def test_two_classes_need_gamma():
    """Their rows correlate by 1 or -1 whatever the student says, so beta alone has no gradient."""
    s, t = (x[:, :2] for x in _pair())
    with pytest.raises(ValueError, match=r"at least 3 classes .* got 2 .* without gamma nothing is taught: use KD\(\)"):
        losses.DIST(gamma=0.0)(s, t)
    s.requires_grad_()
    losses.DIST(beta=0.0)(s, t).backward()
    assert s.grad is not None
    assert s.grad.abs().max() > 1e-2


def test_one_sample_needs_gamma_0():
    s, t = _pair()
    with pytest.raises(ValueError, match=r"at least 2 samples are needed, got 1.*drop_last"):
        losses.DIST()(s[:1], t[:1])
    assert torch.isfinite(losses.DIST(gamma=0.0)(s[:1], t[:1]))


def test_what_has_no_gradient_is_refused():
    two, three = torch.randn(2, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    with pytest.raises(ValueError, match=r"at least 3 samples are needed, got 2: .* over two it is 1 or -1"):
        losses.DIST(beta=0.0)(two, torch.randn(2, 5))
    for loss, student in ((losses.DIST(beta=0.0), three), (losses.DIST(), two), (losses.DIST(gamma=0.0), two[:1])):
        (gradient,) = torch.autograd.grad(loss(student, torch.randn(student.shape)), student)
        assert gradient.abs().max() > 1e-3
