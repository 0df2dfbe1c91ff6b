"""What a run of a comparison keeps: the weights that a fit would name, and no logs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection, PearsonCorrCoef, R2Score
from torchmetrics.classification import BinaryAccuracy

from lightning_kd.cli import compare, main, runs
from lightning_kd.cli.command import DistillationCLI
from lightning_kd.cli.compare import read, settings_of
from lightning_kd.models import CifarResNet
from lightning_kd.task import TaskAdapter
from lightning_kd.teachers import load_weights
from lightning_kd.teachers.weights import peers_in

SHORT = [
    "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
]  # fmt: skip
ALONE = ["--config", "digits_kd", "--model.teacher=null", "--model.terms=null", "--teacher_fit=null", *SHORT]
MONITOR = ["--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor"]
BEST = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.monitor=val/loss"]
"""The loss falls, so that by mode=max the first of two epochs is kept."""


def settings(*arguments: str) -> Any:
    return settings_of(DistillationCLI(list(arguments), run=False, make=False))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_callback_that_needs_a_logger_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = runs.fit(settings(*ALONE, *MONITOR), Path("runs"), "one")
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 2
    key = checkpoint.stem
    assert {path.name for path in tmp_path.rglob("*")} == {"runs", f"{key}.ckpt", f"{key}.fit.json"}


def test_it_is_rehearsed_before_the_first_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read("digits_kd", None, [*SHORT, *MONITOR]).rehearse()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("mode", "epoch"), [("max", 0), ("min", 1)])
def test_the_weights_are_those_that_a_fit_names(
    mode: str, epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*ALONE, *BEST, f"--trainer.callbacks.mode={mode}"]
    checkpoint = runs.fit(settings(*arguments), Path("runs"), "one")
    assert "student saved" not in capsys.readouterr().out
    key = checkpoint.stem
    assert {path.name for path in Path("runs").iterdir()} == {f"{key}.ckpt", f"{key}.fit.json"}
    assert main(["fit", *arguments]) == 0
    named = capsys.readouterr().out.partition("student saved: ")[2].strip()
    content, fitted = (torch.load(file, weights_only=True) for file in (checkpoint, named))
    assert content["epoch"] == fitted["epoch"] == epoch
    assert same(content["state_dict"], fitted["state_dict"])
    assert "optimizer_states" not in content


class First(ModelCheckpoint):
    """Keeps the first epoch, and writes beside the logs; it has arguments of its own."""

    def __init__(self, monitor: str = "val/loss") -> None:
        super().__init__(monitor=monitor, mode="max", save_weights_only=True)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        assert trainer.log_dir is not None


def test_a_kind_of_checkpoint_with_arguments_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = runs.fit(settings(*ALONE, f"--trainer.callbacks+={__name__}.First"), Path("runs"), "one")
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 0
    assert {path.name for path in tmp_path.rglob("*")} == {"runs", checkpoint.name, f"{checkpoint.stem}.fit.json"}


def test_a_run_of_a_configuration_that_keeps_the_best_is_no_run_of_the_last_epoch() -> None:
    last, best = settings(*ALONE), settings(*ALONE, *BEST)
    assert not runs._saving(last)
    assert runs._saving(best)
    assert not runs._saving(settings(*ALONE, *BEST, "--trainer.enable_checkpointing=false"))


def test_peers_have_the_weights_of_the_same_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", "digits_mutual", *SHORT, *BEST, "--trainer.callbacks.mode=max"]
    checkpoint = runs.fit(settings(*arguments), Path("runs"), "one")
    assert main(["fit", *arguments]) == 0
    named = capsys.readouterr().out.partition("student saved: ")[2].strip()
    (peer,) = peers_in(torch.load(named, weights_only=True)).values()
    assert same(torch.load(runs.peer_file(checkpoint, 1), weights_only=True), dict(peer["state_dict"]))
    load_weights(CifarResNet(depth=14, width=16, in_channels=1), runs.peer_file(checkpoint, 1))  # as it is measured


class Regression(TaskAdapter):
    def __init__(self, agreement: type[Metric]) -> None:
        super().__init__()
        self.kind = agreement

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        return output.mean()

    def metrics(self) -> MetricCollection:
        return MetricCollection({"mse": MeanSquaredError(), "right": BinaryAccuracy()})

    def agreement(self) -> Metric:
        return self.kind()


class Both(Metric):
    """Computes two errors."""

    higher_is_better = False

    def update(self, student: Tensor, teacher: Tensor) -> None: ...

    def compute(self) -> dict[str, float]:
        return {"near": 0.0, "far": 0.0}


@pytest.mark.parametrize(
    ("agreement", "names", "higher", "fraction"),
    [
        (MeanAbsoluteError, ["agreement"], False, False),
        (PearsonCorrCoef, ["agreement"], None, False),
        (R2Score, ["agreement"], True, False),
        (BinaryAccuracy, ["agreement"], True, True),
        (Both, ["near", "far"], False, True),
    ],
)
def test_an_agreement_is_what_its_metric_says(
    agreement: type[Metric], names: list[str], higher: bool | None, fraction: bool
) -> None:
    task, logged = Regression(agreement), ["loss", "mse", "right", *names]
    own = {"loss": False, "mse": False, "right": True}
    assert runs._asked(task, logged, runs._higher) == own | dict.fromkeys(names, higher)
    assert runs._asked(task, logged, runs._fraction) == own | dict.fromkeys(names, fraction)


def frozen(file: Path | None) -> dict[str, Any]:
    arguments = {"model": "net", "checkpoint": file and str(file)}
    return {"class_path": "lightning_kd.teachers.Frozen", "init_args": arguments}


def test_a_member_of_an_ensemble_or_a_cache_that_is_another_now_is_another_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_KD_DATA", str(tmp_path))
    one, two, folder = tmp_path / "1.ckpt", tmp_path / "2.ckpt", tmp_path / "cache"
    for file in (one, two, folder / "cache.json"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("before")
    cached = {"class_path": "lightning_kd.teachers.Cached", "init_args": {"folder": str(folder), "teacher": None}}
    filling = cached | {"init_args": cached["init_args"] | {"teacher": frozen(one)}}  # what it writes decides nothing
    several = {"init_args": {"teachers": [frozen(one), frozen(None), frozen(Path("$LIGHTNING_KD_DATA", two.name))]}}
    teachers = {"one": frozen(one), "several": several, "cached": cached, "filling": filling}

    def change(file: Path) -> set[str]:
        then = {name: runs._taught({"model": {"teacher": each}}) for name, each in teachers.items()}
        file.write_text("now")
        return {name for name, each in teachers.items() if runs._taught({"model": {"teacher": each}}) != then[name]}

    assert change(two) == {"several"}
    assert change(two) == set()
    assert change(one) == {"one", "several", "filling"}
    assert change(folder / "cache.json") == {"cached"}
    assert runs._taught({"model": {"teacher": frozen(None)}}) == runs._taught({"model": {}}) == {}


def test_students_of_an_earlier_teacher_are_not_found_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "_add_costs", lambda *_: None)
    monkeypatch.setattr(compare, "_draw", lambda *_: False)
    given = ["--trainer.limit_test_batches", "1", "--model.teacher.init_args.checkpoint", "my.ckpt"]

    def trained(*how: str) -> tuple[list[str], str]:
        """Which students were trained, and what was measured of them."""
        assert main(["compare", "--config", "digits_kd", *SHORT, *given, *how, "--output", "out", "--traceback"]) == 0
        lines = [line.partition(": training") for line in capsys.readouterr().out.splitlines()]
        return [name for name, training, _ in lines if training], Path("out", "runs.csv").read_text()

    measured = []
    for seed, students in ((0, ["digits_kd, seed 0", "student alone, seed 0"]), (1, ["digits_kd, seed 0"]), (1, [])):
        torch.manual_seed(seed)
        torch.save(CifarResNet(depth=14, width=16, in_channels=1).state_dict(), "my.ckpt")
        found, numbers = trained("--teacher_fit", "null")
        assert found == students
        measured.append(numbers.splitlines())
    assert measured[0][1] != measured[1][1]  # the teacher, and how often the student alone agrees with it
    assert measured[0][2] != measured[1][2]
    assert measured[1] == measured[2]
    Path("my.ckpt").unlink()
    assert trained("--teacher_fit.max_epochs", "1")[0] == ["digits_kd, seed 0"]
