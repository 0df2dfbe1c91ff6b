import math

import pytest
import torch

from lightning_kd import functional, losses
from lightning_kd.models import mmcv_ext


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_it_is_mmdets_loss_of_scores_against_scores(beta: float) -> None:
    mmcv_ext.install()
    from mmdet.models.losses.gfocal_loss import quality_focal_loss_tensor_target  # noqa: PLC0415

    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 40, 5), 3 * torch.randn(2, 40, 5)
    s, t = student.flatten(0, 1), teacher.flatten(0, 1).sigmoid()
    theirs = quality_focal_loss_tensor_target(s, t, beta=beta, reduction="sum")
    torch.testing.assert_close(losses.QFL(beta)(student, teacher), theirs / 2)


def test_one_score_in_closed_form() -> None:
    sure, unsure = torch.tensor([[50.0]]), torch.tensor([[0.0]])
    assert functional.qfl(unsure, sure).item() == pytest.approx(0.5 * math.log(2))
    assert functional.qfl(unsure, sure, beta=2.0).item() == pytest.approx(0.25 * math.log(2))


def test_what_both_call_background_counts_next_to_nothing() -> None:
    teacher = torch.full((1, 10_000, 1), -6.0)
    student = torch.full_like(teacher, -5.0)
    much = losses.QFL()(student, teacher)
    teacher[0, 0], student[0, 0] = 3.0, -5.0
    one_more = losses.QFL()(student, teacher) - much
    assert one_more > 100 * much / 10_000


def test_a_masked_map_is_the_rest_of_it() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, 1:3] = True
    expected = losses.QFL()(student[:, :, 1:3], teacher[:, :, 1:3])
    torch.testing.assert_close(losses.QFL()(student, teacher, mask=mask), expected)


@pytest.mark.parametrize("beta", [0.5, -1.0, float("inf")])
def test_beta_is_at_least_one(beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta must be finite and at least 1"):
        losses.QFL(beta)
