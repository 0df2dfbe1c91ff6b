"""What the command line says of mistakes: in options, files and checkpoints."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import ALONE, SMALL
from torch.utils.data import DataLoader

from lightning_kd.cli import main, teacher
from lightning_kd.data import Digits


def test_data_that_know_their_classes_too_late_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Digits, "num_classes", None)
    assert main(["fit", "--config", "digits_kd", *ALONE]) == 2
    assert "error: data.num_classes is None: the networks are made with it, before setup()" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--model.terms.kd.weight", "-1"], "weight is a finite number"),
        (["--model.terms.kd.student", "layer5"], "has no module 'layer5'"),
        (["--model.terms.kd.student", "layer3", "--model.terms.kd.teacher", "layer3"], "must have the same shape"),
        (["--data", "lightning.LightningDataModule"], "needs num_classes, which is not written"),
        (["--teacher_fit.max_epochs", "0"], "max_epochs"),
        (["--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"], "'ddp_spawn' trains in copies of this process"),
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


def test_a_file_of_classes_that_is_not_there_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    focal = "model: {terms: {focal: {loss: {class_path: elsewhere.Focal}}}}"
    Path("mine.yaml").write_text("data: {class_path: elsewhere.Data}\n" + focal)
    assert main(["fit", "--config", "digits_kd", "--config", "mine.yaml"]) == 2
    looked = f"No module named 'elsewhere' (looked from {str(tmp_path)!r})"
    assert capsys.readouterr().err.endswith(f"class_path 'elsewhere.Data': {looked}\n")  # and no term is named
    Path("mine.yaml").write_text(focal)
    assert main(["fit", "--config", "digits_kd", "--config", "mine.yaml"]) == 2
    assert capsys.readouterr().err.endswith(f"{looked}. This happened in the distillation term 'focal'.\n")


def test_who_reads_a_part_of_the_list_is_told_of_no_error() -> None:
    listing = [sys.executable, "-m", "lightning_kd", "list"]
    with subprocess.Popen(listing, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read()
    assert told == b""
    assert process.returncode == 141  # as a shell says it of what a closed pipe ended


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
        (["fit", "--confg", "digits_kd"], "arguments: --confg digits_kd. Did you mean config?\n"),
        (["fit", "--config", "digits_kd", "--seed", "0"], "arguments: --seed 0. Did you mean seed_everything?\n"),
        (["fit", "--config", "digits_kd", "--outputs", "a"], "arguments: --outputs a\n"),
        (["predict", "--config", "digits_kd", "--outputs", "a"], "arguments: --outputs a. Did you mean output?\n"),
        (["compare", "--config", "digits_kd", "--seed", "0"], "arguments: --seed 0. Did you mean seeds?\n"),
        (["compare", "--config", "digits_kd", "--student_ckpt", "a"], "--student_ckpt a. Did you mean student-ckpt"),
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


PLATEAU = ["--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor=train/kd"]


@pytest.mark.parametrize(
    "watching",
    [
        ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.monitor=train/kd"],
        ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=train/kd"],
        [*PLATEAU, "--teacher_fit.lr_scheduler={class_path: ExponentialLR, init_args: {gamma: 0.9}}"],
    ],
)
def test_a_monitor_that_the_student_alone_has_not_is_told_before_any_training(
    watching: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kind = watching[0].rpartition(".")[2]
    assert main(["compare", "--config", "digits_kd", *watching]) == 2
    assert f"digits_kd.yaml: {kind} monitors 'train/kd', a term, and the student alone" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_monitor_that_a_missing_teacher_has_not_is_told_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "digits_kd", *PLATEAU]) == 2
    assert "model.lr_scheduler monitors 'train/kd', a term, and the teacher" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["x", {"inputs": []}, {"student": ["a"], "inputs": []}])
def test_a_checkpoint_that_is_damaged_is_told(
    content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"lightning_kd": content, "state_dict": {}}, tmp_path / "a.ckpt")
    assert main(["export", str(tmp_path / "a.ckpt"), "--format", "onnx"]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_configuration_that_is_no_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "digits_kdd.yaml"]) == 2
    told = capsys.readouterr().err
    assert f"no file 'digits_kdd.yaml' (looked from {os.getcwd()!r})" in told
    assert "Did you mean digits_kd" in told


def test_a_folder_is_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(tmp_path)]) == 2
    assert f"'{tmp_path}' is a folder; give a YAML file" in capsys.readouterr().err


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
