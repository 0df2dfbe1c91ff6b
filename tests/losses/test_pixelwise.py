import pytest
import torch

from lightning_kd import losses
from lightning_kd.functional import dist, dkd

LOSSES = [losses.DKD(), losses.DIST(), losses.NKD(), losses.PLD(), losses.OFA(), losses.BDKD(), losses.KD()]
LOSSES += [losses.Standardized(losses.DKD()), losses.SampleTemperature(losses.DKD()), losses.DTS(losses.DKD())]


@pytest.fixture
def maps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.randint(5, (2, 4, 6))
    labels[0, 1] = 255
    return torch.randn(2, 5, 4, 6), torch.randn(2, 5, 4, 6), labels


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_is_the_loss_of_the_rows(loss: torch.nn.Module, maps):
    s, t, y = maps
    mask = y != 255
    labels = (y[mask],) if losses.Pixelwise(loss).takes_target else ()
    expected = loss(*(x.permute(0, 2, 3, 1)[mask] for x in (s, t)), *labels)
    torch.testing.assert_close(losses.Pixelwise(loss)(s, t, y, mask), expected)


def test_labels_and_mask_of_another_resolution(maps):
    s, t, y = maps
    fine = y.repeat_interleave(4, 1).repeat_interleave(2, 2)
    loss = losses.Pixelwise(losses.DKD())
    torch.testing.assert_close(loss(s, t, fine, fine != 255), loss(s, t, y, y != 255))


def test_channels_may_differ(maps):
    s, t, _ = maps
    rows = s.permute(0, 2, 3, 1).flatten(0, 2), t[:, :3].permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(losses.Pixelwise(losses.SP())(s, t[:, :3]), losses.SP()(*rows))


def test_samples_are_pixels_that_count(maps):
    s, t, y = maps
    mask = y != 255
    s[0, :, 1], t[0, :, 1] = torch.nan, torch.nan
    s.requires_grad_()
    loss = losses.Pixelwise(losses.DKD(), samples=7)
    loss(s, t, y, mask).backward()
    touched = s.grad.abs().sum(1) > 0
    assert touched.sum() == 7
    assert not (touched & ~mask).any()


def test_samples_are_drawn_from_the_global_generator(maps):
    s, t, y = maps
    y = y % 5
    loss = losses.Pixelwise(losses.DKD(), samples=7)
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(loss(s, t, y))
    assert values[0] == values[1] != values[2]


def test_samples_are_an_unbiased_estimate(maps):
    s, t, y = maps
    mask = y != 255
    loss = losses.Pixelwise(losses.DKD(), samples=21)
    exact = losses.Pixelwise(losses.DKD())(s, t, y, mask)
    mean = torch.stack([loss(s, t, y, mask) for _ in range(300)]).mean()
    torch.testing.assert_close(mean, exact, rtol=0.05, atol=0)


def test_few_pixels_are_taken_in_turns(maps):
    s, t, y = maps
    mask = torch.zeros_like(y, dtype=torch.bool)
    mask[1, 2, 2:5] = True
    rows = [x.permute(0, 2, 3, 1)[mask] for x in (s, t)]
    torch.testing.assert_close(losses.Pixelwise(losses.DKD(), samples=9)(s, t, y, mask), dkd(*rows, y[mask]))
    nothing = torch.zeros_like(mask)
    s.requires_grad_()
    value = losses.Pixelwise(losses.DKD(), samples=9)(s, t, y, nothing)
    value.backward()
    assert value == 0
    assert not s.grad.any()


def test_more_samples_than_pixels_are_all(maps):
    s, t, _ = maps
    torch.testing.assert_close(losses.Pixelwise(losses.DIST(), samples=999)(s, t), dist(s, t))


def test_no_graph_break_with_samples_and_a_mask(maps):
    """What waits for the device breaks the graph."""
    s, t, y = maps
    loss = torch.compile(losses.Pixelwise(losses.DKD(), samples=7), backend="eager", fullgraph=True)
    assert loss(s, t, y, y != 255).isfinite()


def test_the_temperature_is_that_of_the_loss():
    loss = losses.Pixelwise(losses.DKD())
    loss.temperature = 2.0
    assert loss.loss.temperature == 2.0
    assert not hasattr(losses.Pixelwise(losses.PLD()), "temperature")
    with pytest.raises(ValueError, match="takes one temperature for all samples"):
        losses.SampleTemperature(loss)


def test_maps_of_other_resolutions_are_aligned_inside_of_other_wrappers_too():
    assert losses.Pixelwise(losses.KD()).align == "map"
    assert losses.Pixelwise(losses.FitNet()).align == "shape"
    assert losses.Pixelwise(losses.RKD()).align == "size"
    assert losses.CTKD(losses.Pixelwise(losses.KD())).align == "map"
    assert losses.Standardized(losses.KD()).align == "map"


def test_what_the_loss_says_of_itself(maps):
    loss = losses.Pixelwise(losses.SampleTemperature(losses.KD()))
    loss(maps[0], maps[1])
    assert set(loss.values) == {"mean_temperature"}


def test_what_it_cannot_do_is_refused(maps):
    s, t, y = maps
    with pytest.raises(ValueError, match="VID learns parameters"):
        losses.Pixelwise(losses.VID())
    with pytest.raises(ValueError, match="samples must be a positive"):
        losses.Pixelwise(losses.KD(), samples=0)
    with pytest.raises(ValueError, match="must be maps"):
        losses.Pixelwise(losses.KD())(s[:, :, 0, 0], t[:, :, 0, 0])
    with pytest.raises(ValueError, match="DKD needs the labels"):
        losses.Pixelwise(losses.DKD())(s, t)
    with pytest.raises(ValueError, match=r"must be in \[0, 5\)"):
        losses.Pixelwise(losses.DKD())(s, t, y)
    with pytest.raises(ValueError, match="integer class indices"):
        losses.Pixelwise(losses.DKD())(s, t, s)
