import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.transforms.v2 import functional as tv

from lightning_kd.teachers import Frozen, Renormalize

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CLIP = ([0.481, 0.458, 0.408], [0.269, 0.261, 0.276])


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 4, 4), (2, 3, 2, 4, 4)])
def test_it_is_the_other_normalisation_of_the_same_images(shape: tuple[int, ...]) -> None:
    """Against torchvision, from the raw pixels."""
    raw = torch.rand(shape)
    by_hand = raw[..., None, None] if raw.ndim < 4 else raw.movedim(1, -3)

    def normalized(mean: list[float], std: list[float]) -> torch.Tensor:
        flat = by_hand.reshape(-1, 3, *by_hand.shape[-2:]) if raw.ndim == 5 else by_hand
        if raw.ndim == 3:
            flat = raw[..., None]
        return tv.normalize(flat, mean, std).reshape(by_hand.shape).movedim(-3, 1).reshape(shape)

    if raw.ndim == 3:
        by_hand = raw[..., None]
    torch.testing.assert_close(Renormalize(*IMAGENET, *CLIP)(normalized(*IMAGENET)), normalized(*CLIP))


def test_equal_normalisations_change_nothing() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(Renormalize(*CLIP, *CLIP)(x), x)
    assert Renormalize(*CLIP, *IMAGENET)(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "given",
    [
        ([0.5], [1.0, 1.0, 1.0], [0.5], [1.0]),
        ([0.5], [0.0], [0.5], [1.0]),
        ([0.5], [1.0], [0.5], [-1.0]),
    ],
)
def test_numbers_that_do_not_fit_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="one number per channel four times"):
        Renormalize(*given)


@pytest.mark.parametrize("shape", [(3,), (2, 1, 4, 4), (2, 4, 4, 3)])
def test_other_channels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"has 3 channels and its input \(B, C, \.\.\.\) is \("):
        Renormalize(*CLIP, *IMAGENET)(torch.zeros(shape))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x).mean((2, 3))


def test_a_frozen_teacher_sees_its_own_and_keeps_its_paths() -> None:
    model, raw = Net(), torch.rand(2, 3, 4, 4)
    teacher = Frozen(model, input=Renormalize(*IMAGENET, *CLIP))
    teacher.bind(Net(), ["stem", "output"])
    answer = teacher(tv.normalize(raw, *IMAGENET))
    with torch.no_grad():
        torch.testing.assert_close(answer["output"][0], model(tv.normalize(raw, *CLIP)))
        torch.testing.assert_close(answer["stem"][0], model.stem(tv.normalize(raw, *CLIP)))
    assert all("stem" in name for name, _ in teacher.named_parameters())
    teacher.unbind()
    pickle.loads(pickle.dumps(teacher))


def test_input_makes_arguments_as_teacher_input_does() -> None:
    class Two(Net):
        def forward(self, x: torch.Tensor, scale: float, shift: float = 0.0) -> torch.Tensor:
            return super().forward(x) * scale + shift

    model, x = Two(), torch.rand(2, 3, 4, 4)
    for make, expected in (
        (lambda x, scale: (x, 2 * scale), (6.0, 0.0)),
        (lambda x, scale: {"x": x, "scale": scale, "shift": 1.0}, (3.0, 1.0)),
    ):
        teacher = Frozen(model, input=make)
        teacher.bind(Net(), ["output"])
        with torch.no_grad():
            torch.testing.assert_close(teacher(x, scale=3.0)["output"][0], model(x, *expected))
