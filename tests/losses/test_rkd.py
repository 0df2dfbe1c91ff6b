import math

import pytest
import torch
from torchdistill.losses.mid_level import RKDLoss

from lightning_kd import losses
from lightning_kd.functional import rkd


def test_against_torchdistill():
    torch.manual_seed(0)
    s, t = torch.randn(6, 8), torch.randn(6, 12)
    peer = RKDLoss("x", "x", dist_factor=25.0, angle_factor=50.0, reduction="mean")
    torch.testing.assert_close(rkd(s, t), peer({"x": {"output": s}}, {"x": {"output": t}}))


def test_hand_computed_distance():
    """Points 0, 1, 3 on a line against 0, 1, 2: distances 1, 2, 3 against 1, 1, 2 in units of 2 and 4/3."""
    s, t = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [1.0], [2.0]])
    expected = 2 * sum(0.5 * d**2 for d in (1 / 2 - 3 / 4, 2 / 2 - 3 / 4, 3 / 2 - 6 / 4)) / 9
    assert rkd(s, t, distance=1.0, angle=0.0).item() == pytest.approx(expected)


def test_hand_computed_angle():
    """An equilateral against a right triangle: cosines 1/2 against 0 and 1/sqrt(2); 27 triples, 6 proper."""
    s = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])
    t = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    expected = 2 * (0.5 * 0.5**2 + 2 * 0.5 * (0.5 - 2**-0.5) ** 2) / 27
    assert rkd(s, t, distance=0.0, angle=1.0).item() == pytest.approx(expected, rel=1e-5)


def test_free_of_similarity_transforms():
    torch.manual_seed(0)
    s, t = torch.randn(5, 8), torch.randn(5, 6)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    torch.testing.assert_close(rkd(3 * s @ rotation + 2, t), rkd(s, t), rtol=1e-4, atol=1e-5)


def test_gradient_by_finite_differences():
    torch.manual_seed(0)
    s, t = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(losses.RKD(), (s.requires_grad_(), t))


def test_identical_rows_have_a_bounded_gradient():
    torch.manual_seed(0)
    s = torch.randn(5, 8)
    s[1] = s[3]
    rkd(s.requires_grad_(), torch.randn(5, 8)).backward()
    assert s.grad is not None
    assert s.grad.abs().max() < 10


def test_too_little_to_compare_is_refused():
    with pytest.raises(ValueError, match="at least 3 samples are needed, got 2"):
        losses.RKD()(torch.zeros(2, 8), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="both 0"):
        losses.RKD(distance=0.0, angle=0.0)


def test_distances_survive_a_large_offset():
    """From 26 rows on torch.cdist would expand the square, and lose distances of 1 between points at 1000."""
    torch.manual_seed(0)
    s, t = 1000 + torch.randn(40, 3), torch.randn(40, 3)
    expected = rkd(s.double(), t.double(), angle=0.0).float()
    torch.testing.assert_close(rkd(s, t, angle=0.0), expected, rtol=1e-4, atol=0)


def test_angles_between_numbers_are_refused():
    student = torch.randn(5, 1, requires_grad=True)
    with pytest.raises(ValueError, match="between samples of one number each angle is 0 or 180 degrees"):
        losses.RKD(distance=0.0)(student, torch.randn(5, 3))
    (gradient,) = torch.autograd.grad(losses.RKD(distance=1.0)(student, torch.randn(5, 3)), student)
    assert gradient.abs().max() > 1e-3
