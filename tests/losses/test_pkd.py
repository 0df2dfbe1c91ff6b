import pytest
import torch

from lightning_kd import losses
from lightning_kd.functional import pkd


def _correlation(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The mean over the channels, by torch.corrcoef."""
    pairs = zip(s.movedim(1, 0).flatten(1), t.movedim(1, 0).flatten(1), strict=True)
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean()


def test_identity_with_pearson_s_correlation():
    s, t = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 6)
    n = 2 * 5 * 6
    torch.testing.assert_close(losses.PKD()(s, t), (n - 1) / n * (1 - _correlation(s, t)))


def test_a_mask_is_the_loss_of_the_pixels_inside():
    s, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, 2:7, 1:5] = True
    torch.testing.assert_close(pkd(s, t, mask), pkd(s[:, :, 2:7, 1:5], t[:, :, 2:7, 1:5]))


def test_free_of_each_channels_scale_and_offset():
    s, t = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 6)
    scale, offset = torch.rand(3, 1, 1) + 0.1, 10 * torch.randn(3, 1, 1)
    torch.testing.assert_close(pkd(scale * s + offset, t), pkd(s, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pkd(-t, t), torch.tensor(2 * 59 / 60))


def test_a_constant_channel_has_no_gradient():
    s, t = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 6)
    s[:, 1] = 0.1
    s.requires_grad_()
    pkd(s, t).backward()
    assert not s.grad[:, 1].any()
    assert s.grad[:, 0].any()


def test_gradient_by_finite_differences():
    s, t = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 3, 2, 2, dtype=torch.float64)
    mask = torch.tensor([[[True, False], [True, True]], [[False, True], [False, False]]])
    for which in (None, mask):
        assert torch.autograd.gradcheck(lambda x, m=which: pkd(x, t, m), (s.requires_grad_(),))


def test_the_smallest_level_of_a_pyramid_may_be_one_pixel():
    x = torch.randn(4, 3, 1, 1)
    assert pkd(x, x.flip(0)) > 0
    with pytest.raises(ValueError, match="correlation over one position is undefined"):
        pkd(x[:1], x[:1])
