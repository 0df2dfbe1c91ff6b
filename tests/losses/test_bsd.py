import pytest
import torch
import torch.nn.functional as F

from lightning_kd import losses
from lightning_kd.functional import bsd, kd


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.randint(5, (2, 4, 6))
    labels[0, 0] = 255
    return torch.randn(2, 5, 4, 6), torch.randn(2, 5, 4, 6), labels


def test_each_pixel_is_taught_in_one_direction():
    s, t, y = _inputs()
    mask = y != 255
    reached = []
    for one, other in ((s, t), (t, s)):
        learner = one.clone().requires_grad_()
        bsd(learner, other, y, mask=mask).backward()
        reached.append(learner.grad.abs().sum(1) > 0)
    assert not (reached[0] & reached[1]).any()
    assert torch.equal(reached[0] | reached[1], mask)


def test_soft_labels_of_the_pixels_that_the_teacher_tells_better():
    s, t, y = _inputs()
    right = [x.softmax(1).gather(1, y.clamp_max(4)[:, None])[:, 0] for x in (s, t)]
    better = (right[1] > right[0]) & (y != 255)
    rows = [x.permute(0, 2, 3, 1)[better] for x in (s, t)]
    torch.testing.assert_close(losses.BSD(temperature=2.0)(s, t, y, y != 255), kd(*rows, 2.0))


def test_a_better_student_has_nothing_to_learn():
    _, t, y = _inputs()
    y = y % 5
    s = (t + 3.0 * F.one_hot(y, 5).movedim(-1, 1)).requires_grad_()
    value = bsd(s, t, y)
    value.backward()
    assert value == 0
    assert not s.grad.any()


def test_labels_of_another_resolution():
    s, t, y = _inputs()
    fine = y.repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(bsd(s, t, fine, mask=fine != 255), bsd(s, t, y, mask=y != 255))


def test_gradient_by_finite_differences():
    s, t = torch.randn(1, 3, 2, 3, dtype=torch.float64), torch.randn(1, 3, 2, 3, dtype=torch.float64)
    y = torch.randint(3, (1, 2, 3))
    assert torch.autograd.gradcheck(lambda x: bsd(x, t, y, mask=y > 0), (s.requires_grad_(),))


def test_what_is_wrong_is_refused():
    s, t, y = _inputs()
    with pytest.raises(ValueError, match=r"must be in \[0, 5\).*by a mask"):
        losses.BSD()(s, t, y)
    with pytest.raises(ValueError, match="integer class indices"):
        losses.BSD()(s, t, y.float())
