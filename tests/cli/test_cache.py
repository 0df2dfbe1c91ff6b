"""`lightning-kd cache`: a teacher's answers for a configuration, and a training that reads them."""

from pathlib import Path

import pytest

from lightning_kd.cli import main

SHORT = ["--teacher_fit.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--traceback"]


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
