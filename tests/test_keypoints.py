import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from lightning_kd.keypoints import Coordinates, Heatmaps, SimCC, decode, log_gaussian, loss, said


def targets(places: Tensor, cells: int = 24, sigma: float = 0.06) -> dict[str, Heatmaps | SimCC | Coordinates]:
    """What a network says that has learned everything."""
    x, y = (log_gaussian(places[..., i], cells, sigma) for i in (0, 1))
    maps = (y.unsqueeze(-1) + x.unsqueeze(-2)).exp()
    return {"heatmaps": Heatmaps(maps), "simcc": SimCC(x, y), "coordinates": Coordinates(places)}


@pytest.mark.parametrize("kind", ["heatmaps", "simcc", "coordinates"])
def test_points_survive_the_way_to_targets_and_back(kind: str) -> None:
    places = 0.05 + 0.9 * torch.rand(4, 7, 2)
    found, scores = decode(targets(places)[kind])
    torch.testing.assert_close(found, places, atol=1e-4, rtol=0)
    assert scores.shape == (4, 7)
    assert ((scores > 0) & (scores <= 1)).all()


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.integers(6, 40))
def test_no_place_is_lost_by_more_than_a_cell(x: float, y: float, cells: int) -> None:
    places = torch.tensor([[[x, y]]])
    for kind in ("heatmaps", "simcc"):
        found, _ = decode(targets(places, cells, sigma=1 / cells)[kind])
        assert (found - places).abs().max() <= 0.5 / cells + 1e-5  # of the outermost cells there is no parabola


def test_a_peak_between_cells_of_noise_and_below_zero_is_within_the_cell() -> None:
    maps = -torch.rand(2, 3, 5, 9)
    maps[..., 2, 4] = 0.5
    found, score = decode(Heatmaps(maps))
    torch.testing.assert_close(found, torch.tensor([0.5, 0.5]).expand(2, 3, 2))
    assert (score == 0.5).all()


@pytest.mark.parametrize("masked", [[2], [4], [0, 1, 2, 4, 5]])
def test_bins_that_are_ruled_out_beside_the_peak_leave_it_where_it_is(masked: list[int]) -> None:
    bins = torch.zeros(1, 1, 6)
    bins[..., 3], bins[..., masked] = 2.0, -torch.inf
    found, _ = decode(SimCC(bins, bins))
    torch.testing.assert_close(found, torch.full((1, 1, 2), 3.5 / 6))


@pytest.mark.parametrize("kind", ["heatmaps", "simcc"])
def test_of_values_that_are_no_numbers_there_is_no_place(kind: str) -> None:
    output = targets(torch.rand(2, 3, 2))[kind]
    output[0][1, 2, 5] = torch.nan  # any axis is enough for the score, and a map is of both
    places, scores = decode(output)
    assert scores.isnan().tolist() == places.isnan().any(-1).tolist() == [[False] * 3, [False, False, True]]


def test_the_scores_of_bins_are_probabilities() -> None:
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 6)
    _, score = decode(SimCC(x, y))
    torch.testing.assert_close(score, (x.softmax(-1).amax(-1) * y.softmax(-1).amax(-1)).sqrt())


@pytest.mark.parametrize("kind", ["heatmaps", "simcc", "coordinates"])
def test_the_loss_is_zero_at_the_target_and_smallest_there(kind: str) -> None:
    places, counted = torch.rand(3, 4, 2), torch.rand(3, 4) < 0.7
    perfect = targets(places)[kind]
    assert float(loss(perfect, places, counted, sigma=0.06)) < 1e-6
    moved = targets(places + 0.1)[kind]
    assert float(loss(moved, places, counted, sigma=0.06)) > 1e-3


def test_the_loss_of_bins_is_a_divergence() -> None:
    places, x, y = torch.rand(2, 3, 2), torch.randn(2, 3, 16), torch.randn(2, 3, 12)
    true = [Categorical(logits=log_gaussian(places[..., i], n, 0.1)) for i, n in enumerate((16, 12))]
    expected = sum(kl_divergence(t, Categorical(logits=s)) for t, s in zip(true, (x, y), strict=True)).mean()
    torch.testing.assert_close(loss(SimCC(x, y), places, torch.ones(2, 3, dtype=torch.bool), sigma=0.1), expected)


def test_a_heatmap_of_any_size_is_to_say_more_than_one_cell_of_a_joint() -> None:
    places, counted = torch.rand(2, 3, 2), torch.ones(2, 3, dtype=torch.bool)
    for cells, sigma in ((12, 2 / 12), (24, 2 / 24), (64, 1 / 32), (128, 1 / 32)):
        assert float(loss(targets(places, cells, sigma)["heatmaps"], places, counted)) < 1e-10


@pytest.mark.parametrize("kind", ["heatmaps", "simcc", "coordinates"])
def test_joints_that_do_not_count_have_no_part(kind: str) -> None:
    places, counted = torch.rand(2, 4, 2), torch.tensor([[True, False, True, True], [False, False, False, True]])
    output = targets(torch.rand(2, 4, 2))[kind]
    leaves = [each.clone().requires_grad_() for each in output]
    value = loss(type(output)(*leaves), places, counted)
    value.backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert (leaf.grad.flatten(2).abs().sum(-1) > 0).equal(counted)
    places[~counted] = torch.nan
    torch.testing.assert_close(loss(output, places, counted), value.detach())
    alone = type(output)(*(each[0][counted[0]].unsqueeze(0) for each in output))
    kept = places[0][counted[0]].unsqueeze(0)
    first = torch.zeros_like(counted)
    first[0] = counted[0]
    everything = torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(loss(output, places, first), loss(alone, kept, everything))


@pytest.mark.parametrize("kind", ["heatmaps", "simcc", "coordinates"])
def test_no_joint_is_a_loss_of_zero(kind: str) -> None:
    output = targets(torch.rand(2, 4, 2))[kind]
    leaves = [each.clone().requires_grad_() for each in output]
    value = loss(type(output)(*leaves), torch.rand(2, 4, 2), torch.zeros(2, 4, dtype=torch.bool))
    value.backward()
    assert value == 0
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def test_what_networks_return_is_recognised() -> None:
    maps, bins, places = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 8), torch.rand(2, 3, 2)
    for output in (maps, {"heatmaps": maps}, Heatmaps(maps)):
        assert isinstance(said(output), Heatmaps)
    for output in ((bins, bins), [bins, bins], {"simcc_x": bins, "simcc_y": bins}, SimCC(bins, bins)):
        assert isinstance(said(output), SimCC)
    for output in (places, {"coordinates": places}, Coordinates(places)):
        assert isinstance(said(output), Coordinates)
    for wrong in (torch.rand(2, 3), {"logits": maps}, None, (bins, bins, bins), {"heatmaps": bins}, bins):
        with pytest.raises(ValueError, match=r"override Pose\.said"):
            said(wrong)
