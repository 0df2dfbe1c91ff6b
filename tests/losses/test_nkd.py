import math

import pytest
import torch
import torch.nn.functional as F

from lightning_kd import losses
from lightning_kd.functional import nkd


def test_against_cross_entropy_with_the_target_removed():
    torch.manual_seed(0)
    s, t, y = torch.randn(5, 7), torch.randn(5, 7), torch.randint(7, (5,))
    keep = torch.arange(7) != y[:, None]
    soft = t.softmax(1)[torch.arange(5), y]
    target = (soft * F.cross_entropy(s, y, reduction="none")).mean()
    rest = F.cross_entropy(s[keep].reshape(5, 6) / 2, (t[keep].reshape(5, 6) / 2).softmax(1))
    torch.testing.assert_close(losses.NKD(gamma=1.5, temperature=2.0)(s, t, y), target + 1.5 * 4 * rest)


def test_gradient_by_finite_differences():
    torch.manual_seed(0)
    s, t, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64), torch.arange(3)
    assert torch.autograd.gradcheck(lambda x: nkd(x, t, y, temperature=2.0), s.requires_grad_())


def test_a_negative_weight_is_refused_and_0_leaves_the_target_part():
    with pytest.raises(ValueError, match="not negative, got gamma=-1"):
        losses.NKD(gamma=-1)
    assert losses.NKD(gamma=0)(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0])).item() == pytest.approx(
        math.log(3) / 3
    )


def test_two_classes_are_refused_with_the_remedy():
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"undefined: use KD\(\)"):
        losses.NKD()(x, x, torch.zeros(4, dtype=torch.int64))
