"""What is left of the arguments of a class, when a later source names another."""

import inspect
import json
import pydoc
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_kd.cli import main
from lightning_kd.cli.command import DistillationCLI

ALONE = {"task": {"class_path": "lightning_kd.tasks.Classification", "init_args": {"num_classes": 3}}}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}


def parsed(*arguments: str) -> Any:
    """The whole configuration, as it would be run and printed."""
    return DistillationCLI(list(arguments), run=False, make=False).plain_config


def written(folder: Path, content: Any) -> str:
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        (SGD, {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.0}),
        ({"class_path": "torch.optim.Adadelta"}, {"lr": 1.0, "eps": 1e-6, "weight_decay": 0.0}),
    ],
)
def test_an_optimizer_has_its_own_defaults(given: Any, arguments: dict[str, float], tmp_path: Path) -> None:
    student = {"class_path": "lightning_kd.models.CifarResNet", "init_args": {"depth": 8}}
    data = {"class_path": "lightning_kd.data.Digits"}
    file = written(tmp_path, {"data": data, "model": {**ALONE, "student": student, "optimizer": given}})
    found = parsed("--config", file)["model"]["optimizer"]
    assert found["class_path"] == given["class_path"]
    assert found["init_args"].items() >= arguments.items()


def test_what_is_printed_is_an_optimizer_with_its_own_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, {"model": {"optimizer": SGD}})
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", "digits_kd", "--config", file, "--print_config"])
    optimizer = yaml.safe_load(capsys.readouterr().out)["model"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.SGD"
    assert optimizer["init_args"]["weight_decay"] == 0.0


CALLBACKS = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.mode=max"]
LOGGER = ["--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger", "--trainer.logger.save_dir=a"]


@pytest.mark.parametrize(
    ("key", "name", "given", "kept"),
    [
        ("model.optimizer", "torch.optim.SGD", {"momentum": 0.5}, {"lr": 0.01}),
        ("model.lr_scheduler", "torch.optim.lr_scheduler.ExponentialLR", {"gamma": 0.5}, {}),
        ("model.lr_scheduler", "lightning_kd.schedules.Linear", {"start": 0.5}, {"end": 0.0}),
        ("model.student", "lightning_kd.models.Timm", {"name": "resnet18"}, {}),
        ("model.teacher", "lightning_kd.teachers.EMA", {"decay": 0.9}, {}),
        ("model.teacher.init_args.model", "lightning_kd.models.Timm", {"name": "resnet18"}, {}),
        ("model.task", "lightning_kd.tasks.Segmentation", {"num_classes": 3}, {}),
        ("model.terms.kd.loss", "lightning_kd.losses.DIST", {"beta": 2.0}, {"temperature": 4.0}),
        ("data", "lightning_kd.data.MaskScenes", {"scale": [2, 3]}, {"train_size": 300, "batch_size": 50}),
        ("trainer.logger", "lightning.pytorch.loggers.CSVLogger", {"version": 1}, {"save_dir": "a"}),
        ("trainer.callbacks+", "lightning.pytorch.callbacks.EarlyStopping", {"monitor": "val/loss"}, {}),
    ],
)
def test_of_a_class_that_is_replaced_only_what_was_written_is_kept(
    key: str, name: str, given: dict[str, Any], kept: dict[str, Any]
) -> None:
    arguments = ["--config", "digits_kd", *LOGGER, *CALLBACKS, f"--{key}={name}"]
    found: Any = parsed(*arguments, *(f"--{key.rstrip('+')}.{name}={value}" for name, value in given.items()))
    for part in key.rstrip("+").replace("kd.loss", "kd.init_args.loss").split("."):
        found = found[part]
    found = found[-1] if isinstance(found, list) else found
    assert found["class_path"] == name
    signature = inspect.signature(pydoc.locate(name)).parameters
    linked = inspect.Parameter.empty  # num_classes has no default, and comes from the data
    own = {k: None if signature[k].default is linked else signature[k].default for k in found["init_args"]}
    assert found["init_args"] == json.loads(json.dumps(own | kept | given, default=str))


def test_an_optimizer_that_nobody_named_has_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model.optimizer", "null", "--model.optimizer.init_args.lr", "0.1"]
    assert main(["fit", "--config", "digits_kd", *arguments]) == 2
    assert "Name its class, too: --model.optimizer=torch.optim.AdamW" in capsys.readouterr().err
