import math

import pytest
import torch
from torch import Tensor, nn

from lightning_kd import functional, losses

B, C, H, W = 2, 6, 5, 8
BOXES = [
    torch.tensor([[0.05, 0.1, 0.55, 0.9], [0.3, 0.35, 0.6, 0.6], [0.9, 0.9, 1.0, 1.0]]),  # the second inside the first
    torch.zeros(0, 4),
]


def by_hand(s: Tensor, t: Tensor, boxes: list[Tensor], alpha: float, beta: float, gamma: float, heat: float) -> float:
    """Equations 3 to 10 of arXiv 2111.11837, pixel by pixel."""
    total = 0.0
    for n in range(len(s)):
        places_t, channels_t = attention(t[n], heat)
        places_s, channels_s = attention(s[n], heat)
        scale = [[0.0] * W for _ in range(H)]
        for x1, y1, x2, y2 in boxes[n].tolist():
            rows = [i for i in range(H) if i < y2 * H and i + 1 > y1 * H]  # cells that overlap the box
            columns = [j for j in range(W) if j < x2 * W and j + 1 > x1 * W]
            for i in rows:
                for j in columns:
                    scale[i][j] = max(scale[i][j], 1 / (len(rows) * len(columns)))
        background = sum(value == 0 for row in scale for value in row)
        for i in range(H):
            for j in range(W):
                share = alpha * scale[i][j] if scale[i][j] else beta / background
                for c in range(C):
                    error = float(s[n, c, i, j] - t[n, c, i, j]) ** 2
                    total += share * places_t[i][j] * channels_t[c] * error
                total += gamma * abs(places_t[i][j] - places_s[i][j])
        total += gamma * sum(abs(a - b) for a, b in zip(channels_t, channels_s, strict=True))
    return total / len(s)


def attention(x: Tensor, heat: float) -> tuple[list[list[float]], list[float]]:
    energy = x.abs().tolist()
    places = [[math.exp(sum(energy[c][i][j] for c in range(C)) / C / heat) for j in range(W)] for i in range(H)]
    channels = [math.exp(sum(map(sum, energy[c])) / (H * W) / heat) for c in range(C)]
    all_places, all_channels = sum(map(sum, places)), sum(channels)
    return (
        [[H * W * value / all_places for value in row] for row in places],
        [C * value / all_channels for value in channels],
    )


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1e-3, 5e-4, 1e-3)])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_focal_part_is_the_papers_sum_over_pixels(weights: tuple[float, float, float], temperature: float) -> None:
    s, t = torch.randn(B, C, H, W, dtype=torch.float64), torch.randn(B, C, H, W, dtype=torch.float64)
    expected = by_hand(s, t, BOXES, *weights, temperature)
    assert float(functional.fgd(s, t, BOXES, temperature, *weights)) == pytest.approx(expected)


def test_the_relation_is_that_of_two_global_contexts() -> None:
    s, t = torch.randn(B, C, H, W), torch.randn(B, C, H, W)
    loss = losses.FGD(foreground=0.0, background=0.0, attention=0.0, relation=0.5)
    loss.build(s, t)
    torch.testing.assert_close(loss(s, t, BOXES), 0.5 * (s - t).square().sum() / B)  # as it is built
    for parameter in loss.parameters():
        nn.init.normal_(parameter)
    related = []
    for x, block in ((s, loss.student_side), (t, loss.teacher_side)):
        query = nn.Conv2d(C, 1, 1)
        query.load_state_dict(
            {key: v.view(1, C, 1, 1) if v.ndim == 2 else v for key, v in block.where.state_dict().items()}
        )
        look = query(x).view(B, H * W).softmax(1)
        context = torch.einsum("bp,bcp->bc", look, x.view(B, C, H * W))
        related.append(x + block.change(context).view(B, C, 1, 1))
    torch.testing.assert_close(loss(s, t, BOXES), 0.5 * (related[0] - related[1]).square().sum() / B)


def test_more_boxes_on_the_same_place_change_nothing_and_small_ones_count_more() -> None:
    s, t = torch.randn(1, C, H, W), torch.randn(1, C, H, W)
    small, large = torch.tensor([[0.0, 0.0, 0.1, 0.1]]), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    only = {"foreground": 1.0, "background": 0.0, "attention": 0.0}
    one = functional.fgd(s, t, [small], **only)
    torch.testing.assert_close(functional.fgd(s, t, [torch.cat([small, small])], **only), one)
    both, whole = (functional.fgd(s, t, [b], **only) for b in (torch.cat([small, large]), large))
    assert both > whole
    everything = functional.fgd(s, t, [large], foreground=0.0, background=1.0, attention=0.0)
    assert float(everything) == 0.0  # nowhere is background


def test_boxes_that_leave_the_input_are_cut() -> None:
    s, t = torch.randn(1, C, H, W), torch.randn(1, C, H, W)
    inside = functional.fgd(s, t, [torch.tensor([[0.5, 0.5, 1.0, 1.0]])])
    for wrong in ([0.5, 0.5, 1.0, 1.0 + 1e-7], [0.5, 0.5, 1.0, 1.0]):
        torch.testing.assert_close(functional.fgd(s, t, [torch.tensor([wrong])]), inside)
    edge = functional.fgd(s, t, [torch.tensor([[1.0, 1.0, 1.0, 1.0]])])  # a point in the corner is one cell
    torch.testing.assert_close(edge, functional.fgd(s, t, [torch.tensor([[0.95, 0.95, 1.0, 1.0]])]))


@pytest.mark.parametrize("boxes", [[], [torch.zeros(0, 4)], [torch.zeros(1, 5)] * B, [torch.zeros(4)] * B])
def test_malformed_boxes_are_refused(boxes: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"boxes are a list of \(n, 4\) for each of the 2 samples"):
        functional.fgd(torch.randn(B, C, H, W), torch.randn(B, C, H, W), boxes)
