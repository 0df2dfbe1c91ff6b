import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd import losses
from lightning_kd.functional import region_bsd


def _halves() -> tuple[Tensor, Tensor, Tensor]:
    """Two networks, of which the first knows the left half of the image and the second the right one."""
    torch.manual_seed(0)
    labels = torch.randint(3, (2, 8, 8))
    told = F.one_hot(labels, 3).movedim(-1, 1).float()
    left, right = torch.randn(2, 2, 3, 8, 8).unbind(0)
    left[..., :4], right[..., 4:] = told[..., :4], told[..., 4:]
    return left, right, labels


def test_each_region_is_taught_by_the_one_that_knows_it() -> None:
    left, right, labels = _halves()
    for learner, other, columns in ((left, right, slice(4, 8)), (right, left, slice(0, 4))):
        x = learner.clone().requires_grad_()
        loss = losses.RegionBSD(3, grid=2)(x, other, labels)
        loss.backward()
        reached = x.grad.abs().sum(1) > 0
        assert reached[..., columns].all()
        assert reached.sum() == reached[..., columns].numel()
        apart = 1 - F.cosine_similarity(learner, other, dim=1)[..., columns]
        torch.testing.assert_close(loss, apart.sum() / labels.numel())


def test_one_region_is_the_whole_map() -> None:
    left, right, labels = _halves()
    ways = [region_bsd(*pair, labels, 3, grid=1) for pair in ((left, right), (right, left))]
    whole = (1 - F.cosine_similarity(left[:1], right[:1], dim=1)).mean()
    alone = [region_bsd(*pair, labels[:1], 3, grid=1) for pair in ((left[:1], right[:1]), (right[:1], left[:1]))]
    torch.testing.assert_close(max(alone), whole)
    assert min(alone) == 0
    assert max(ways) > 0


def test_what_does_not_count_is_neither_taught_nor_asked() -> None:
    left, right, labels = _halves()
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[:, :, 6:] = False
    x = left.clone().requires_grad_()
    odd, labels[:, :, 6:] = right.clone(), 255
    odd[..., 6:] = float("nan")
    loss = region_bsd(x, odd, labels, 3, grid=2, mask=mask)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 0
    assert torch.isfinite(x.grad).all()
    assert not x.grad[..., 6:].any()


def test_gradient_by_finite_differences() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(1, 3, 4, 4, dtype=torch.float64), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    y = torch.randint(3, (1, 4, 4))
    assert torch.autograd.gradcheck(lambda x: region_bsd(x, t, y, 3, grid=2), (s.requires_grad_(),))


def test_what_is_wrong_is_refused() -> None:
    left, right, labels = _halves()
    with pytest.raises(ValueError, match=r"must be in \[0, 2\).*num_classes counts the classes"):
        losses.RegionBSD(2)(left, right, labels)
    with pytest.raises(ValueError, match="grid must be a positive whole number"):
        losses.RegionBSD(2, grid=0)
