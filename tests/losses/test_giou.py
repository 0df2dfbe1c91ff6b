import pytest
import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from lightning_kd import functional, losses
from lightning_kd.models import mmcv_ext


def decoded(logits: Tensor) -> Tensor:
    """The boxes of mmdet's head: expected distances around each point."""
    mmcv_ext.install()
    from mmdet.models.dense_heads.gfl_head import Integral  # noqa: PLC0415
    from mmdet.structures.bbox import distance2bbox  # noqa: PLC0415

    batch, channels, height, width = logits.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    points = torch.stack((x, y), -1).reshape(-1, 2).repeat(batch, 1) + 0.5
    flat = logits.permute(0, 2, 3, 1).reshape(-1, channels)
    return distance2bbox(points, Integral(channels // 4 - 1)(flat))


def test_against_the_boxes_of_mmdet_and_torchvisions_loss() -> None:
    torch.manual_seed(0)
    s, t = 3 * torch.randn(2, 68, 3, 5), 3 * torch.randn(2, 68, 3, 5)
    expected = generalized_box_iou_loss(decoded(s), decoded(t)).reshape(2, 3, 5)
    torch.testing.assert_close(losses.GIoU()(s, t), expected.mean())
    regions = torch.rand(2, 3, 5)
    weighted = (regions * expected).sum() / regions.sum()
    torch.testing.assert_close(losses.GIoU()(s, t, regions=regions), weighted)
    right = [torch.tensor([[0.4, 0.0, 1.0, 1.0]])] * 2  # centres are at 0.1, 0.3, 0.5, ...
    torch.testing.assert_close(losses.GIoU()(s, t, right), expected[:, :, 2:].mean())


def test_boxes_without_an_area_are_equal() -> None:
    """Whoever is sure that all four edges are at the point itself has a box of no area."""
    point = torch.zeros(1, 8, 1, 1)
    point[:, ::2] = 200.0
    s = point.clone().requires_grad_()
    loss = losses.GIoU(bins=2)(s, point)
    loss.backward()
    assert loss == 0
    assert torch.isfinite(s.grad).all()


def test_gradient_by_finite_differences() -> None:
    torch.manual_seed(0)
    s, t = (torch.randn(1, 16, 2, 2, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: functional.giou(x, t, bins=4), s.requires_grad_())


def test_what_it_refuses() -> None:
    four_numbers = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match=r"got 4 channels and bins=17.*FitNet"):
        losses.GIoU()(four_numbers, four_numbers)
