"""The network that restores its encoder's levels, with and without seeing them."""

import copy
from typing import Any

import lightning as pl
import pytest
import torch
from lightning_kd.tasks import AnomalyDetection
from project import QUIET
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kd import DistillationModule, Term, losses, teachers
from lightning_kd.data import Textures
from lightning_kd.models import ResidualReverseDistillation, SqueezeNetFeatures
from lightning_kd.models.reverse_distillation import _Attention, _Predicted

CHANNELS = [8, 12, 16, 24]


class Levels(nn.Module):
    """A small encoder: its levels have odd sizes in a test, as SqueezeNet's have."""

    def __init__(self) -> None:
        super().__init__()
        given = [3, *CHANNELS[:-1]]
        strides = [4, 1, 2, 2]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 5, stride=s, padding=2), nn.BatchNorm2d(o), nn.ReLU())
            for i, o, s in zip(given, CHANNELS, strides, strict=True)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {str(i): (x := layer(x)) for i, layer in enumerate(self.layers)}


def _network(residual: bool = True) -> ResidualReverseDistillation:
    torch.manual_seed(0)
    return ResidualReverseDistillation(Levels(), residual=residual)


@pytest.mark.parametrize("residual", [True, False])
def test_it_restores_its_encoder_s_levels_and_learns_all_but_the_encoder(residual: bool) -> None:
    network = _network(residual).train()
    images = torch.randn(2, 3, 80, 72)
    restored = network(images)
    levels = [*network.encoder(images).values()]
    assert network.decoder.training
    assert not network.encoder.training
    assert [each.shape for each in restored] == [each.shape for each in levels]
    assert [each.shape[1] for each in restored] == CHANNELS
    torch.stack([each.square().mean() for each in restored]).sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == name.startswith("encoder."), name  # DDP refuses unused ones
    assert (len(network.decoder.residuals) == 3) == residual


def test_a_named_encoder_is_timm_s_and_gives_levels_of_the_expected_sizes() -> None:
    network = ResidualReverseDistillation("resnet10t", pretrained=False).eval()
    images = torch.randn(1, 3, 64, 96)
    levels = network.encoder(images)
    assert [tuple(each.shape[1:]) for each in levels] == [(64, 16, 24), (64, 16, 24), (128, 8, 12), (256, 4, 6)]
    first = network.encoder.network(images)[0]
    torch.testing.assert_close(levels[0], nn.MaxPool2d(3, 2, 1)(first))
    assert [each.shape for each in network(images)] == [each.shape for each in levels]


def test_only_residuals_let_an_image_pass_by_the_bottleneck() -> None:
    images = torch.randn(2, 3, 64, 64)
    for residual in (True, False):
        network = _network(residual).eval()
        levels = [*network.encoder.eval()(images).values()]
        with torch.no_grad():
            bottled = network.bottleneck(levels)
            one, two = network.decoder(bottled[:1].expand_as(bottled), levels)[0]
        assert torch.equal(one, two) != residual


def test_a_position_is_predicted_from_its_diagonals() -> None:
    layer, x = _Predicted(16), torch.randn(2, 16, 5, 6)
    padded = torch.zeros(2, 16, 9, 10)
    padded[..., 2:7, 2:8] = x
    weight, bias = layer.mix.weight[..., 0, 0], layer.mix.bias
    expected = torch.empty(2, 16, 5, 6)
    for i in range(5):
        for j in range(6):
            near = [padded[..., i + a, j + b] for b in (0, 4) for a in (0, 4)]
            expected[..., i, j] = F.relu(torch.cat(near, 1) @ weight.T + bias)
    scale = layer.excite(expected.mean((2, 3)))
    torch.testing.assert_close(layer(x), expected * scale[:, :, None, None])
    moved = x.clone()
    moved[..., 2, 2] += 1.0
    layer.excite[2].weight.data.zero_()  # which sees the whole map
    assert torch.equal(layer(moved)[..., 2, 2], layer(x)[..., 2, 2])  # it does not see itself
    assert not torch.equal(layer(moved)[..., 0, 0], layer(x)[..., 0, 0])


def test_attention_weighs_a_row() -> None:
    layer, x = _Attention(3, 4, kernel=1, hidden=1), torch.randn(2, 3, 5, 6)
    values = layer.values(x)
    layer.scores[-1].weight.data.zero_()
    torch.testing.assert_close(layer(x), values / 6)  # equal scores: each of six has a sixth


@pytest.mark.parametrize("encoder", [nn.Conv2d(3, 4, 3), SqueezeNetFeatures(levels=[4, 7])])
def test_an_encoder_of_other_levels_is_refused(encoder: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"the encoder returns a list of 4 maps \(B, C, H, W\); got "):
        ResidualReverseDistillation(encoder)
    with pytest.raises(ValueError, match=r"levels are numbers of layers, 0 to 12, in a list: \[4, 7, 12\]; got \[13\]"):
        SqueezeNetFeatures(levels=[13])


def test_it_learns_bricks_by_its_own_encoder() -> None:
    pl.seed_everything(0, verbose=False)
    network = _network()
    layers: dict[str, Any] = {"difference": ["decoder[:]"], "teacher_difference": ["encoder[:]"]}
    module = DistillationModule(
        task=AnomalyDetection(**layers, combine="sum", smoothing=4.0, weights=[1 / 16, 1 / 16, 1 / 4, 1]),
        student=network,
        teacher=teachers.Itself(),
        terms={"rd": Term(losses.RD4AD(), student="decoder[:]", teacher="encoder[:]")},
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3),
    )
    data = Textures(train_size=16, val_size=4, test_size=8, batch_size=8, synthetic=0.0)
    before, steps = copy.deepcopy(network.encoder.state_dict()), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            steps.append(float(trainer.callback_metrics["train/rd"]))

    trainer = pl.Trainer(callbacks=Watch(), **QUIET | {"max_epochs": 10, "limit_val_batches": 0})
    trainer.fit(module, datamodule=data)
    assert steps[-1] < 0.75 * steps[0]
    assert all(torch.equal(value, before[key]) for key, value in network.encoder.state_dict().items())
    (measured,) = trainer.test(module, datamodule=data, verbose=False)
    assert 0 <= measured["test/image_auroc"] <= 1
