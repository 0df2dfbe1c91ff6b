import torch
from torch.nn import functional as F

from lightning_kd import losses


def test_it_is_the_cosine_of_positions_or_of_whole_maps():
    s, t = torch.randn(3, 5, 4, 6), torch.randn(3, 5, 4, 6)
    torch.testing.assert_close(losses.RD4AD()(s, t), losses.STFPM()(s, t))
    whole = (1 - F.cosine_similarity(s.flatten(1), t.flatten(1))).mean()
    torch.testing.assert_close(losses.RD4AD(flatten=True)(s, t), whole)


def test_a_mask_is_the_loss_of_the_pixels_inside():
    s, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, 2:7, 1:5] = True
    loss = losses.RD4AD(flatten=True)
    torch.testing.assert_close(loss(s, t, mask), loss(s[:, :, 2:7, 1:5], t[:, :, 2:7, 1:5]))
