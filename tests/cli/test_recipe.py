"""The recipe in a checkpoint: by it, the network that was trained is made again, or it is told that it is not."""

import re
import time
import uuid
from collections.abc import Callable
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from lightning_kd.cli import main
from lightning_kd.cli.errors import UsageError
from lightning_kd.cli.recipe import UNLIKE, build, plain, recipe_of, unlike
from lightning_kd.cli.saved import Saved


class Act(Enum):
    relu = nn.ReLU
    gelu = nn.GELU


class Text(StrEnum):
    relu = "relu"
    gelu = "gelu"


class Chosen(nn.Module):
    """Of which layers it is made, arguments say that are no plain types."""

    def __init__(
        self,
        num_classes: int,
        act: Act = Act.relu,
        norm: type[nn.Module] = nn.BatchNorm2d,
        dtype: torch.dtype = torch.float32,
        last: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.layer3 = nn.Sequential(
            nn.Conv2d(1, 4, 3, dtype=dtype), norm(4), nn.GELU() if act is Act.gelu else nn.ReLU()
        )
        self.head = nn.Linear(4, num_classes)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.layer3(x).mean((2, 3)))
        return found if self.last is None else self.last(found)


QUICK = [
    "--model.teacher=null", "--model.terms=null", "--teacher_fit=null", "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false", f"--model.student={__name__}.Chosen",
]  # fmt: skip


def test_arguments_that_are_members_of_an_enum_and_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = ["--model.student.act=gelu", "--model.student.norm=torch.nn.Identity"]
    assert main(["fit", "--config", "digits_kd", *QUICK, *chosen, "--traceback"]) == 0
    (saved,) = tmp_path.rglob("*.ckpt")
    assert main(["export", str(saved), "--format", "onnx", "--output", "a.onnx", "--traceback"]) == 0
    state = torch.load(saved, weights_only=True)["state_dict"]
    trained = Chosen(10, Act.gelu, nn.Identity).eval()
    trained.load_state_dict({key.removeprefix("student."): value for key, value in state.items()})
    images = torch.randn(2, 1, 8, 8)
    (found,) = onnxruntime.InferenceSession("a.onnx", providers=["CPUExecutionProvider"]).run(
        None, {"x": images.numpy()}
    )
    torch.testing.assert_close(torch.from_numpy(found), trained(images).detach(), rtol=1e-4, atol=1e-5)
    other = Chosen(10, Act.relu, nn.Identity).eval()
    other.load_state_dict(trained.state_dict())
    assert not torch.allclose(other(images), trained(images), atol=1e-3)


def test_a_function_among_the_arguments_is_told_when_the_fit_begins_and_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "digits_kd", *QUICK, "--model.student.last=torch.relu", "--traceback"]) == 0
    told = "relu, a function, and none is made out of a checkpoint"
    assert "student: lightning-kd export will not make it again: an argument" in (said := capsys.readouterr().out)
    assert told in said
    (saved,) = tmp_path.rglob("*.ckpt")
    assert main(["export", str(saved), "--format", "state_dict"]) == 2
    assert told in (error := capsys.readouterr().err)
    assert error.endswith("an Enum. Load the weights by your own code: teachers.load_weights(network, file)\n")


class Child(Chosen):
    """Gives on what its parent takes, the number of classes among it."""

    def __init__(self, width: PositiveInt = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width


def test_arguments_that_are_given_on_and_restricted_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = [f"--model.student={__name__}.Child", "--model.student.width=3", "--model.student.act=gelu"]
    assert main(["fit", "--config", "digits_kd", *QUICK, *chosen, "--traceback"]) == 0
    assert "will not make it again" not in capsys.readouterr().out
    (saved,) = tmp_path.rglob("*.ckpt")
    made = Saved(saved).model
    assert made.width == 3
    assert isinstance(made.layer3[2], nn.GELU)
    assert made.head.out_features == 10
    assert main(["test", "--config", "digits_kd", *QUICK, *chosen, "--ckpt_path", str(saved), "--traceback"]) == 0


class Holding(nn.Module):
    """Keeps what it was given."""

    class Mode(Enum):
        slow = 1

    def __init__(self, argument: Any = None, weights: Any = None, pretrained: bool = False, **more: Any) -> None:
        super().__init__()
        self.argument, self.weights, self.more = argument, weights, more
        self.auxiliary = nn.Linear(2, 2) if pretrained else None


class Restricted(float):
    """As jsonargparse restricts numbers, and numpy has its own."""


@pytest.mark.parametrize(
    "argument",
    [
        Act.gelu, Text.gelu, Holding.Mode.slow, nn.GELU, torch.float16, (2, (3, Act.relu)), {0: 1.5, Act.gelu: (1,)},
        {"a": [None, True]}, Restricted(2.5), Path("a/b"), "text",
    ],
    ids=str,
)  # fmt: skip
def test_arguments_are_found_again(argument: Any, tmp_path: Path) -> None:
    torch.save(plain({"argument": [argument]}), tmp_path / "a.pt")
    (again,) = build(torch.load(tmp_path / "a.pt", weights_only=True))["argument"]
    assert again == argument
    assert isinstance(argument, type(again))


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({"argument": 1, "more": {"scale": 5.0}}, {}),
        ({"weights": [0.5, 2.0]}, {"weights": [0.5, 2.0]}),  # of its branches
        ({"pretrained": True}, {"pretrained": True}),  # without it a layer is not there
        ({"argument": 1, "weights": None}, {"weights": None}),
    ],
    ids=str,
)
def test_a_recipe_makes_the_network_that_was_trained(
    arguments: dict[str, Any], kept: dict[str, Any], tmp_path: Path
) -> None:
    more = arguments.pop("more", {})
    config = {"class_path": f"{__name__}.Holding", "init_args": arguments, "dict_kwargs": more}
    network = Holding(**arguments, **more)
    torch.save(recipe_of(network, config), tmp_path / "a.pt")
    recipe = torch.load(tmp_path / "a.pt", weights_only=True)
    assert UNLIKE not in recipe
    assert recipe["init_args"].items() >= kept.items()
    assert vars(build(recipe))["more"] == more
    assert unlike(network, recipe) is None


class Pretrained(nn.Module):
    """What its weights know decides constants, too, which no file of weights holds."""

    def __init__(self, how: str, pretrained: bool = False) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(2) if how == "lazy" else nn.Linear(2, 2)
        if how == "buffer":
            self.register_buffer("mean", torch.tensor(0.5 if pretrained else 0.0), persistent=False)
        elif how == "tensor":
            self.mean = torch.tensor(0.5 if pretrained else 0.0)
        elif how == "function":
            self.act = torch.sigmoid if pretrained else torch.relu
        elif how == "each time":
            self.made = object.__hash__(self), time.perf_counter_ns(), uuid.uuid4().hex
        elif how == "drawn":
            nn.utils.parametrizations.weight_norm(self.layer)
            self.drawn = torch.rand(2)
        elif how == "itself":
            self.all: list[Any] = [1]
            self.all.append(self.all)


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("how", ["buffer", "tensor", "function", "each time", "drawn", "itself", "lazy"])
def test_constants_are_those_of_the_network_that_was_trained(how: str, pretrained: bool) -> None:
    arguments = {"how": how, "pretrained": pretrained}
    network = Pretrained(**arguments)
    recipe = recipe_of(network, {"class_path": f"{__name__}.Pretrained", "init_args": arguments})
    assert UNLIKE not in recipe
    asked_again = pretrained and how in ("buffer", "tensor", "function", "drawn")
    assert recipe["init_args"]["pretrained"] == asked_again
    if how != "drawn":
        assert unlike(network, recipe, tensors=True) is None


def test_weights_that_training_started_from_are_left_out_where_the_network_is_the_same_without_them() -> None:
    config = {"class_path": f"{__name__}.Started", "init_args": {"weights": "a.pt"}}
    assert recipe_of(Started("a.pt"), config)["init_args"] == {"weights": None}


class Started(nn.Module):
    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("network", "config", "told"),
    [
        (Holding(lambda: 1), {"init_args": {"argument": len}}, "an argument of the network was .*len, a function"),
        (Holding(2), {"init_args": {"argument": 3}}, "made again, its argument is 3, and was 2"),
        (Holding((2,)), {"init_args": {"argument": [2]}}, r"its argument is \[2\], and was \(2,\)"),
        (Holding({1: 2}), {"init_args": {"argument": {"1": 2}}}, "its argument is {'1': 2}, and was {1: 2}"),
        (Holding(pretrained=True), {"init_args": {}}, "its auxiliary's class is None, and was 'torch.nn.modules.lin"),
        (Holding(float("nan")), {"init_args": {"argument": 1.0}}, "its argument is 1.0, and was nan"),
        (Holding(), {"init_args": {"weights": "b"}, "class_path": "torch.nn.BatchNorm2d"}, "cannot be built"),
    ],
    ids=str,
)
def test_a_network_that_is_not_made_again_is_told(network: nn.Module, config: dict[str, Any], told: str) -> None:
    assert re.search(told, recipe_of(network, {"class_path": f"{__name__}.Holding", **config})[UNLIKE])


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        (
            {"lightning_kd": "enum", "of": f"{__name__}.Act", "name": "tanh"},
            "an argument of the network was .*Act, a enum",
        ),
        ({"lightning_kd": "class", "of": "subprocess.Popen"}, "'subprocess.Popen' is no subclass of torch.nn.Module"),
        ({"lightning_kd": "enum", "of": "subprocess.Popen", "name": "a"}, "'subprocess.Popen' is no subclass of Enum"),
        ({"lightning_kd": "dtype", "of": "load"}, "an argument of the network was load, a dtype"),
        ({"lightning_kd": "function", "of": "os.system"}, "an argument of the network was os.system, a function"),
    ],
)
def test_a_file_makes_nothing_else(argument: dict[str, str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        build({"class_path": f"{__name__}.Chosen", "init_args": {"num_classes": 2, "act": argument}})
