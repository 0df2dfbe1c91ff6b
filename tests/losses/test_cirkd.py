import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from lightning_kd import losses
from lightning_kd.functional import cirkd


def _loops(s: list[torch.Tensor], t: list[torch.Tensor], temperature: float) -> torch.Tensor:
    """Every pair of images by itself, as lists of pixels (P, C)."""
    s, t = ([F.normalize(x, dim=1) for x in side] for side in (s, t))
    return torch.cat(
        [
            kl_divergence(Categorical(logits=ti @ tj.T / temperature), Categorical(logits=si @ sj.T / temperature))
            for si, ti in zip(s, t, strict=True)
            for sj, tj in zip(s, t, strict=True)
        ]
    ).mean()


def test_every_pair_of_images():
    s, t = torch.randn(3, 4, 2, 5), torch.randn(3, 6, 2, 5)
    expected = _loops(*([*x.flatten(2).transpose(1, 2)] for x in (s, t)), 0.1)
    torch.testing.assert_close(losses.CIRKD()(s, t), expected)


def test_a_mask_is_the_pixels_that_count():
    s, t, mask = torch.randn(4, 4, 2, 5), torch.randn(4, 6, 2, 5), torch.rand(4, 2, 5) < 0.5
    mask[2] = False
    pixels = ([x[i].permute(1, 2, 0)[mask[i]] for i in (0, 1, 3)] for x in (s, t))
    torch.testing.assert_close(cirkd(s, t, 0.3, mask=mask), _loops(*pixels, 0.3))


def test_patches():
    s, t = torch.randn(2, 4, 4, 6), torch.randn(2, 6, 4, 6)
    torch.testing.assert_close(cirkd(s, t, patch=2), cirkd(F.avg_pool2d(s, 2), F.avg_pool2d(t, 2)))


def test_free_of_scale_and_rotation():
    s, t = torch.randn(2, 3, 5, 6), torch.randn(2, 4, 5, 6)
    turn, _ = torch.linalg.qr(torch.randn(3, 3))
    turned = 7.0 * torch.einsum("dc,bchw->bdhw", turn, s)
    torch.testing.assert_close(cirkd(turned, t), cirkd(s, t), rtol=1e-4, atol=1e-5)


def test_gradient_by_finite_differences():
    s, t = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 2, 2, 2, dtype=torch.float64)
    mask = torch.tensor([[[True, False], [True, True]], [[False, True], [True, False]]])
    for which in (None, mask):
        assert torch.autograd.gradcheck(lambda x, m=which: cirkd(x, t, 0.5, mask=m), (s.requires_grad_(),))


def test_one_node_is_refused():
    x = torch.randn(2, 3, 1, 1)
    with pytest.raises(ValueError, match=r"make one node.*silently zero"):
        losses.CIRKD()(x, x)
