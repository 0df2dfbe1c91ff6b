import pytest
import torch

from lightning_kd import losses


def test_the_definition_over_triples():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    errors = [
        (float(s[0] - s[j]) - float(t[0] - t[j])) ** 2 for s, t in zip(student, teacher, strict=True) for j in (1, 2)
    ]
    assert float(losses.MarginMSE()(student, teacher)) == pytest.approx(sum(errors) / 8, rel=1e-5)


def test_a_constant_for_each_query_does_not_matter():
    teacher = torch.randn(4, 3)
    assert losses.MarginMSE()(teacher + torch.randn(4, 1), teacher) < 1e-10


def test_scores_of_another_scale_are_brought_together():
    teacher = torch.randn(4, 5)
    assert losses.MarginMSE()(0.01 * teacher + 3, teacher) > 0.1
    assert losses.Standardized(losses.MarginMSE())(0.01 * teacher + 3, teacher) < 1e-6


@pytest.mark.parametrize("shape", [(4, 1), (4,), (4, 2, 2)])
def test_one_candidate_has_no_margin(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"scores are \(B, N\), those of N >= 2 candidates"):
        losses.MarginMSE()(torch.randn(shape), torch.randn(shape))
