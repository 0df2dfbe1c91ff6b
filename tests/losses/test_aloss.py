import pytest
import torch

from lightning_kd import losses
from lightning_kd.functional import aloss


def as_the_authors_have_it(x_pr, x_gt, x_t, alpha, alpha_mi):
    """Their signs and maps, one number at a time, with the teacher on the student's side of the truth."""
    sign = 1.0 if x_pr > x_gt else -1.0
    x_t = x_gt + sign * abs(x_t - x_gt)
    b_t = x_gt + sign * abs(x_t - x_gt) * 0.15
    beyond = alpha if (x_pr - x_t) * (x_t - x_gt) > 0 else 0.0
    between = alpha_mi if (x_t - x_pr) * (x_pr - b_t) >= 0 else 0.0
    return (beyond + between) * abs(x_t - x_pr)


@pytest.mark.parametrize(("attract", "repel"), [(1.9, 0.45), (1.8, 0.4)])
def test_is_the_authors_code(attract: float, repel: float):
    s, t, y = (torch.rand(4, 9, 2, dtype=torch.float64) for _ in range(3))
    each = [
        as_the_authors_have_it(a.item(), c.item(), b.item(), attract, -repel)
        for a, b, c in zip(s.flatten(), t.flatten(), y.flatten(), strict=True)
    ]
    expected = torch.tensor(each, dtype=torch.float64).mean()
    torch.testing.assert_close(aloss(s, t, y, attract=attract, repel=repel), expected)


@pytest.mark.parametrize(("error", "towards_truth"), [(0.5, True), (0.2, True), (0.02, False)])
def test_wherever_it_pulls_it_pulls_towards_the_truth(error: float, towards_truth: bool):
    truth = torch.zeros(1, 1, 2)
    student = (truth + error).requires_grad_()
    losses.ALoss()(student, truth - 0.3, truth).backward()
    assert student.grad is not None
    assert bool((student.grad > 0).all()) == towards_truth
    assert bool((student.grad == 0).all()) != towards_truth


def test_an_exact_teacher_draws_like_any_other_where_the_authors_code_has_nothing():
    truth = torch.zeros(1, 1, 2, dtype=torch.float64)
    assert as_the_authors_have_it(0.5, 0.0, 0.0, 1.9, -0.45) == 0
    nearly = as_the_authors_have_it(0.5, 0.0, 1e-9, 1.9, -0.45)
    assert float(aloss(truth + 0.5, truth, truth)) == pytest.approx(nearly, rel=1e-6) == pytest.approx(0.95)


def test_joints_that_do_not_count_have_no_influence():
    s, t, y = torch.rand(3, 5, 2), torch.rand(3, 5, 2), torch.rand(3, 5, 2)
    joints = torch.rand(3, 5) < 0.5
    joints[0, 0] = True
    value = losses.ALoss()(s, t, y, joints)
    torch.testing.assert_close(value, aloss(*(x[joints].unsqueeze(0) for x in (s, t, y))))
    for x in (s, t, y):
        x[~joints] = torch.nan
    s.requires_grad_()
    again = losses.ALoss()(s, t, y, joints)
    again.backward()
    torch.testing.assert_close(again.detach(), value)
    assert s.grad is not None
    assert s.grad.isfinite().all()
    assert losses.ALoss()(s, t, y, torch.zeros_like(joints)) == 0


def test_joints_without_a_true_point_have_no_influence():
    s, t, y, known = torch.rand(3, 5, 2), torch.rand(3, 5, 2), torch.rand(3, 5, 2), torch.rand(3, 5) < 0.5
    known[0, 0] = True
    value = aloss(s, t, y, known)
    y[~known, 1] = torch.nan
    torch.testing.assert_close(aloss(s, t, y), value)
    torch.testing.assert_close(aloss(s, t, y, torch.ones_like(known)), value)


def test_what_does_not_fit_is_told():
    s = torch.rand(3, 5, 2)
    with pytest.raises(ValueError, match="Student and teacher say where the same joints are"):
        aloss(s, s[:, :4], s)
    for wrong in (s[:, :4], s.long()):
        with pytest.raises(ValueError, match=r"true points are floats \(B, K, 2\)"):
            aloss(s, s, wrong)
    with pytest.raises(ValueError, match="inner is a fraction"):
        losses.ALoss(inner=1.0)
    with pytest.raises(ValueError, match="both 0"):
        losses.ALoss(attract=0.0, repel=0.0)
