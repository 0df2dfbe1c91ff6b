import itertools

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kd import losses
from lightning_kd.functional import pld


def test_a_teacher_certain_of_the_label_gives_the_cross_entropy():
    torch.manual_seed(0)
    s, y = torch.randn(5, 7), torch.randint(7, (5,))
    torch.testing.assert_close(pld(s, 500 * F.one_hot(y, 7).float(), y), F.cross_entropy(s, y))


def test_rankings_are_a_probability_distribution():
    """With uniform weights 1/C the loss is -log P(ranking) / C, and the 4! rankings' P add up to one."""
    s = torch.tensor([[1.0, -0.5, 0.3, 2.0]], dtype=torch.float64)
    total = 0.0
    for ranking in itertools.permutations(range(4)):
        t = torch.zeros_like(s)
        t[0, list(ranking)] = torch.tensor([3e-9, 2e-9, 1e-9, 0.0], dtype=torch.float64)
        total += torch.exp(-4 * pld(s, t, torch.tensor([ranking[0]]))).item()
    assert abs(total - 1) < 1e-6


def test_hand_computed_order():
    """Teacher 2 > 1 > 0 and label 0: the ranking is 0, 2, 1."""
    s = torch.tensor([[0.2, 0.7, -0.4]])
    t = torch.tensor([[0.0, 1.0, 2.0]])
    w, p = t.softmax(1)[0], s.softmax(1)[0]
    expected = -w[0] * p[0].log() - w[2] * (p[2] / (p[2] + p[1])).log()
    torch.testing.assert_close(losses.PLD()(s, t, torch.tensor([0])), expected)


def test_gradient_by_finite_differences():
    torch.manual_seed(0)
    s, t, y = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64), torch.arange(3)
    assert torch.autograd.gradcheck(lambda x: pld(x, t, y), s.requires_grad_())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), classes=st.integers(2, 9), mix=st.floats(0, 1))
def test_convex_and_free_of_the_offset(seed: int, classes: int, mix: float):
    draw = torch.Generator().manual_seed(seed)
    a, b, t = 3 * torch.randn(3, 4, classes, generator=draw, dtype=torch.float64)
    y = torch.randint(classes, (4,), generator=draw)
    assert pld(mix * a + (1 - mix) * b, t, y) <= mix * pld(a, t, y) + (1 - mix) * pld(b, t, y) + 1e-9
    torch.testing.assert_close(pld(a + 7, t, y), pld(a, t, y))
