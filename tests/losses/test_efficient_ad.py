import pytest
import torch

from lightning_kd import losses
from lightning_kd.functional import efficient_ad


@pytest.mark.parametrize("hard", [0.0, 0.5, 0.9, 0.999])
def test_it_is_the_mean_above_the_quantile(hard: float):
    s, t = torch.randn(3, 5, 8, 8, dtype=torch.float64), torch.randn(3, 5, 8, 8, dtype=torch.float64)
    each = [(a - b).square().flatten() for a, b in zip(s, t, strict=True)]
    expected = torch.stack([d[d >= torch.quantile(d, hard)].mean() for d in each]).mean()
    torch.testing.assert_close(losses.EfficientAD(hard)(s, t), expected)


def test_only_the_hardest_learn():
    s, t = torch.randn(2, 10, 10, 10, requires_grad=True), torch.randn(2, 10, 10, 10)
    efficient_ad(s, t, hard=0.9).backward()
    assert (s.grad != 0).flatten(1).sum(1).tolist() == [100, 100]


def test_what_is_masked_is_not_among_the_hardest():
    s, t = torch.zeros(1, 1, 10, 10), torch.zeros(1, 1, 10, 10)
    s[..., 0, 0], s[..., 5, 5] = 3.0, 2.0
    mask = torch.ones(1, 10, 10, dtype=torch.bool)
    mask[0, 0, 0] = False
    torch.testing.assert_close(losses.EfficientAD(0.99)(s, t, mask), torch.tensor(4.0))


@pytest.mark.parametrize("hard", [0.0, 0.5, 0.9, 0.999])
def test_the_quantile_is_of_what_counts(hard: float):
    s, t = torch.randn(3, 5, 8, 8, dtype=torch.float64), torch.randn(3, 5, 8, 8, dtype=torch.float64)
    mask = torch.rand(3, 8, 8) < torch.tensor([0.2, 0.7, 0.0])[:, None, None]
    each = [(s[i] - t[i]).square()[:, mask[i]].flatten() for i in range(2)]
    expected = torch.stack([d[d >= torch.quantile(d, hard)].mean() for d in each]).mean()
    torch.testing.assert_close(losses.EfficientAD(hard)(s, t, mask), expected)
    torch.testing.assert_close(efficient_ad(s, t, torch.ones_like(mask), hard), efficient_ad(s, t, hard=hard))


@pytest.mark.parametrize("hard", [-0.1, 1.0, "x"])
def test_a_quantile_out_of_range_is_told(hard: float):
    with pytest.raises(ValueError, match="hard is a quantile"):
        losses.EfficientAD(hard)
