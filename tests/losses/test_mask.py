import pytest
import torch
import torch.nn.functional as F

from lightning_kd import losses
from lightning_kd.functional import at, fitnet, kd
from lightning_kd.losses._mask import resized


@pytest.mark.parametrize("size", [(8, 12), (4, 6), (3, 5), (1, 1), (16, 24), (11, 7)])
def test_nearest_as_torch_has_it(size: tuple[int, int]):
    labels = torch.randint(200, (2, 8, 12))
    expected = F.interpolate(labels[:, None].double(), size, mode="nearest-exact")[:, 0].long()
    torch.testing.assert_close(resized(labels, size), expected, rtol=0, atol=0)
    assert resized(labels > 99, size).dtype == torch.bool


@pytest.mark.parametrize("function", [kd, fitnet, at])
def test_a_mask_is_the_loss_of_the_pixels_inside(function):
    """A rectangle, cut out, is what the mask leaves."""
    s, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, 2:7, 1:5] = True
    torch.testing.assert_close(function(s, t, mask=mask), function(s[:, :, 2:7, 1:5], t[:, :, 2:7, 1:5]))


def test_the_paper_s_norm_is_over_the_images_that_count():
    s, t = torch.randn(4, 3, 5, 6), torch.randn(4, 7, 5, 6)
    mask = torch.ones(4, 5, 6, dtype=torch.bool)
    mask[2:] = False
    torch.testing.assert_close(at(s, t, squared=False, mask=mask), at(s[:2], t[:2], squared=False))


@pytest.mark.parametrize("arguments", [{"divergence": "reverse"}, {"divergence": "jsd"}, {"activation": "sigmoid"}])
def test_each_divergence_of_rows(arguments: dict[str, str]):
    s, t, mask = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.rand(2, 8, 8) < 0.5
    rows = [x.movedim(1, -1)[mask] for x in (s, t)]
    torch.testing.assert_close(kd(s, t, mask=mask, **arguments), kd(*rows, **arguments))
    last = kd(s.movedim(1, -1), t.movedim(1, -1), dim=-1, mask=mask, **arguments)
    torch.testing.assert_close(last, kd(*rows, **arguments))


def test_a_temperature_for_each_sample():
    s, t, mask = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.rand(2, 4, 4) < 0.5
    loss = losses.SampleTemperature(losses.KD())
    rows = [x.movedim(1, -1)[mask] for x in (s, t)]
    torch.testing.assert_close(loss(s, t, mask=mask), loss(*rows))
    of_rows = loss.values["mean_temperature"]
    loss(s, t, mask=mask)
    torch.testing.assert_close(loss.values["mean_temperature"], of_rows)


def test_ignored_labels_are_not_in_the_gap():
    s, t, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    y[:, 1:3] = 255
    mask = y != 255
    loss = losses.DTS(losses.Pixelwise(losses.DKD()))
    value = loss(s, t, y, mask)
    gap = loss.values["gap"]
    expected = F.cross_entropy(s, y, ignore_index=255) - F.cross_entropy(t, y, ignore_index=255)
    torch.testing.assert_close(gap, expected)
    rows = [x.movedim(1, -1)[mask] for x in (s, t)]
    torch.testing.assert_close(value, losses.DTS(losses.DKD())(*rows, y[mask]))
    assert loss.loss.temperature == losses.DKD().temperature
    with pytest.raises(ValueError, match=r"must be in \[0, 3\).*by a mask"):
        loss(s, t, y)


def test_vectors_have_no_pixels():
    """A classification head beside the segmentation gets the same labels."""
    s, t, mask = torch.randn(4, 3), torch.randn(4, 3), torch.zeros(4, 8, 8, dtype=torch.bool)
    for loss in (losses.KD(), losses.FitNet(), losses.Standardized(losses.KD())):
        torch.testing.assert_close(loss(s, t, mask=mask), loss(s, t), rtol=0, atol=0)
    torch.testing.assert_close(
        losses.Standardized(losses.DKD())(s, t, torch.arange(4) % 3, mask),
        losses.Standardized(losses.DKD())(s, t, torch.arange(4) % 3),
    )


def test_tokens_are_refused():
    s, t, mask = torch.randn(4, 16, 3), torch.randn(4, 16, 3), torch.zeros(4, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"for maps \(B, C, H, W\), and this is \(4, 16, 3\).*TokensToMap"):
        losses.FitNet()(s, t, mask=mask)


def test_gradients_by_finite_differences():
    s, t = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 3, 2, 2, dtype=torch.float64)
    mask = torch.tensor([[[True, False], [True, True]], [[False, True], [False, False]]])
    for function in (kd, fitnet, at):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, t, mask=mask), (s.requires_grad_(),))
