import pytest
import torch
from torch import nn

from lightning_kd import losses
from lightning_kd.functional import mgd


def _built(s: torch.Tensor, t: torch.Tensor, **arguments: float) -> losses.MGD:
    loss = losses.MGD(**arguments)
    loss.build(s, t)
    return loss


def test_is_alpha_times_the_squared_distance_of_each_sample():
    s, t = torch.randn(4, 3, 5, 6), torch.randn(4, 3, 5, 6)
    expected = 0.5 * torch.stack([torch.dist(a, b) ** 2 for a, b in zip(s, t, strict=True)]).mean()
    torch.testing.assert_close(mgd(s, t, alpha=0.5), expected)


def test_generates_by_two_convolutions():
    s, t = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 6)
    loss = _built(s, t)
    assert [type(layer) for layer in loss.generation] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert all(layer.weight.shape == (3, 3, 3, 3) for layer in (loss.generation[0], loss.generation[2]))


@pytest.mark.parametrize(("channels", "axes"), [(False, (2, 3)), (True, (1,))])
def test_the_share_that_is_hidden(channels: bool, axes: tuple[int, ...]):
    s, t = torch.ones(16, 16, 16, 16), torch.zeros(16, 16, 16, 16)
    loss = _built(s, t, ratio=0.65, channels=channels)
    seen = []
    loss.generation.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for _ in range(8):
        loss(s, t)
    shown = torch.cat(seen)
    assert set(shown.unique().tolist()) == {0.0, 1.0}
    others = tuple(d for d in (1, 2, 3) if d not in axes)
    assert (shown.amax(others) == shown.amin(others)).all()  # whole positions, or whole channels
    assert 0.30 < shown.mean() < 0.40
    assert not torch.equal(seen[0], seen[1])


def test_drawn_from_the_global_generator():
    s, t = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 6)
    loss = _built(s, t)
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(loss(s, t).item())
    assert values[0] == values[1] != values[2]


def test_pixels_that_do_not_count_are_not_in_the_sum():
    s, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, 2:7, 1:5] = True
    torch.testing.assert_close(mgd(s, t, mask=mask), mgd(s[:, :, 2:7, 1:5], t[:, :, 2:7, 1:5]))


def test_gradient_by_finite_differences():
    s, t = torch.randn(2, 2, 3, 3, dtype=torch.float64), torch.randn(2, 2, 3, 3, dtype=torch.float64)
    loss = _built(s, t, alpha=1.0, ratio=0.0).double()
    assert torch.autograd.gradcheck(loss, (s.requires_grad_(), t))


def test_learns_what_the_student_lacks():
    """The teacher's feature is a blur of the student's: a convolution finds it."""
    s = torch.rand(4, 2, 8, 8)
    t = nn.functional.avg_pool2d(s, 3, stride=1, padding=1)
    loss = _built(s, t, ratio=0.1)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    before = loss(s, t).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss(s, t).backward()
        optimizer.step()
    assert loss(s, t) < 0.2 * before


def test_bfloat16_weights():
    """Lightning's "bf16-true" casts every module that it finds, this one with them."""
    s, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    assert _built(s, t).bfloat16()(s.bfloat16(), t.bfloat16()).dtype == torch.float32


def test_arguments_are_checked():
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"share of the feature that is hidden, in \[0, 1\)"):
            losses.MGD(ratio=ratio)
    with pytest.raises(ValueError, match="alpha must be a positive"):
        losses.MGD(alpha=0.0)
    with pytest.raises(ValueError, match="same shape"):
        losses.MGD().build(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))
