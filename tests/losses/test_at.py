import pytest
import torch
from torchdistill.losses.mid_level import ATLoss

from lightning_kd import losses
from lightning_kd.functional import at


@pytest.mark.parametrize(("squared", "mode"), [(True, "code"), (False, "paper")])
def test_against_torchdistill(squared: bool, mode: str):
    torch.manual_seed(0)
    s, t = torch.randn(4, 3, 5, 6), torch.randn(4, 8, 5, 6)
    side = {"io": "output", "path": "x"}
    peer = ATLoss({"pair": {"student": side, "teacher": side}}, mode=mode)
    torch.testing.assert_close(losses.AT(squared=squared)(s, t), peer({"x": {"output": s}}, {"x": {"output": t}}))


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
def test_free_of_scale_sign_and_channel_order(p: float):
    torch.manual_seed(0)
    t = torch.randn(4, 8, 5, 6)
    torch.testing.assert_close(at(-3 * t[:, torch.randperm(8)], t, p), torch.tensor(0.0), atol=1e-10, rtol=0)


def test_gradient_by_finite_differences():
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 4, 2, 2, dtype=torch.float64)
    for squared in (True, False):
        assert torch.autograd.gradcheck(losses.AT(squared=squared), (s.requires_grad_(), t))


def test_high_powers_do_not_overflow():
    torch.manual_seed(0)
    s, t = 6e4 * torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(at(s, t, p=16.0), at(s.double(), t.double(), p=16.0).float())


def test_resolutions_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) and teacher \(2, 3, 8, 8\).*projector"):
        losses.AT()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="at least 1"):
        losses.AT(p=0.5)
