import json
import logging
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar
from torch.utils.data import DataLoader

from lightning_kd import __version__
from lightning_kd.cli import export, main, teacher
from lightning_kd.cli.errors import UsageError
from lightning_kd.cli.listing import KINDS, members
from lightning_kd.cli.progress import progress
from lightning_kd.data import Digits
from lightning_kd.models import CifarResNet
from lightning_kd.predictions import TorchFile

SMALL = [
    "--trainer.max_epochs", "2", "--teacher_fit.max_epochs", "2",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
]  # fmt: skip
ALONE = ["--model.teacher", "null", "--model.terms", "null", "--teacher_fit", "null"]
OWN_SCHEDULER = "--teacher_fit.lr_scheduler"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``fit --config digits_kd`` was run, from nothing."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "digits_kd", *SMALL, "--traceback"]) == 0
    return folder


def student(trained: Path) -> Path:
    (found,) = (trained / "runs").rglob("*.ckpt")
    return found


def test_fit_trains_the_teacher_first_and_logs_side_by_side(trained: Path) -> None:
    assert (trained / "checkpoints" / "digits_teacher.ckpt").is_file()
    assert (trained / "checkpoints" / "digits_teacher.ckpt.json").is_file()
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == [
        "digits_teacher.ckpt",
        "digits_teacher.ckpt.json",
    ]
    run = trained / "runs" / "digits_kd" / "version_0"
    assert (run / "metrics.csv").is_file()
    assert (run / "config.yaml").is_file()
    assert list(run.glob("events.out.tfevents*"))
    assert {"train/kd", "train/task", "train/loss"} <= set((run / "metrics.csv").read_text().split("\n")[0].split(","))


def test_a_checkpoint_holds_the_student_and_its_recipe_only(trained: Path) -> None:
    content = torch.load(student(trained), weights_only=True)
    assert all(key.startswith("student.") for key in content["state_dict"])
    assert content["lightning_kd"]["student"]["init_args"]["num_classes"] == 10
    assert content["lightning_kd"]["inputs"] == [[[1, 8, 8], "float32"]]


def test_a_teacher_that_is_there_is_loaded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "digits_kd", *SMALL, "--trainer.fast_dev_run", "true"]) == 0
    assert "trained before" in capsys.readouterr().out
    assert main(["fit", "--config", "digits_kd", *SMALL, "--data.init_args.train_size", "200"]) == 2
    assert "train_size: 300 then, 200 now" in capsys.readouterr().err


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_test_measures_agreement_with_the_teacher_and_writes_nothing(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    before = files(trained)
    assert main(["test", "--config", "digits_kd", "--ckpt_path", str(student(trained))]) == 0
    assert "test/agreement" in capsys.readouterr().out
    assert files(trained) == before


def test_predict_writes_one_prediction_per_image(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    before, output = files(trained), tmp_path / "new" / "predictions.pt"
    arguments = ["--ckpt_path", str(student(trained)), "--output", str(output)]
    assert main(["predict", "--config", "digits_kd", *arguments]) == 0
    assert f"predictions saved: {output}" in capsys.readouterr().out
    predictions = torch.load(output, weights_only=True)
    assert predictions.shape == (1797 - 300 - 200, 10)
    torch.testing.assert_close(predictions.sum(dim=1), torch.ones(len(predictions)))
    assert files(trained) == before


def test_predict_writes_nothing_else_than_it_says(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    before, arguments = files(trained), ["predict", "--config", "digits_kd", "--ckpt_path", str(student(trained))]
    assert main([*arguments, "--output", "predictions.csv"]) == 2
    assert "--output: expected a file that ends in .pt, received predictions.csv" in capsys.readouterr().err
    assert main([*arguments, "--trainer.fast_dev_run", "true"]) == 0
    assert "predictions: of a fast_dev_run none are written to predictions" in capsys.readouterr().out
    assert files(trained) == before


def test_data_that_know_their_classes_too_late_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Digits, "num_classes", None)
    assert main(["fit", "--config", "digits_kd", *ALONE]) == 2
    assert "error: data.num_classes is None: the networks are made with it, before setup()" in capsys.readouterr().err


def test_predict_does_not_write_over_the_checkpoint(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    file = student(trained)
    arguments = ["--ckpt_path", str(file), "--output", str(file)]
    assert main(["predict", "--config", "digits_kd", *arguments]) == 2
    assert "is the checkpoint itself" in capsys.readouterr().err
    torch.load(file, weights_only=True)["state_dict"]


def test_a_teacher_cannot_be_saved_to_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher, "fit", lambda *_: pytest.fail("a teacher was trained"))
    Path("folder").mkdir()
    arguments = ["--model.teacher.init_args.checkpoint", "folder"]
    assert main(["fit", "--config", "digits_kd", *SMALL, *arguments]) == 2
    assert "expected a file, received the folder folder" in capsys.readouterr().err


def test_a_checkpoint_of_another_network_is_told(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    arguments = ["--ckpt_path", str(student(trained)), "--model.student.init_args.width", "8"]
    assert main(["test", "--config", "digits_kd", *arguments]) == 2
    assert "of another network: size mismatch for student.conv1.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--model.terms.kd.weight", "-1"], "weight is a finite number"),
        (["--model.terms.kd.student", "layer5"], "has no module 'layer5'"),
        (["--model.terms.kd.student", "layer3", "--model.terms.kd.teacher", "layer3"], "must have the same shape"),
        (["--data", "lightning.LightningDataModule"], "num_classes is missing"),
        (["--teacher_fit.max_epochs", "0"], "max_epochs"),
        (["--data.init_args.train_size", "20"], "the training data gives no batch"),
    ],
)
def test_mistakes_are_told_before_the_teacher_is_trained(
    wrong: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher, "fit", lambda *_: pytest.fail("a teacher was trained"))
    assert main(["fit", "--config", "digits_kd", *SMALL, *wrong]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dev_run_trains_no_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "digits_kd", *SMALL, "--trainer.fast_dev_run", "true"]) == 0
    assert "an untrained one stands in" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:You are trying to .self.log:UserWarning")  # Lightning's, of any module that logs
def test_a_barebones_run_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.barebones", "true", "--trainer.limit_train_batches", "1", "--trainer.max_epochs", "1"]
    assert main(["fit", "--config", "digits_kd", *ALONE, *options, "--traceback"]) == 0
    assert not list(tmp_path.iterdir())


def test_what_is_only_shown_decides_no_run() -> None:
    settings = {"seed_everything": 0, "trainer": {"max_epochs": 2, "log_every_n_steps": 5}}
    shown = {"max_epochs": 2, "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False}
    assert teacher.fingerprint(settings) == teacher.fingerprint(settings | {"trainer": shown})
    assert teacher.fingerprint(settings) != teacher.fingerprint(settings | {"trainer": shown | {"max_epochs": 3}})


def test_how_data_are_loaded_decides_no_run(tmp_path: Path) -> None:
    def settings(**given: Any) -> dict[str, Any]:
        return {"data": {"class_path": "mine.Data", "init_args": {"root": "a", **given}}}

    quick = {"num_workers": 4, "pin_memory": True, "persistent_workers": True, "prefetch_factor": 8}
    slow = {"num_workers": 0, "pin_memory": False, "persistent_workers": False, "prefetch_factor": None}
    assert teacher.fingerprint(settings(**quick)) == teacher.fingerprint(settings(**slow))
    assert teacher.fingerprint(settings(**quick)) != teacher.fingerprint(settings(**quick, size=8))
    (tmp_path / "a.ckpt.json").write_text(json.dumps(settings(num_workers=4)))
    teacher.check(tmp_path / "a.ckpt", settings(**slow))
    with pytest.raises(UsageError, match=r"other settings \(data\.init_args\.root: a then, b now\)"):
        teacher.check(tmp_path / "a.ckpt", settings(**slow | {"root": "b"}))


@pytest.mark.parametrize("content", [b"hello", pickle.dumps(Path), {"a": torch.zeros(1)}, None])
def test_a_ckpt_path_that_is_no_checkpoint_is_told(
    content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("a.ckpt").write_bytes(content)
    elif content is not None:
        torch.save(content, "a.ckpt")
    assert main(["fit", "--config", "digits_kd", "--ckpt_path", "a.ckpt"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "a.ckpt" in error


def test_a_checkpoint_of_a_module_of_ones_own_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.ckpt"
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0", "hyper_parameters": {"backbone": "a"}}, file)
    assert main(["test", "--config", "digits_kd", *ALONE, "--ckpt_path", str(file)]) == 2
    assert "own.ckpt does not say which network it holds: give a .ckpt that" in capsys.readouterr().err


class ByPosition(Digits):
    """Gives its batch size by position, with which Lightning cannot make the DataLoader anew."""

    def predict_dataloader(self) -> Any:
        return DataLoader(self.test_dataloader().dataset, 100)


def test_a_batch_size_by_position_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", f"{__name__}.ByPosition", "--output", "null"]
    assert main(["predict", "--config", "digits_kd", *ALONE, *given]) == 2
    assert "in your predict_dataloader give batch_size= by name" in capsys.readouterr().err


class Nowhere(Digits):
    """Looks for its data in a folder that is not there."""

    def setup(self, stage: str) -> None:
        os.listdir("nowhere/train")


class NowhereAtOnce(Digits):
    """Looks for it when it is made."""

    def __init__(self) -> None:
        super().__init__()
        os.listdir("nowhere/train")


@pytest.mark.parametrize("data", ["Nowhere", "NowhereAtOnce"])
def test_a_folder_that_is_not_there_is_told_with_where_it_was_looked_from(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["test", "--config", "digits_kd", *ALONE, "--data", f"{__name__}.{data}"]) == 2
    assert f"No such file or directory: 'nowhere/train' (looked from {str(tmp_path)!r})" in capsys.readouterr().err


def test_a_last_checkpoint_that_is_not_there_is_no_fresh_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = ["--model.teacher=null", "--model.terms=null", "--teacher_fit=null"]
    assert main(["test", "--config", "digits_kd", *alone, "--ckpt_path", "last"]) == 2
    assert "there is no last checkpoint available" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_that_is_over_is_not_gone_on_with(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "checkpoints", "checkpoints")
    resume = ["fit", "--config", "digits_kd", *SMALL, "--ckpt_path", str(student(trained))]
    for epochs in ("1", "2"):
        assert main([*resume, "--trainer.max_epochs", epochs]) == 2
        told = capsys.readouterr()
        assert (
            f"that run was over, and nothing was trained: it has made 12 steps, and max_epochs is {epochs}" in told.err
        )
        assert "student saved" not in told.out
    assert main([*resume, "--trainer.max_epochs", "3"]) == 0


def test_weights_alone_are_no_run_to_go_on_with(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    whole = torch.load(student(trained), weights_only=True)
    torch.save({k: v for k, v in whole.items() if k not in ("optimizer_states", "lr_schedulers")}, tmp_path / "a.ckpt")
    assert main(["fit", "--config", "digits_kd", *SMALL, "--ckpt_path", str(tmp_path / "a.ckpt")]) == 2
    assert "a.ckpt holds weights alone" in capsys.readouterr().err


def test_without_a_checkpoint_it_is_said_which_weights_are_measured(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    assert main(["validate", "--config", "digits_kd", *ALONE, "--trainer.limit_val_batches", "1"]) == 0
    assert "without --ckpt_path the student has the weights that it is made with" in capsys.readouterr().err
    file = ["--ckpt_path", str(student(trained))]
    assert main(["validate", "--config", "digits_kd", *ALONE, "--trainer.limit_val_batches", "1", *file]) == 0
    assert "without --ckpt_path" not in capsys.readouterr().err


def test_a_mistyped_folder_is_not_another_teacher(tmp_path: Path) -> None:
    file, data = tmp_path / "teacher.ckpt", tmp_path / "images"
    data.mkdir()
    (tmp_path / "teacher.ckpt.json").write_text(json.dumps({"data": {"folder": str(data)}}))
    with pytest.raises(UsageError, match=r"data\.folder: there is no .*imagse \(looked from"):
        teacher.check(file, {"data": {"folder": str(tmp_path / "imagse")}})
    with pytest.raises(UsageError, match="was trained with other settings"):
        teacher.check(file, {"data": {"folder": str(tmp_path)}})


def test_a_record_of_a_teacher_that_is_broken_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt.json").write_text("{")
    with pytest.raises(UsageError, match=r"a\.ckpt\.json, the record of how the teacher was trained, cannot be read"):
        teacher.check(tmp_path / "a.ckpt", {})


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--seeds", "0", "-1"], "--seeds: expected integers from 0 to 4294967295, received -1"),
        (["--seeds", "1", "0", "1"], "--seeds: expected different ones, received 1 twice"),
        (["--config", "digits_kd", "digits_kd"], "--config: expected different ones, received digits_kd twice"),
    ],
)
def test_compare_refuses_what_it_would_merge(wrong: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--config", "digits_kd", *wrong]) == 2
    assert told in capsys.readouterr().err


def test_the_last_epoch_is_saved_where_none_validates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        "--trainer.max_epochs",
        "2",
        "--trainer.check_val_every_n_epoch",
        "3",
        "--data.init_args.train_size",
        "50",
    ]
    assert main(["fit", "--config", "digits_kd", *ALONE, *options, "--trainer.enable_progress_bar", "false"]) == 0
    (saved,) = Path("runs").rglob("*.ckpt")
    assert torch.load(saved, weights_only=True)["epoch"] == 1


def test_compare_leaves_lightnings_loggers_as_they_were(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.INFO)
    assert main(["compare", "--config", "nowhere"]) == 2
    assert all(logger.level == logging.INFO for logger in loggers)


def test_compare_looks_at_everything_before_it_trains(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher, "fit", lambda *_: pytest.fail("a teacher was trained"))
    wrong = ["--student-ckpt", str(student(trained)), "--model.student.init_args.width", "8"]
    assert main(["compare", "--config", "digits_kd", *SMALL, *wrong]) == 2
    assert "does not fit CifarResNet" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_away_from_a_terminal_an_epoch_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        "--trainer.enable_progress_bar",
        "null",
        "--trainer.logger",
        "false",
        "--trainer.enable_checkpointing=false",
    ]
    assert main(["fit", "--config", "digits_kd", *SMALL, *ALONE, *options]) == 0
    told = capsys.readouterr()
    assert [line.partition(":")[0] for line in told.out.splitlines()] == ["epoch 1", "epoch 2"]
    assert "loss" in told.out
    assert "val/accuracy" in told.out
    assert "it/s" not in told.err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(progress(), ProgressBar)


@pytest.mark.parametrize("form", ["onnx", "torchscript", "state_dict"])
def test_export_survives_moving_the_checkpoint(
    form: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copy(student(trained), tmp_path / "moved.ckpt")
    output = tmp_path / f"student.{form}"
    assert main(["export", str(moved), "--format", form, "--output", str(output)]) == 0
    assert "largest difference" in capsys.readouterr().out
    assert output.stat().st_size > 10_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moved.ckpt", f"student.{form}"]


def test_export_leaves_no_file_that_failed_the_check(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(student(trained)), "--format", "onnx", "--output", str(tmp_path / "student.onnx")]
    monkeypatch.setattr(export, "_difference", lambda *_: 0.5)
    assert main(arguments) == 2
    assert "differs by 0.5 (--tolerance is 0.0001)" in capsys.readouterr().err
    assert main([*arguments, "--tolerance=-1"]) == 2
    assert "--tolerance: expected a number that is not negative" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_names_other_code_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(student(trained), weights_only=True)
    content["lightning_kd"]["student"] = {"class_path": "os.system", "init_args": {"command": "touch harm"}}
    torch.save(content, tmp_path / "evil.ckpt")
    assert main(["export", str(tmp_path / "evil.ckpt"), "--format", "onnx"]) == 2
    assert "refused: 'os.system'" in capsys.readouterr().err


def test_who_reads_a_part_of_the_list_is_told_of_no_error() -> None:
    listing = [sys.executable, "-m", "lightning_kd", "list"]
    with subprocess.Popen(listing, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read()
    assert told == b""
    assert process.returncode == 141  # as a shell says it of what a closed pipe ended


def test_compare_trains_once_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", "--config", "digits_kd", *SMALL, "--output", "out"]
    assert main([*arguments, "--traceback", "--seeds", "0"]) == 0
    assert "cannot be told" in capsys.readouterr().out
    assert main([*arguments, "--seeds", "0", "1"]) == 0
    out = capsys.readouterr().out
    assert "student alone, seed 0: trained before" in out
    assert "digits_kd, seed 1: training" in out
    assert "over 2 seeds" in out
    saved = {"comparison.md", "comparison.csv", "comparison.png", "examples.png", "runs.csv"}
    assert saved <= {p.name for p in Path("out").iterdir()}
    assert len(Path("out", "runs.csv").read_text().splitlines()) == 1 + 1 + 2 + 2

    (measured, *_) = sorted(path for path in Path("out", "runs").glob("*.json") if path.name.count(".") == 1)
    whole = measured.read_text()
    measured.write_text(whole[:50])  # is measured again, and nothing is trained
    assert main([*arguments, "--seeds", "0", "1"]) == 0
    assert "training" not in capsys.readouterr().out
    assert measured.read_text() == whole


def test_compare_takes_a_teacher_whose_network_brings_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = ["--teacher_fit", "null", "--model.teacher.init_args.checkpoint", "null", "--trainer.max_epochs", "1"]
    assert main(["compare", "--config", "digits_kd", *SMALL[4:], *own, "--output", "out", "--traceback"]) == 0
    assert "teacher: no checkpoint is given; it has the weights that its network brings" in capsys.readouterr().out
    assert [line.split(",")[0] for line in Path("out", "comparison.csv").read_text().splitlines()[1:]] == [
        "teacher", "student alone", "digits_kd",
    ]  # fmt: skip
    assert not Path("checkpoints").exists()


@pytest.mark.slow
def test_a_peer_is_exported_tested_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--config", "digits_mutual", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", *short, "--traceback"]) == 0
    checkpoint = str(next(Path("runs").rglob("*.ckpt")))
    assert main(["export", checkpoint, "--format", "state_dict", "--peer", "1"]) == 0
    (exported,) = Path("runs").rglob("*.peer1.state_dict.pt")
    peer = CifarResNet(depth=14, width=16, in_channels=1)
    peer.load_state_dict(torch.load(exported, weights_only=True))
    for wrong in ("2", "-1"):
        capsys.readouterr()
        assert main(["export", checkpoint, "--format", "state_dict", "--peer", wrong]) == 2
        assert f"holds 1 peers of the student, received {wrong}" in capsys.readouterr().err

    data = Digits(train_size=300, batch_size=50)
    data.setup("test")
    normalised = lambda x: data.on_after_batch_transfer((x, x), 0)[0]  # noqa: E731
    batches = [(peer.eval()(normalised(x)).argmax(1) == y) for x, y in data.test_dataloader()]
    accuracy = float(torch.cat(batches).float().mean())
    assert main(["compare", *short, "--output", "out", "--traceback"]) == 0
    rows = [line.rsplit(",", 4) for line in Path("out", "runs.csv").read_text().splitlines()[1:]]
    measured = {name.strip('"'): float(value) for name, _, _, value, _ in rows}
    assert list(measured) == [
        "student alone", "digits_mutual, peer 1 alone", "digits_mutual", "digits_mutual, peer 1",
    ]  # fmt: skip
    assert measured["digits_mutual, peer 1"] == pytest.approx(accuracy)
    capsys.readouterr()
    assert main(["compare", *short, "--output", "out"]) == 0
    assert capsys.readouterr().out.count("trained before") == 3
    assert main(["test", "--config", "digits_mutual", "--ckpt_path", checkpoint]) == 0
    (printed,) = re.findall(r"peer1/test/accuracy\D*(\S+)", capsys.readouterr().out)
    assert float(printed) == pytest.approx(accuracy, rel=1e-6)  # of float32


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fit", "--config", "digits_kdd"], "Did you mean digits_kd"),
        (["fitt"], "Did you mean fit"),
        (["list", "loses"], "Did you mean losses"),
        (["export", "none.ckpt", "--format", "onnx"], "no checkpoint at none.ckpt"),
        (["export", "none.ckpt", "--format", "tflite"], "expected one of onnx"),
        (["compare", "--config", "digits_kd", "--teacher", "none.ckpt"], "no checkpoint at none.ckpt"),
        (["fit", "--config", "digits_kd", *ALONE, "--model.student.init_args.depth", "9"], "error: expected a depth"),
        (["fit", "--config", "digits_kd", "--trainer.max_epoch", "3"], "Did you mean max_epochs"),
        (["fit", "--config", "digits_kd", "--model.terms.kd.init_args.wieght", "2"], "Did you mean weight?"),
        (["fit", "--config", "digits_kd", "--model.terms.kd.loss.init_args.temprature=2"], "Did you mean temperature?"),
        (["fit", "--config", "cifar10_kd", *ALONE, "--trainer.max_epochs=1"], "set LIGHTNING_KD_DATA (or "),
        (
            ["fit", "--config", "cifar10_kd", "--trainer.max_epochs=1"],
            "set LIGHTNING_KD_DATA to the folder with weights/",
        ),
        (
            ["fit", "--config", "digits_kd", "--model.terms.dk.weight=0.5"],
            "error: term 'dk' has no loss; the terms with one are: kd. Did you mean kd?\n",
        ),
        (
            [
                "fit",
                "--config",
                "digits_kd",
                *(f"--teacher_fit.lr_scheduler{each}" for each in ("=StepLR", ".step_size=1")),
            ],
            "teacher_fit: lr_scheduler: an argument, and no class for it. Give both in one value: '{class_path",
        ),
        (["fit", "--config", "digits_kd", "--max_epochs", "3"], "Did you mean trainer.max_epochs?"),
        (["fit", "mine.yaml"], "Did you mean --config mine.yaml?"),
        (["fit"], "error: expected --config NAME_OR_FILE, one of `lightning-kd list configs` or your own; got none"),
        (["fit", "--model.student.help", "CifarResNe"], "Did you mean CifarResNet?"),
        (["fit", "--config", "digits_kd", "--model.terms.kd.loss", "DDK"], "Did you mean DKD?"),
        (["fit", "--config", "digits_kd", "--model.terms.kd.weight", "0,9"], "weight: Expected float, the name of a"),
        (["fit", "--config", "digits_kd", "--model.lr_scheduler", "Cosin"], "Did you mean Cosine"),
        (["fit", "--config", "digits_kd", "--trainer.precision", "fp16"], "'bf16-mixed'"),
        (
            ["fit", "--config", "digits_kd", "--model.teacher.init_args.checkpoint=null"],
            "teacher_fit trains a teacher th",
        ),
        (
            ["fit", "--config", "digits_kd", "--model.teacher=CifarResNet", "--model.teacher.init_args.depth=8"],
            "teacher_fit trains a teacher that has a",
        ),
        (["compare", "--config", "digits_kd", "--trainer.fast_dev_run=true"], "compare trains whole runs"),
        (["test", "--config", "digits_kd"], "error: No checkpoint at 'checkpoints/digits_teacher.ckpt'"),
    ],
)
def test_bad_input_is_told_with_exit_code_2(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_KD_DATA", "elsewhere")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loss_that_gets_no_projector_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        "model: {terms: {mse: {loss: {class_path: torch.nn.MSELoss}, student: layer3, teacher: layer3}}}"
    )
    assert main(["fit", "--config", "digits_kd", "--config", "mine.yaml"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "The student's 'layer3' is" in error
    assert "MSELoss gets no projector where these differ. Take a loss that does" in error
    assert error.endswith("This happened in the distillation term 'mse'.")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("model:\n  task: [1\n", "mine.yaml, line 3, column 1: this is not YAML, "),
        ("", "mine.yaml: expected keys and values (trainer:, data:, model:), received an empty file"),
        ("- a\n- b\n", "received a list"),
        ("trianer: {max_epochs: 3}", "Did you mean trainer"),
        ("trainer: {max_epoch: 3}", "Did you mean max_epochs"),
        ("model: {term: {kd: {weight: 1.0}}}", "Did you mean terms?"),
        ("model: {task: {class_path: lightning_kd.tasks.Clasification}}", "Did you mean Classification?"),
        ("model: {terms: {kd: {loss: {class_path: lightning_kd.losses.RDK}}}}", "Did you mean RKD"),
        (
            "trainer: {callbacks: [{class_path: lightning_kd.callbacks.TeacherCache, folder: a}]}",
            "trainer.callbacks.0: folder beside class_path: expected the arguments of lightning_kd.callbacks.Te",
        ),
        (
            "model: {terms: {kd: {class_path: lightning_kd.losses.DKD}}}",
            "Did you mean loss: {class_path: lightning_kd.losses.DKD}, one level deeper?",
        ),
        ("model: {task_weight: none}", "model.task_weight: Expected float, the name of a class; got none"),
        ("model: {task_weight: {class_path: Linear, init_args: {end: 0.0}}}", "Option 'start' is required"),
        ("model: {terms: {kd: {weight: 1.0}, kd: {weight: 2.0}}}", "mine.yaml, line 1: kd stands there twice"),
        ("model: {terms: {dk: {weight: 1.0}}}", "term 'dk' has no loss; the terms with one are: kd. Did you mean kd?"),
        ("model: {terms: {kd: 3}}", "error: model.terms: "),
        ("model: 3", "error: "),
        (
            "model: {terms: {kd: {loss: {class_path: lightning_kd.losses.KD, init_args: {T: 2}}}}}",
            "Option 'T' is not accepted. This happened in the distillation term 'kd'.\n",
        ),
        (
            "model: {terms: {kd: {loss: {class_path: lightning_kd.losses.KD, init_args: {temperature: hot}}}}}",
            "Got value: hot. This happened in the distillation term 'kd'.\n",
        ),
        (
            "model: {terms: {b: {loss: {class_path: lightning_kd.losses.KD, init_args: {temperature: -1.0}}}}}",
            "number, got -1.0. This happened in the distillation term 'b'.\n",
        ),
        ("model: {terms: {kd: {weight: -1.0}}}", "got -1.0. This happened in the distillation term 'kd'.\n"),
        (
            "model: {class_path: mine.Lit, init_args: {width: 4}}",
            "is trained by LightningCLI, with lightning_kd.Distillation in trainer.callbacks: docs/doors.md",
        ),
        ("trainer: {max_epochs: 2}\ntrainer: {devices: 1}", "mine.yaml, line 2: trainer stands there twice"),
        ("model: {student: {class_path: timm.models.resnet.resnet18}}", "model.student: class_path names a function"),
        (
            "model: {student: {class_path: lightning_kd.models.Timm, init_args: {name: resnet10t, in_chans: 1}}}",
            "options: {in_chans: ...}",
        ),
    ],
)
def test_a_mistake_in_a_file_is_told_in_one_line(
    content: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    assert main(["fit", "--config", "digits_kd", "--config", str(tmp_path / "mine.yaml")]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lit.py").write_text("import lightning\n")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "plain.ckpt")
    for name, told in (("lit.py", "is no file that torch.save wrote"), ("plain.ckpt", "which network it holds")):
        assert main(["export", str(tmp_path / name), "--format", "onnx"]) == 2
        error = capsys.readouterr().err
        assert name in error
        assert told in error


@pytest.mark.parametrize("kind", KINDS)
def test_every_member_that_is_listed_has_its_line(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = members(kind)
    assert found
    assert all(found.values()), found
    assert not any("`" in line for line in found.values()), found
    assert main(["list", kind]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in found)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n  {c} " in told for c in ("fit", "validate", "test", "predict", "compare", "export", "list"))


@pytest.mark.parametrize("kind", ["ModelCheckpoint", "EarlyStopping"])
def test_a_monitor_that_the_student_alone_has_not_is_told_before_any_training(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    watching = [f"--trainer.callbacks+=lightning.pytorch.callbacks.{kind}", "--trainer.callbacks.monitor=train/kd"]
    assert main(["compare", "--config", "digits_kd", *watching]) == 2
    assert f"digits_kd.yaml: {kind} monitors 'train/kd', a term, and the student alone" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["x", {"inputs": []}, {"student": ["a"], "inputs": []}])
def test_a_checkpoint_that_is_damaged_is_told(
    content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"lightning_kd": content, "state_dict": {}}, tmp_path / "a.ckpt")
    assert main(["export", str(tmp_path / "a.ckpt"), "--format", "onnx"]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_told(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (str(tmp_path / "file" / "a.pt"), str(tmp_path), "/proc/a.pt"):
        assert main(["export", str(student(trained)), "--format", "state_dict", "--output", output]) == 2
        if output != "/proc/a.pt":
            continue
        with pytest.raises(OSError, match="/proc"):
            TorchFile().open(Path(output))


def test_a_comparison_is_saved_to_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["compare", "--config", "digits_kd", "--output", str(tmp_path / "file")]) == 2
    assert "--output: expected a folder for the results, received the file" in capsys.readouterr().err


def test_a_configuration_that_is_no_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "digits_kdd.yaml"]) == 2
    told = capsys.readouterr().err
    assert f"no file 'digits_kdd.yaml' (looked from {os.getcwd()!r})" in told
    assert "Did you mean digits_kd" in told


def test_a_configuration_without_its_ending_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_kd.yml").touch()
    assert main(["fit", "--config", "my_kd"]) == 2
    assert "no shipped configuration 'my_kd'. Did you mean my_kd.yml?" in capsys.readouterr().err


def test_a_configuration_that_is_no_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.yaml").write_bytes("# caf\xe9".encode("latin1"))
    assert main(["fit", "--config", str(tmp_path / "latin.yaml")]) == 2
    assert "latin.yaml is not UTF-8 text" in capsys.readouterr().err


def test_the_help_of_a_run_is_short_and_says_where_there_is_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "digits_kd", "--help"]) == 0
    told = capsys.readouterr().out
    assert "--print_config" in told
    assert "--help_all" in told
    assert len(told.splitlines()) < 25


def test_python_m_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-kd", "--version"])
    monkeypatch.delitem(sys.modules, "lightning_kd.__main__", raising=False)  # doctests import everything
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("lightning_kd", run_name="__main__")
    assert capsys.readouterr().out == f"lightning-kd {__version__}\n"


def test_a_wrong_type_is_told_with_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "digits_kd", "--trainer.max_epochs", "abc"]) == 2
    assert "trainer.max_epochs: Expected null, int; got abc" in capsys.readouterr().err


def test_a_metric_that_is_not_there_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    watched = ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "val_loss"]
    quick = ["--trainer.limit_train_batches", "1", "--trainer.logger", "false"]
    assert main(["fit", "--config", "digits_kd", *SMALL, *ALONE, *quick, *watched]) == 2
    assert "Early stopping conditioned on metric `val_loss`" in capsys.readouterr().err
