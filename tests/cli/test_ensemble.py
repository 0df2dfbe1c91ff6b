"""An ensemble on the command line: each of its teachers is trained, recorded and measured as a single one is."""

import csv
import json
from pathlib import Path

import pytest

from lightning_kd.cli import main, teacher
from lightning_kd.cli.command import DistillationCLI

SHORT = [
    "--trainer.max_epochs", "1", "--teacher_fit.max_epochs", "1",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
]  # fmt: skip
FILES = [f"digits_teacher_{depth}_{width}.ckpt" for depth, width in ((8, 16), (14, 8), (8, 12))]
COMPARE = ["compare", "--config", "digits_ensemble", *SHORT, "--output", "out", "--traceback"]


def member(checkpoint: str | None) -> dict[str, object]:
    return {"class_path": "lightning_kd.teachers.Frozen", "init_args": {"model": "net", "checkpoint": checkpoint}}


def test_what_was_trained_is_that_with_a_network_and_a_checkpoint(tmp_path: Path) -> None:
    one, two = member("1.ckpt"), member(str(tmp_path / "2.ckpt"))
    several = {"teacher": {"init_args": {"teachers": [one, member(None), {"class_path": "net"}, two]}}}
    assert teacher.trained({"teacher": one}) == [one["init_args"]]
    assert teacher.trained(several) == [one["init_args"], two["init_args"]]
    assert teacher.trained({"teacher": {"init_args": {"teachers": [member(None)]}}}) == []
    assert teacher.trained({"teacher": {"class_path": "lightning_kd.teachers.PastSelf"}}) == []
    assert teacher.trained({"teacher": None}) == []
    (tmp_path / "2.ckpt").touch()
    assert teacher.missing({"model": several, "teacher_fit": {"lr": 0.1}}) == [one["init_args"]]
    assert teacher.missing({"model": several, "teacher_fit": None}) == []


def test_a_number_of_classes_that_the_data_do_not_say_is_kept() -> None:
    cli = DistillationCLI(
        ["--config", "digits_kd", "--model.student.init_args.num_classes", "7"], run=False, make=False
    )
    assert cli.plain_config["model"]["student"]["init_args"]["num_classes"] == 7


def test_a_teacher_may_learn_a_task_of_its_own() -> None:
    model = {
        "task": "a",
        "student": "small",
        "teacher": member("1.ckpt"),
        "terms": {},
        "optimizer": {"class_path": "o"},
    }
    config = {"data": {}, "trainer": {}, "model": model, "teacher_fit": {"max_epochs": 1, "lr": 0.1}}
    assert teacher.own_training(config, "big", 0)["model"] == {
        "task": "a",
        "student": "big",
        "optimizer": {"class_path": "o", "init_args": {}},
    }
    config["teacher_fit"]["task"] = "b"
    assert teacher.own_training(config, "big", 0)["model"]["task"] == "b"


def test_a_dev_run_trains_no_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "digits_ensemble", *SHORT, "--trainer.fast_dev_run", "true", "--traceback"]) == 0
    assert "an untrained one stands in" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_only_what_is_missing_is_trained_each_with_its_seed_and_every_teacher_has_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(COMPARE) == 0
    records = [json.loads(Path("checkpoints", f"{file}.json").read_text()) for file in FILES]
    assert [record["seed_everything"] for record in records] == [0, 1, 2]
    assert [record["model"]["student"]["init_args"]["width"] for record in records] == [16, 8, 12]
    rows = list(csv.DictReader(Path("out", "runs.csv").read_text().splitlines()))
    teachers = [row for row in rows if row["role"] == "teacher"]
    assert [row["name"] for row in teachers] == ["teacher", "teacher 2", "teacher 3"]
    assert len({row["accuracy"] for row in teachers}) > 1
    assert all(0 < float(row["agreement"]) < 1 for row in teachers)  # with the ensemble, which none of them is
    assert [row["name"] for row in rows[3:]] == ["student alone", "digits_ensemble"]

    before = {file: Path("checkpoints", file).read_bytes() for file in FILES}
    Path("checkpoints", FILES[1]).unlink()
    capsys.readouterr()
    assert main(COMPARE) == 0
    told = capsys.readouterr().out
    assert [f"teacher: saved to checkpoints/{file}" in told for file in FILES] == [False, True, False]
    assert [f"teacher: found at checkpoints/{file}" in told for file in FILES] == [True, False, True]
    assert all(Path("checkpoints", file).read_bytes() == before[file] for file in (FILES[0], FILES[2]))
    assert main([*COMPARE[:-1], "--teacher_fit.seed", "1"]) == 2
    assert f"the teacher at checkpoints/{FILES[0]} was trained with other settings" in capsys.readouterr().err


def test_compare_refuses_an_ensemble_without_trained_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    net = '{"class_path": "lightning_kd.models.CifarResNet", "init_args": {"depth": 8, "in_channels": 1}}'
    assert main([*COMPARE[:-1], "--model.teacher.init_args.teachers", f"[{net}]"]) == 2
    assert "compare needs terms, and a teacher" in capsys.readouterr().err
