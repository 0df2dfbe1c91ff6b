import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from lightning_kd import losses
from lightning_kd.functional import cwd


def test_is_the_divergence_of_each_channels_categorical():
    s, t = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 6)
    student, teacher = (Categorical(logits=x.flatten(2) / 3.0) for x in (s, t))
    torch.testing.assert_close(cwd(s, t, 3.0), 9.0 * kl_divergence(teacher, student).mean())


def test_identity_with_kl_div_on_the_channels_as_rows():
    s, t = torch.randn(4, 3, 5, 6), torch.randn(4, 3, 5, 6)
    expected = F.kl_div(s.view(12, 30).log_softmax(1), t.view(12, 30).softmax(1), reduction="batchmean")
    torch.testing.assert_close(losses.CWD()(s, t), expected)


def test_a_mask_is_the_loss_of_the_pixels_inside():
    """A rectangle, cut out, is what the mask leaves."""
    s, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, 2:7, 1:5] = True
    torch.testing.assert_close(cwd(s, t, 2.0, mask), cwd(s[:, :, 2:7, 1:5], t[:, :, 2:7, 1:5], 2.0))


def test_images_of_which_nothing_counts_are_not_in_the_mean():
    s, t = torch.randn(4, 3, 5, 6), torch.randn(4, 3, 5, 6)
    mask = torch.ones(4, 5, 6, dtype=torch.bool)
    mask[2:] = False
    torch.testing.assert_close(cwd(s, t, mask=mask), cwd(s[:2], t[:2]))


def test_free_of_an_offset_for_each_channel():
    s, t = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 6)
    torch.testing.assert_close(cwd(s + torch.randn(2, 3, 1, 1), t + torch.randn(2, 3, 1, 1)), cwd(s, t))


def test_gradient_by_finite_differences():
    s, t = torch.randn(2, 3, 2, 3, dtype=torch.float64), torch.randn(2, 3, 2, 3, dtype=torch.float64)
    mask = torch.tensor([[[True, True, False], [True, False, True]], [[True] * 3] * 2])
    for which in (None, mask):
        assert torch.autograd.gradcheck(lambda x, m=which: cwd(x, t, 2.0, m), (s.requires_grad_(),))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"must have the same shape.*projector"):
        losses.CWD()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"must be maps \(B, C, H, W\).*TokensToMap"):
        losses.CWD()(torch.zeros(2, 9, 4), torch.zeros(2, 9, 4))
    with pytest.raises(ValueError, match=r"fewer than 2 positions.*silently zero"):
        losses.CWD()(torch.zeros(2, 9, 1, 1), torch.zeros(2, 9, 1, 1))
