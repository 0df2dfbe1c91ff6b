import pytest
import torch
from torch.nn import functional as F

from lightning_kd import losses
from lightning_kd.functional import stfpm


def test_it_is_one_minus_the_cosine():
    s, t = torch.randn(3, 5, 4, 6), torch.randn(3, 5, 4, 6)
    torch.testing.assert_close(losses.STFPM()(s, t), (1 - F.cosine_similarity(s, t, dim=1)).mean())


def test_at_opposite_directions_it_is_two():
    t = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(stfpm(-0.1 * t, t), torch.tensor(2.0))
    torch.testing.assert_close(stfpm(7.0 * t, t), torch.tensor(0.0), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_anomalib_has_it_times_the_batch():
    theirs = pytest.importorskip("anomalib.models.image.stfpm.loss").STFPMLoss()
    s, t = torch.randn(3, 5, 4, 6), torch.randn(3, 5, 4, 6)
    torch.testing.assert_close(theirs({"x": t}, {"x": s}), 3 * stfpm(s, t))


def test_a_mask_is_the_loss_of_the_pixels_inside():
    s, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, 2:7, 1:5] = True
    torch.testing.assert_close(stfpm(s, t, mask), stfpm(s[:, :, 2:7, 1:5], t[:, :, 2:7, 1:5]))


def test_dead_positions_have_no_gradient():
    s, t = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
    s[..., 0, 0] = 0.0
    s.requires_grad_()
    stfpm(s, t).backward()
    assert not s.grad[..., 0, 0].any()
    assert s.grad[..., 1, 1].any()


def test_gradient_by_finite_differences():
    s, t = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 3, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: stfpm(x, t), (s.requires_grad_(),))
