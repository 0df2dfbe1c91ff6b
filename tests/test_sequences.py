"""Features (B, C, L) of one-dimensional convolutions, told from tokens (B, N, C) by the layers they come from."""

import pytest
import torch
from engine import watched
from torch import Tensor, nn

from lightning_kd import Distiller, Term, losses
from lightning_kd.projectors import TokensToTokens
from lightning_kd.sequences import Layout


class Waves(nn.Module):
    """Convolutions, and what follows on their output as tokens."""

    def __init__(self, width: int, length: int = 50) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool1d(length)
        self.conv = nn.Conv1d(2, width, 3, padding=1)
        self.block = nn.Sequential(nn.Conv1d(width, width, 1), nn.BatchNorm1d(width), nn.ReLU())
        self.act = nn.ReLU()
        self.tokens = nn.Identity()
        self.mixed = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.block(self.conv(self.pool(x))))
        return self.mixed(self.tokens(x.transpose(1, 2)))


def losses_of(term: Term, student: nn.Module, teacher: nn.Module) -> Tensor:
    distiller = Distiller({"it": term}, teacher)
    calls = watched(distiller, student, torch.randn(2, 2, 60))
    distiller.build(calls[0])
    return distiller(calls)["it"]


@pytest.mark.parametrize("path", ["conv", "block", "block.1", "act"])
@pytest.mark.parametrize(
    ("loss", "student", "teacher", "projector"),
    [
        (losses.FitNet, (16, 50), (64, 50), "nn.Conv1d(16, 64, 1)"),
        (losses.FitNet, (12, 50), (20, 50), "nn.Conv1d(12, 20, 1)"),
        (losses.FitNet, (16, 50), (16, 25), "nn.AdaptiveAvgPool1d(25)"),
        (losses.FitNet, (16, 50), (64, 25), "nn.Sequential(nn.AdaptiveAvgPool1d(25), nn.Conv1d(16, 64, 1))"),
        (losses.FitNet, (8, 25), (24, 50), "nn.Sequential(nn.Conv1d(8, 24, 1), nn.Upsample(50, mode='linear'))"),
        (losses.AT, (16, 50), (64, 50), "nn.Identity()"),
        (losses.AT, (16, 50), (16, 25), "nn.AdaptiveAvgPool1d(25)"),
    ],
)
def test_sequences_name_their_projector(
    path: str, loss: type[nn.Module], student: tuple[int, int], teacher: tuple[int, int], projector: str
) -> None:
    with pytest.raises(
        ValueError, match=r"Term 'it': .*: these are \(B, C, L\).* Give the term its projector: "
    ) as told:
        losses_of(Term(loss(), student=path, teacher=path), Waves(*student), Waves(*teacher))
    assert str(told.value).endswith(f" {projector}.")
    named = Term(loss(), student=path, teacher=path, projector=eval(projector, {"nn": nn}))
    assert losses_of(named, Waves(*student), Waves(*teacher)) > 0


@pytest.mark.parametrize(("student", "teacher", "side"), [("conv", "tokens", "student"), ("tokens", "act", "teacher")])
def test_one_side_may_be_a_sequence(student: str, teacher: str, side: str) -> None:
    with pytest.raises(ValueError, match=rf"the {side}'s is \(B, C, L\).* a module that turns the first into"):
        losses_of(Term(losses.FitNet(), student=student, teacher=teacher), Waves(16), Waves(64))


def test_equal_sequences_and_losses_that_need_no_bridge_are_as_they_were() -> None:
    assert losses_of(Term(losses.FitNet(), student="conv", teacher="conv"), Waves(16), Waves(16)) > 0
    assert losses_of(Term(losses.VID(), student="conv", teacher="conv"), Waves(16), Waves(64)) > 0


@pytest.mark.parametrize("path", ["tokens", "mixed", "output"])
def test_tokens_behind_convolutions_are_tokens(path: str) -> None:
    linear = Term(losses.FitNet(), student=path, teacher=path)
    assert losses_of(linear, Waves(24), Waves(48)) > 0
    assert isinstance(linear.projector, nn.Linear)
    grid = Term(losses.FitNet(), student=path, teacher=path)
    assert losses_of(grid, Waves(24, length=49), Waves(24, length=16)) > 0
    assert isinstance(grid.projector, TokensToTokens)


@pytest.mark.parametrize("shape", [(2, 16), (2, 16, 4, 4), (2, 50, 16), (2, 16, 16), (2, 16, 32)])
def test_nothing_is_told_of_other_shapes_and_of_numbers_that_fit_both_readings(shape: tuple[int, ...]) -> None:
    model = Waves(16)
    assert Layout.of(model.block, model).tell(torch.zeros(2, 16, 50))
    assert not Layout.of(model, model).tell(torch.zeros(shape))


def test_lazy_layers_tell_nothing() -> None:
    model = nn.Sequential(nn.Conv1d(2, 16, 1), nn.LazyLinear(3))
    assert Layout.of(model, model).tell(torch.zeros(2, 16, 50))
