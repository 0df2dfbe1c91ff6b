import pytest
import torch

from lightning_kd import losses
from lightning_kd.functional import cwd, dist, fitnet, kd

LOSSES = [losses.KD(), losses.KD(dim=-1), losses.FitNet(), losses.DIST(), losses.RKD(), losses.BDKD(), losses.SP()]
LOSSES += [losses.Standardized(losses.KD()), losses.SampleTemperature(losses.KD()), torch.nn.L1Loss()]


@pytest.fixture
def bins() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(3, 5, 12), torch.randn(3, 5, 12), torch.rand(3, 5) < 0.6


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_is_the_loss_of_the_rows(loss: torch.nn.Module, bins):
    s, t, joints = bins
    torch.testing.assert_close(losses.Jointwise(loss)(s, t, joints), loss(s[joints], t[joints]))
    torch.testing.assert_close(losses.Jointwise(loss)(s, t), loss(s.flatten(0, 1), t.flatten(0, 1)))
    maps = [x.unflatten(2, (3, 4)) for x in (s, t)]
    torch.testing.assert_close(losses.Jointwise(loss)(*maps, joints), loss(s[joints], t[joints]))


def test_both_axes_are_the_logit_term_of_dwpose(bins):
    """Its code: the sum over bins, the sum over joints, the mean over the batch, divided by the number of joints."""
    s, t, _ = bins
    log_s, t_i = s.reshape(15, 12).log_softmax(1), t.reshape(15, 12).softmax(1)
    summed = torch.nn.KLDivLoss(reduction="none")(log_s, t_i).sum(1).reshape(3, 5).sum(1).mean()
    torch.testing.assert_close(losses.Jointwise(losses.KD(temperature=1.0))(s, t), summed / 5)


def test_on_heatmaps_kd_is_cwd_and_fitnet_the_squared_error():
    s, t = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    torch.testing.assert_close(losses.Jointwise(losses.KD(temperature=3.0))(s, t), cwd(s, t, temperature=3.0))
    torch.testing.assert_close(losses.Jointwise(losses.FitNet())(s, t), fitnet(s, t))


@pytest.mark.parametrize("loss", [losses.KD(), losses.FitNet(), losses.DIST()], ids=lambda loss: type(loss).__name__)
def test_joints_that_do_not_count_have_no_influence(loss: torch.nn.Module, bins):
    s, t, joints = bins
    s.requires_grad_()
    value = losses.Jointwise(loss)(s, t, joints)
    (gradient,) = torch.autograd.grad(value, s)
    assert (gradient.abs().sum(-1) > 0).equal(joints)
    for junk in (9.0, torch.nan):
        again = [x.detach().where(joints.unsqueeze(-1), junk) for x in (s, t)]
        torch.testing.assert_close(losses.Jointwise(loss)(*again, joints), value)


@pytest.mark.parametrize("loss", [losses.KD(), losses.FitNet(), losses.DIST()], ids=lambda loss: type(loss).__name__)
def test_no_joint_is_zero(loss: torch.nn.Module, bins):
    s, t, joints = bins
    value = losses.Jointwise(loss)(s.requires_grad_(), t, torch.zeros_like(joints))
    value.backward()
    assert value == 0
    assert not s.grad.any()


def test_the_temperature_is_that_of_the_loss(bins):
    loss = losses.Jointwise(losses.KD())
    loss.temperature = 2.0
    s, t, joints = bins
    torch.testing.assert_close(loss(s, t, joints), kd(s[joints], t[joints], temperature=2.0))
    assert not hasattr(losses.Jointwise(losses.RKD()), "temperature")
    inside = losses.Jointwise(losses.SampleTemperature(losses.KD()))
    inside(s, t, joints)
    assert set(inside.values) == {"mean_temperature"}


def test_what_it_cannot_do_is_refused(bins):
    s, t, joints = bins
    for loss in (losses.VID(), losses.DKD()):
        with pytest.raises(ValueError, match="Jointwise wraps losses that do neither"):
            losses.Jointwise(loss)
    loss = losses.Jointwise(losses.KD())
    for wrong in (joints.float(), joints[:2], joints[:, :2], joints.unsqueeze(-1)):
        with pytest.raises(ValueError, match=r"joints are bool \(3, 5\).*visible > 0"):
            loss(s, t, wrong)
    with pytest.raises(ValueError, match="with the same joints K"):
        loss(s, t[:, :4])
    with pytest.raises(ValueError, match="with the same joints K"):
        loss(s[0], t[0])
    with pytest.raises(ValueError, match="must have the same shape"):
        loss(s, t[..., :6])


def test_dist_is_over_all_joints_that_count(bins):
    s, t, joints = bins
    torch.testing.assert_close(losses.Jointwise(losses.DIST())(s, t, joints), dist(s[joints], t[joints]))
