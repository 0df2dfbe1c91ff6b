import pytest
import torch
import torch.nn.functional as F

from lightning_kd import losses
from lightning_kd.functional import skd


def _frobenius(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """||S^T S - T^T T||^2 by matrices of channels, not of pairs."""
    s, t = (F.normalize(x.flatten(2), dim=1) for x in (s, t))
    return sum(
        sign * (a @ b.transpose(1, 2)).square().sum((1, 2)) for sign, a, b in ((1, s, s), (-2, s, t), (1, t, t))
    ).mean() / (s.shape[2] ** 2)


def test_identity_of_the_pairs_with_the_channels():
    s, t = torch.randn(2, 3, 5, 6), torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(skd(s, t, patch=1), _frobenius(s, t))


@pytest.mark.parametrize(("pool", "function"), [("average", F.avg_pool2d), ("max", F.max_pool2d)])
@pytest.mark.parametrize("patch", [2, 3, 4])
def test_nodes_are_patches(pool: str, function, patch: int):
    s, t = torch.randn(2, 3, 8, 6), torch.randn(2, 4, 8, 6)
    expected = _frobenius(*(function(x, patch, ceil_mode=True) for x in (s, t)))
    torch.testing.assert_close(losses.SKD(patch, pool)(s, t), expected)


@pytest.mark.parametrize("pool", ["average", "max"])
def test_a_mask_is_the_loss_of_the_pixels_inside(pool: str):
    s, t = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 4:8] = True
    torch.testing.assert_close(skd(s, t, 2, pool, mask), skd(s[:, :, 2:6, 4:8], t[:, :, 2:6, 4:8], 2, pool))
    mask[:, 2:6, 2:4] = torch.tensor([True, False]).repeat(2)[:, None] & torch.tensor([True, False])
    s[:, :, 3, 2:4] = s[:, :, 5, 2:4] = s[:, :, 2:6, 3] = 1e4  # do not count
    one, few = skd(s, t, 2, pool, mask), s.clone()
    few[:, :, 3, 2:4] = few[:, :, 5, 2:4] = few[:, :, 2:6, 3] = -1e4
    torch.testing.assert_close(skd(few, t, 2, pool, mask), one, rtol=0, atol=0)


def test_free_of_scale_and_rotation():
    s, t = torch.randn(2, 3, 5, 6), torch.randn(2, 4, 5, 6)
    turn, _ = torch.linalg.qr(torch.randn(3, 3))
    turned = 7.0 * torch.einsum("dc,bchw->bdhw", turn, s)
    torch.testing.assert_close(skd(turned, t), skd(s, t))


@pytest.mark.parametrize("pool", ["average", "max"])
def test_gradient_by_finite_differences(pool: str):
    s, t = torch.randn(1, 3, 3, 4, dtype=torch.float64), torch.randn(1, 2, 3, 4, dtype=torch.float64)
    mask = torch.ones(1, 3, 4, dtype=torch.bool)
    mask[0, 0, :3] = False
    for which in (None, mask):
        assert torch.autograd.gradcheck(lambda x, m=which: skd(x, t, 2, pool, m), (s.requires_grad_(),))


def test_what_is_wrong_is_refused():
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"make one node.*silently zero"):
        losses.SKD(patch=4)(x, x)
    with pytest.raises(ValueError, match="pool must be 'average' or 'max'"):
        losses.SKD(pool="mean")
    with pytest.raises(ValueError, match="patch must be a positive"):
        losses.SKD(patch=0)
