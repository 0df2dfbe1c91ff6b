"""What is monitored has to be logged, as far as the rehearsal can tell."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback
from lightning_kd.tasks import Classification
from toy_run import configuration

from lightning_kd.cli import UsageError, main, monitors, teacher
from lightning_kd.cli.command import DistillationCLI

TASK = Classification(10)
LOGGED = ["train/kd", "train/task", "train/loss", "val/loss", "val/accuracy"]


class Own(Callback):
    """Which may log anything, in any epoch."""


class More(Classification):
    """Which logs of its steps what it likes."""

    def values(self) -> dict[str, float]:
        return {}


def watching(monitor: str | None, kind: str = "lightning.pytorch.callbacks.EarlyStopping", **how: Any) -> Any:
    return {"class_path": kind, "init_args": {"monitor": monitor, **how}}


def config(*callbacks: Any, lr_scheduler: Any = None) -> Any:
    return {"trainer": {"callbacks": [*callbacks]}, "model": {"terms": {"kd": {}}, "lr_scheduler": lr_scheduler}}


@pytest.mark.parametrize("monitor", ["val/kd", "train/kd_epoch", "test/accuracy", "val/acuracy", "val_loss"])
def test_what_no_epoch_logs_is_refused(monitor: str) -> None:
    with pytest.raises(UsageError, match=f"EarlyStopping monitors '{monitor}', which is not logged"):
        monitors.refuse(config(watching(monitor)), TASK, LOGGED)
    with pytest.raises(UsageError, match=f"model.lr_scheduler monitors '{monitor}'.* There are: train/kd, train/loss"):
        monitors.refuse(config(lr_scheduler=watching(monitor, "ReduceLROnPlateau")), TASK, LOGGED)


@pytest.mark.parametrize("monitor", ["val/loss", "train/task", "val/iou/cat", "lr-AdamW", "val_other", None])
def test_what_may_be_logged_is_not(monitor: str | None) -> None:
    monitors.refuse(config(watching(monitor)), TASK, LOGGED)
    monitors.refuse(
        config(watching("train/kd")), TASK, [name for name in LOGGED if "kd" not in name]
    )  # it begins later
    monitors.refuse(config(watching("val/mine"), {"class_path": f"{__name__}.Own"}), TASK, LOGGED)
    monitors.refuse(config(watching("val/mine", strict=False)), TASK, LOGGED)
    monitors.refuse(config(watching("train/mine")), More(10), LOGGED)
    monitors.refuse(config(watching("val/mine")), TASK, LOGGED[:3])  # nothing was validated
    monitors.refuse(config(watching("val/mine")), TASK, [])  # of a rehearsal that did not end


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_it_is_told_before_the_teacher_is_trained(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher, "fit", lambda *_: pytest.fail("a teacher was trained"))
    given = ["--config", configuration("mine"), "--trainer.callbacks"]
    assert main([command, *given, json.dumps([watching("val/kd")])]) == 2
    assert "EarlyStopping monitors 'val/kd', which is not logged." in capsys.readouterr().err
    right = json.dumps([watching("val/loss"), watching("val/accuracy", "lightning.pytorch.callbacks.ModelCheckpoint")])
    DistillationCLI([*given, right], run=False, make=False).rehearse()
