import pytest
import torch
import torch.nn.functional as F

from lightning_kd import losses
from lightning_kd.functional import ifvd


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.randint(3, (2, 5, 6))
    labels[0, 0] = 255
    return torch.randn(2, 4, 5, 6), torch.randn(2, 7, 5, 6), labels


def test_cosines_with_the_mean_of_the_class_by_loops():
    s, t, y = _inputs()
    variations = []
    for x in (s, t):
        of_pixels = []
        for image, label in zip(x, y, strict=True):
            for row, column in (label != 255).nonzero().tolist():
                mean = image[:, label == label[row, column]].mean(1)
                of_pixels.append(F.cosine_similarity(image[:, row, column], mean, dim=0))
        variations.append(torch.stack(of_pixels))
    torch.testing.assert_close(ifvd(s, t, y, 3, y != 255), F.mse_loss(*variations))


def test_one_class_without_variation_is_zero():
    """All pixels of a class alike on both sides, whatever the feature is."""
    y = torch.randint(3, (2, 5, 6))
    s, t = torch.randn(3, 4)[y].movedim(-1, 1), torch.randn(3, 7)[y].movedim(-1, 1)
    torch.testing.assert_close(ifvd(s, t, y, 3), torch.tensor(0.0), atol=1e-10, rtol=0)


def test_free_of_scale_and_rotation():
    s, t, y = _inputs()
    turn, _ = torch.linalg.qr(torch.randn(4, 4))
    turned = 7.0 * torch.einsum("dc,bchw->bdhw", turn, s)
    torch.testing.assert_close(ifvd(turned, t, y, 3, y != 255), ifvd(s, t, y, 3, y != 255))


def test_labels_of_another_resolution():
    s, t, y = _inputs()
    fine = y.repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(ifvd(s, t, fine, 3, fine != 255), ifvd(s, t, y, 3, y != 255))


def test_gradient_by_finite_differences():
    s, t = torch.randn(1, 3, 2, 3, dtype=torch.float64), torch.randn(1, 4, 2, 3, dtype=torch.float64)
    y = torch.tensor([[[0, 0, 1], [1, 0, 1]]])
    assert torch.autograd.gradcheck(lambda x: ifvd(x, t, y, 2, y.bool() | (t[:, 0] > 0)), (s.requires_grad_(),))


def test_what_is_wrong_is_refused():
    s, t, y = _inputs()
    with pytest.raises(ValueError, match=r"must be in \[0, 3\).*by a mask"):
        losses.IFVD(3)(s, t, y)
    with pytest.raises(ValueError, match="integer class indices"):
        losses.IFVD(3)(s, t, y.float())
    with pytest.raises(ValueError, match="must be maps"):
        losses.IFVD(3)(s, t[:, :, :2], y)
    with pytest.raises(ValueError, match="num_classes must be a positive"):
        losses.IFVD(0)
