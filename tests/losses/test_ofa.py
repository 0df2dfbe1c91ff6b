import pytest
import torch
import torch.nn.functional as F

from lightning_kd import losses
from lightning_kd.functional import ofa


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 7), torch.randn(5, 7), torch.randint(7, (5,))


def test_exponent_1_is_the_cross_entropy_with_soft_labels():
    s, t, y = _inputs()
    for enhance in ("all", "target"):
        loss = losses.OFA(temperature=2.0, enhance=enhance)(s, t, y)
        torch.testing.assert_close(loss, F.cross_entropy(s / 2, (t / 2).softmax(1)))


def test_exponent_2_adds_the_papers_target_term():
    """Hao et al., section 3.3: with exponent 2, L = L(1) - (p_t[y] + p_t[y]^2) log p_s[y]."""
    s, t, y = _inputs()
    p = t.softmax(1).gather(1, y[:, None]).squeeze(1)
    extra = ((p + p**2) * F.cross_entropy(s, y, reduction="none")).mean()
    torch.testing.assert_close(ofa(s, t, y, eps=2.0, enhance="target"), ofa(s, t, y) + extra)


def test_hand_computed_exponent_on_all_classes():
    s, t = torch.zeros(1, 2), torch.tensor([[0.75, 0.25]]).log()
    weight = (1.75**2 - 1) + 0.25**2
    assert ofa(s, t, torch.tensor([0]), eps=2.0).item() == pytest.approx(weight * 0.6931472)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="eps"):
        losses.OFA(eps=0.0)
    with pytest.raises(ValueError, match="enhance"):
        losses.OFA(enhance="both")
