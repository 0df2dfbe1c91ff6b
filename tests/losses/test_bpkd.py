import pytest
import torch
from scipy import ndimage

from lightning_kd import losses
from lightning_kd.functional import bpkd, cwd, kd
from lightning_kd.losses.bpkd import edge_band


def _blobs() -> torch.Tensor:
    """Labels with edges, bodies, and a class of one pixel."""
    labels = torch.zeros(2, 16, 16, dtype=torch.int64)
    labels[0, :, 9:] = 3
    labels[0, 12:, 2:5] = 1
    labels[1, 4:9, 4:9] = 2
    labels[1, 14, 14] = 4
    return labels


@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_band_is_dilated_without_eroded(width: int):
    """By scipy's morphology, class by class."""
    labels = _blobs()
    square = torch.ones(2 * width + 1, 2 * width + 1).numpy()
    for image, band in zip(labels, edge_band(labels, width), strict=True):
        expected = torch.zeros(16, 16, dtype=torch.bool)
        for label in image.unique():
            area = (image == label).numpy()
            dilated = ndimage.binary_dilation(area, square)
            eroded = ndimage.binary_erosion(area, square, border_value=1)
            expected |= torch.from_numpy(dilated & ~eroded)
        assert torch.equal(band, expected)


def test_what_does_not_count_has_no_edges():
    labels = _blobs()
    labels[0] = 0
    labels[0, :, 9:] = 255
    band = edge_band(labels, 2, labels != 255)
    assert not band[0].any()
    assert band[1].any()


def test_one_area_is_channel_wise_alone():
    s, t, labels = torch.randn(2, 5, 16, 16), torch.randn(2, 5, 16, 16), torch.ones(2, 16, 16, dtype=torch.int64)
    torch.testing.assert_close(bpkd(s, t, labels, edge=7.0, body=3.0), 3.0 * cwd(s, t))


def test_a_chequerboard_is_pixel_wise_alone():
    s, t = torch.randn(2, 5, 16, 16), torch.randn(2, 5, 16, 16)
    labels = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).expand(2, 16, 16)
    torch.testing.assert_close(bpkd(s, t, labels, edge=7.0, temperature=2.0), 7.0 * kd(s, t, 2.0))


def test_the_two_parts_share_the_pixels():
    s, t, labels = torch.randn(2, 5, 16, 16), torch.randn(2, 5, 16, 16), _blobs()
    s.requires_grad_()
    reached = []
    for weights in ({"edge": 1.0, "body": 0.0}, {"edge": 0.0, "body": 1.0}):
        (gradient,) = torch.autograd.grad(bpkd(s, t, labels, **weights), s)
        reached.append(gradient.abs().sum(1) > 0)
    assert torch.equal(reached[0], edge_band(labels, 2))
    assert torch.equal(reached[1], ~reached[0])


def test_labels_of_another_resolution():
    s, t, labels = torch.randn(2, 5, 16, 16), torch.randn(2, 5, 16, 16), _blobs()
    fine = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(bpkd(s, t, fine), bpkd(s, t, labels))


def test_gradient_by_finite_differences():
    s, t = torch.randn(1, 3, 4, 4, dtype=torch.float64), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1]).expand(1, 4, 4)
    assert torch.autograd.gradcheck(losses.BPKD(width=1), (s.requires_grad_(), t, labels, labels.bool() | True))


def test_labels_are_checked():
    s = torch.randn(2, 5, 16, 16)
    with pytest.raises(ValueError, match="integer class indices"):
        bpkd(s, s, torch.rand(2, 16, 16))
    with pytest.raises(ValueError, match=r"must have shape \(2, 16, 16\)"):
        bpkd(s, s, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="width must be a positive"):
        losses.BPKD(width=0)
