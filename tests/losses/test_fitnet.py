import pytest
import torch

from lightning_kd import losses


def test_hand_computed():
    student, teacher = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [3.0, 7.0]])
    assert losses.FitNet()(student, teacher).item() == pytest.approx((1 + 9) / 4)


def test_gradient_is_the_mean_difference():
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    losses.FitNet()(s, t).backward()
    torch.testing.assert_close(s.grad, 2 * (s - t).detach() / s.numel())


def test_a_broadcast_is_refused():
    """F.mse_loss would broadcast (2, 1, 4, 4) and train towards the wrong thing."""
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\) and teacher \(2, 8, 4, 4\).*projector"):
        losses.FitNet()(torch.zeros(2, 1, 4, 4), torch.zeros(2, 8, 4, 4))
