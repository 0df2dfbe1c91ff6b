"""What is written down for a teacher's own training, and for the runs of a comparison, makes the same network again."""

import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from torch import nn

from lightning_kd.cli import main
from lightning_kd.cli.command import DistillationCLI
from lightning_kd.cli.errors import UsageError
from lightning_kd.cli.lasting import lasting

HERE = f"{__name__}."
NET = """
from enum import Enum
from torch import nn

class Act(Enum):
    relu = "relu"
    tanh = "tanh"

SEEN = []

class Net(nn.Module):
    def __init__(self, act=Act.tanh, size=(1, 2), table={1: 4.0}, norm=nn.BatchNorm2d, last=nn.ReLU(), num_classes=10):
        super().__init__()
        SEEN.append((act, size, table, norm, last.__class__))
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.ReLU())
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))
"""
NAMES = (f"net_of_defaults_{number}" for number in itertools.count())
"""Of modules: Python keeps what it imported."""


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module of a network whose arguments have no types, in the folder one stands in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    module = next(NAMES)
    Path(f"{module}.py").write_text(NET)
    return module


def config(module: str, **arguments: Any) -> str:
    """A configuration in which that network teaches itself; the file's name."""
    network = {"class_path": f"{module}.Net", "init_args": arguments}
    frozen = {"model": network, "checkpoint": "teacher.ckpt"}
    given = {
        "data": {"class_path": "lightning_kd.data.Digits"},
        "trainer": {
            "max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1,
            "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": [{
                "class_path": "lightning.pytorch.callbacks.StochasticWeightAveraging", "init_args": {"swa_lrs": 0.1},
            }],
        },
        "model": {
            "task": {"class_path": "lightning_kd.tasks.Classification"},
            "student": network,
            "teacher": {"class_path": "lightning_kd.teachers.Frozen", "init_args": frozen},
            "terms": {"kd": {"loss": {"class_path": "lightning_kd.losses.KD"}}},
        },
        "teacher_fit": {"max_epochs": 1, "lr": 0.01},
    }  # fmt: skip
    Path("mine.yaml").write_text(yaml.safe_dump(given))
    return "mine.yaml"


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_untyped_defaults_are_the_same_in_every_run(command: str, name: str) -> None:
    assert main([command, "--config", config(name), "--traceback"]) == 0
    module = sys.modules[name]
    assert len(module.SEEN) > 3
    for seen in module.SEEN:
        assert seen == (module.Act.tanh, (1, 2), {1: 4.0}, nn.BatchNorm2d, nn.ReLU)
    written = [json.loads(file.read_text()) for file in Path().rglob("*.json")]
    assert len(written) > 0
    assert "Unable to serialize" not in json.dumps(written)


def test_what_is_written_beside_a_run_makes_it_again(name: str) -> None:
    assert main(["fit", "--config", config(name), "--traceback"]) == 0
    sys.modules[name].SEEN.clear()
    (file,) = Path().rglob("config.yaml")
    assert main(["fit", "--config", str(file), "--traceback"]) == 0
    assert {str(seen) for seen in sys.modules[name].SEEN} == {
        str((sys.modules[name].Act.tanh, (1, 2), {1: 4.0}, nn.BatchNorm2d, nn.ReLU))
    }


def test_what_was_given_and_would_become_something_else_is_told(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config", config(name, table={2: 1.0})]
    for command in ("fit", "compare"):
        assert main([command, *given]) == 2
        told = capsys.readouterr().err
        assert "init_args.table: {2: 1.0} is written down for a run, and would be read again as {'2'" in told
        assert f"Give the argument of {name}.Net a type" in told
    assert main(["fit", *given, "--teacher_fit=null", "--model.teacher=null", "--model.terms=null"]) == 0


PART = partial(nn.ReLU, True)


class Taking(nn.Module):
    """Of its arguments some have types."""

    def __init__(
        self, pair: tuple[int, int] = (1, 2), function=torch.tanh, part=PART, other=(1,), text="a"
    ) -> None:  # fmt: skip
        super().__init__()


def node(**arguments: Any) -> Namespace:
    return Namespace(class_path=f"{HERE}Taking", init_args=Namespace(**arguments))


def test_only_defaults_that_are_lost_are_left_out() -> None:
    default = {"pair": (1, 2), "function": torch.tanh, "part": partial(nn.ReLU, True), "other": (1,), "text": "a"}
    found = lasting(Namespace(model=Namespace(networks=[node(**default)])), strict=True)
    assert found.model.networks[0].init_args == Namespace(pair=(1, 2), text="a")
    assert lasting(node(function="torch.relu", other=[1])).init_args == Namespace(function="torch.relu", other=[1])


@pytest.mark.parametrize(("argument", "value"), [("function", torch.relu), ("other", (2,)), ("function", nn.ReLU)])
def test_no_other_value_is_left_out(argument: str, value: Any) -> None:
    assert lasting(node(**{argument: value})).init_args == Namespace(**{argument: value})
    with pytest.raises(UsageError, match=rf"^init_args.{argument}: .*(would be read again as|cannot be read again)"):
        lasting(node(**{argument: value}), strict=True)


def test_the_shipped_configuration_is_written_whole() -> None:
    cli = DistillationCLI(["--config", "digits_kd"], run=False, make=False)
    assert lasting(cli.own_config, strict=True) == cli.own_config
