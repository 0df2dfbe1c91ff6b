"""What the data say once: where they do not, and nobody wrote it, that is told before a network is made with None."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from lightning_kd.tasks import Classification
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd.cli import main

THREE = {"num_classes": 3}


class Silent(LightningDataModule):
    """Which has no attribute ``num_classes``."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(8, 6), torch.arange(8) % 3), batch_size=4)

    val_dataloader = train_dataloader


class Late(Silent):
    """Which has it when the networks are made already."""

    def setup(self, stage: str) -> None:
        self.num_classes = 3


class Net(nn.Sequential):
    """Which takes any value, and says nothing."""

    def __init__(self, num_classes: int, width: int = 3) -> None:
        super().__init__(nn.Linear(6, width))
        self.num_classes = num_classes


class Child(Net):
    """Which gives on what it does not name."""

    def __init__(self, width: int = 3, **more: Any) -> None:
        super().__init__(width=width, **more)


class Labels(nn.Sequential):
    """Which calls them otherwise, and has no type of them."""

    def __init__(self, num_labels) -> None:  # type: ignore[no-untyped-def]
        super().__init__(nn.Linear(6, 3))


class Three(nn.Sequential):
    """Which has a number of its own."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(nn.Linear(6, num_classes))


class Unsure(nn.Sequential):
    """Which may be told that there are none."""

    def __init__(self, num_classes: int | None) -> None:
        super().__init__(nn.Linear(6, num_classes or 3))


class Needy(Classification):
    """A task of one's own, without a default."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes or 3)


def fit(student: Any, teacher: Any = None, data: str = "Silent", task: Any = None) -> int:
    """What a run of one batch ends with; classes without a dot are of this file."""
    own = task or spec("lightning_kd.tasks.Classification", **THREE)
    model = {"task": own, "student": student}
    if teacher:
        model |= {"teacher": teacher, "terms": {"kd": {"loss": spec("lightning_kd.losses.KD")}}}
    Path("mine.json").write_text(json.dumps({"data": spec(data), "model": model}))
    return main(["fit", "--config", "mine.json", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"])


def spec(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name if "." in name else f"{__name__}.{name}", "init_args": arguments}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"student": spec("Net")}, "model.student: {}.Net needs num_classes"),
        ({"student": spec("Net"), "data": "Late"}, "model.student: {}.Net needs num_classes"),
        ({"student": spec("Child", width=5)}, "model.student: {}.Child needs num_classes"),
        ({"student": spec("Labels")}, "model.student: {}.Labels needs num_labels"),
        (
            {"student": spec("Net", **THREE), "teacher": spec("Child", width=5)},
            "model.teacher: {}.Child needs num_classes",
        ),
        (
            {"student": spec("Net", **THREE), "teacher": spec("lightning_kd.teachers.Frozen", model=spec("Net"))},
            "model.teacher.init_args.model: {}.Net needs num_classes",
        ),
        ({"student": spec("Three"), "task": spec("Needy")}, "model.task: {}.Needy needs num_classes"),
    ],
)
def test_a_number_that_is_nowhere_is_told(
    given: dict[str, Any],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fit(**given) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    data = given.get("data", "Silent")
    assert f"error: {told.format(__name__)}, which is not written, and the data, {data}, have no" in error
    assert "have no attribute num_classes to take it from. Give them one, in __init__ or on the class" in error


def test_the_default_of_a_class_is_taken_where_the_data_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fit(spec("Three"), teacher=spec("Three")) == 0
    assert fit(spec("Unsure", num_classes=None), teacher=spec("Three")) == 0
