"""`lightning-kd cache`: a teacher's answers for a configuration, and a training that reads them."""

from pathlib import Path

import pytest
from toy_run import configuration

from lightning_kd.cli import main

SHORT = ["--teacher_fit.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--traceback"]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (["--trainer.fast_dev_run", "true"], "--trainer.fast_dev_run: a cache is of all training data"),
        (["--output", "mine.yaml"], "--output: expected a folder for the cache, received the file mine.yaml"),
    ],
)
def test_what_makes_no_whole_cache_is_refused(
    how: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["cache", "--config", configuration("mine"), *how]) == 2
    assert told in capsys.readouterr().err


def test_a_cache_is_whole_whatever_shortens_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_time", "00:00:00:00", "--trainer.overfit_batches", "0.1", "--trainer.max_steps", "0"]
    assert main(["cache", "--config", configuration("mine"), "--output", "answers", *short, "--traceback"]) == 0
    assert "8 samples of " in capsys.readouterr().out
    assert list(Path("answers").glob("*.safetensors"))
    fit = ["fit", "--config", "mine.yaml", "--trainer.callbacks+=lightning_kd.callbacks.TeacherCache", "--traceback"]
    assert main([*fit, "--trainer.callbacks.folder=answers"]) == 0


@pytest.mark.slow
def test_a_cache_is_made_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make = ["cache", "--config", "digits_kd", "--output", "answers", "--storage", "top3", *SHORT]
    assert main(make) == 0
    told = capsys.readouterr().out
    assert "300 samples of 32 B each, 9.6 kB" in told  # 3 of 2 + 2, the rest 4, the input's checksum 8, the number 8
    assert "complete" in told
    (shard,) = Path("answers").glob("*.safetensors")
    assert main(make) == 0  # nothing lacks
    assert [*Path("answers").glob("*.safetensors")] == [shard]
    Path("checkpoints/digits_teacher.ckpt").unlink()
    Path("cached.yaml").write_text(
        "model: {teacher: {class_path: lightning_kd.teachers.Cached, init_args: {folder: answers}}}"
    )
    fit = ["fit", "--config", "digits_kd", "--config", "cached.yaml", "--teacher_fit", "null", *SHORT[2:]]
    assert main([*fit, "--trainer.max_epochs", "1"]) == 0
    assert not list(Path("checkpoints").glob("*.ckpt"))
    other = ["--data.init_args.train_size", "350", "--trainer.max_epochs", "1"]
    assert main([each for each in [*fit, *other] if each != "--traceback"]) == 2
    assert "lacks 50 of the 350 training samples" in capsys.readouterr().err
