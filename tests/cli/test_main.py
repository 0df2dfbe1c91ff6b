import csv
import logging
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar
from small_run import ALONE, SMALL

from lightning_kd import __version__
from lightning_kd.cli import export, main, teacher
from lightning_kd.cli.configs import shipped
from lightning_kd.cli.listing import KINDS, members
from lightning_kd.cli.progress import progress
from lightning_kd.data import Digits
from lightning_kd.models import CifarResNet
from lightning_kd.predictions import TorchFile


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


def test_a_dev_run_trains_no_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "digits_kd", *SMALL, "--trainer.fast_dev_run", "true"]) == 0
    assert "an untrained one stands in" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_line_of_an_epoch_without_validation_repeats_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2", "--trainer.limit_train_batches=1"]
    assert main(["fit", "--config", "digits_kd", *ALONE, *options, "--trainer.logger=false"]) == 0
    lines = re.findall(r"^epoch (\d): (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert [(epoch, "val/" in said, "task" in said) for epoch, said in lines] == [
        ("1", False, True), ("2", True, True), ("3", False, True),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:You are trying to .self.log:UserWarning")  # Lightning's, of any module that logs
def test_a_barebones_run_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.barebones", "true", "--trainer.limit_train_batches", "1", "--trainer.max_epochs", "1"]
    assert main(["fit", "--config", "digits_kd", *ALONE, *options, "--traceback"]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["best", "last"])
def test_what_a_fit_alone_has_seen_is_no_fresh_student(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    alone = ["--model.teacher=null", "--model.terms=null", "--teacher_fit=null"]
    assert main(["test", "--config", "digits_kd", *alone, "--ckpt_path", path]) == 2
    assert f"{path!r} is what a fit has seen itself" in capsys.readouterr().err


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
    on_one_batch = ["--trainer.limit_test_batches", "1", "--trainer.logger", "false"]
    assert main([*arguments, "--seeds", "0", "1", *on_one_batch]) == 0
    assert "training" not in capsys.readouterr().out
    assert measured.read_text() == whole


def test_compare_takes_teachers_whose_networks_bring_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = ["--teacher_fit", "null", "--model.teacher.init_args.checkpoint", "null", "--trainer.max_epochs", "1"]
    narrow = Path("narrow.yaml")
    narrow.write_text(shipped()["digits_kd"].read_text().replace("width: 16", "width: 4"))
    configs = ["--config", "digits_kd", str(narrow)]
    assert main(["compare", *configs, *SMALL[4:], *own, "--output", "out", "--traceback"]) == 0
    out = capsys.readouterr().out
    assert "teacher: no checkpoint is given; it has the weights that its network brings" in out
    rows = list(csv.DictReader(Path("out", "comparison.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == [
        "teacher", "teacher 2", "student alone", "student alone, teacher of narrow", "digits_kd", "narrow",
    ]  # fmt: skip
    # One network, trained once: what it agrees with is another.
    assert out.count("seed 0: training") == 3
    assert rows[2]["accuracy_mean"] == rows[3]["accuracy_mean"]
    assert rows[2]["agreement_mean"] != rows[3]["agreement_mean"]
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
