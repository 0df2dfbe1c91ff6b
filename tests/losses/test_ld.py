import pytest
import torch

from lightning_kd import functional, losses
from lightning_kd.models import mmcv_ext


def test_against_mmdet() -> None:
    """Its mean over the bins is the divergence over their number."""
    mmcv_ext.install()
    from mmdet.models.losses import KnowledgeDistillationKLDivLoss  # noqa: PLC0415

    torch.manual_seed(0)
    s, t = torch.randn(2, 68, 3, 5), 4 * torch.randn(2, 68, 3, 5)
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 17) for x in (s, t)]
    expected = 17 * KnowledgeDistillationKLDivLoss(T=10)(*flat)
    torch.testing.assert_close(losses.LD()(s, t), expected)


def test_positions_count_whose_centre_is_in_a_box() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    boxes = [torch.tensor([[0.0, 0.0, 0.5, 0.37], [0.2, 0.2, 0.3, 0.3]]), torch.zeros(0, 4)]
    # Centres are at 1/8, 3/8, ...: of the first box two columns and one row, of the second none.
    expected = functional.ld(s[:1, :, :1, :2], t[:1, :, :1, :2], bins=2)
    torch.testing.assert_close(functional.ld(s, t, boxes, bins=2), expected)


def test_regions_weigh_positions_whatever_the_boxes() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    regions = torch.zeros(1, 4, 4)
    regions[0, 1, 2], regions[0, 3, 0] = 1.0, 0.25
    one, other = (
        functional.ld(s[..., y : y + 1, x : x + 1], t[..., y : y + 1, x : x + 1], bins=2) for y, x in ((1, 2), (3, 0))
    )
    everywhere = [torch.tensor([[0.0, 0.0, 1.0, 1.0]])]
    torch.testing.assert_close(losses.LD(bins=2)(s, t, everywhere, regions), (one + other / 4) / 1.25)
    with pytest.raises(ValueError, match=r"weights \(B, H, W\) of a map's positions, \(1, 4, 4\) .* got \(1, 2, 2\)"):
        losses.LD(bins=2)(s, t, regions=regions[:, :2, :2])


def test_no_box_is_zero_and_not_nan() -> None:
    s = torch.randn(1, 8, 4, 4, requires_grad=True)
    loss = losses.LD(bins=2)(s, torch.randn(1, 8, 4, 4), [torch.zeros(0, 4)])
    loss.backward()
    assert loss == 0
    assert torch.equal(s.grad, torch.zeros_like(s))


def test_gradient_by_finite_differences() -> None:
    torch.manual_seed(0)
    s, t = (torch.randn(1, 16, 2, 2, dtype=torch.float64) for _ in range(2))
    box = [torch.tensor([[0.0, 0.0, 1.0, 0.5]])]
    assert torch.autograd.gradcheck(lambda x: losses.LD(bins=4, temperature=2.0)(x, t, box), s.requires_grad_())


def test_what_it_refuses() -> None:
    four_numbers = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match=r"got 4 channels and bins=17.*FitNet"):
        losses.LD()(four_numbers, four_numbers)
    with pytest.raises(ValueError, match=r"boxes are a list of \(n, 4\) for each of the 1 samples"):
        losses.LD(bins=1)(four_numbers, four_numbers, [torch.zeros(2, 3)])
