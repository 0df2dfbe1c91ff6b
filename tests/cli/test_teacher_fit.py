"""By what optimizer and scheduler a teacher is trained, which are the student's unless teacher_fit says otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_kd.cli import main, teacher
from lightning_kd.cli.command import DistillationCLI
from lightning_kd.cli.errors import UsageError
from lightning_kd.cli.settings import TrainedOtherwiseError, check_record

TORCH = "torch.optim.lr_scheduler."
OURS = {"class_path": "lightning_kd.schedules.Cosine", "init_args": {"start": 1.0, "end": 0.0}}
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


def scheduler(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"{TORCH}{name}", "init_args": arguments | {"last_epoch": -1}}


ONE_CYCLE = scheduler("OneCycleLR", max_lr=0.02, total_steps=12)


def config(given: Any, own: Any = None, interval: str = "epoch", epochs: int = 2, **trainer: Any) -> dict[str, Any]:
    how = {"max_epochs": epochs, "lr": 0.01, "seed": 0, "task": None, "lr_scheduler": own}
    model = {
        "teacher": {
            "class_path": "lightning_kd.teachers.Frozen",
            "init_args": {"model": {"class_path": "torch.nn.Identity"}, "checkpoint": "nowhere.ckpt"},
        },
        "task": "a",
        "lr_scheduler": given,
        "lr_interval": interval,
    }
    return {"model": model, "teacher_fit": how, "trainer": {"max_epochs": 2} | trainer, "data": {}}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (config(ONE_CYCLE, interval="step", epochs=4), r"OneCycleLR with max_lr=0\.02, total_steps=12, and the"),
        (config(ONE_CYCLE, interval="step"), "is another: teacher_fit has max_epochs=2 and lr=0.01"),  # of another rate
        (config(scheduler("CyclicLR", base_lr=0.01, max_lr=0.1)), r"CyclicLR with base_lr=0\.01, max_lr=0\.1, and"),
        (config(scheduler("MultiStepLR", milestones=[1]), epochs=4), r"MultiStepLR with milestones=\[1\], and"),
        (config(scheduler("LinearLR", total_iters=5), epochs=4), "LinearLR with its defaults"),
        (config(scheduler("StepLR", step_size=3), max_steps=3), "StepLR"),
        (
            config(scheduler("CosineAnnealingLR", T_max=24), interval="step", epochs=4),
            "CosineAnnealingLR with T_max=24",
        ),
    ],
)
def test_a_scheduler_that_is_written_for_the_students_run_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=rf"model\.lr_scheduler is written for the student's run, .*{told}"):
        teacher.refuse_schedule(wrong)


@pytest.mark.parametrize(
    "right",
    [
        config(None),
        config(OURS, epochs=4),
        config(ONE_CYCLE, interval="step", epochs=4, own=OURS),
        config(ONE_CYCLE | {"init_args": {"max_lr": 0.01, "total_steps": 12}}, interval="step"),
        config(scheduler("MultiStepLR", milestones=[1])),
        config(scheduler("StepLR", step_size=3), accumulate_grad_batches=2, interval="step"),  # which is the teacher's
        config(scheduler("ExponentialLR", gamma=0.9), epochs=4),
        config(scheduler("CosineAnnealingLR", T_max=2), epochs=4),
        config({"class_path": "lightning.pytorch.cli.ReduceLROnPlateau", "init_args": {"monitor": "x"}}, epochs=4),
        config(ONE_CYCLE, epochs=4) | {"teacher_fit": None},
    ],
)
def test_one_that_fits_the_teachers_run_is_taken(right: dict[str, Any]) -> None:
    teacher.refuse_schedule(right)


def test_nothing_is_refused_where_no_teacher_is_trained(tmp_path: Path) -> None:
    there = config(ONE_CYCLE, epochs=4)
    (tmp_path / "there.ckpt").touch()
    there["model"]["teacher"]["init_args"]["checkpoint"] = str(tmp_path / "there.ckpt")
    teacher.refuse_schedule(there)


def test_a_teachers_training_has_its_own_scheduler_and_length() -> None:
    def own(**given: Any) -> Any:
        return teacher.own_training(config(**given), "net", seed=0)["model"]["lr_scheduler"]

    annealing = scheduler("CosineAnnealingLR", T_max=2)
    assert own(given=ONE_CYCLE, own=OURS) == OURS
    assert own(given=None, own=OURS) == OURS
    assert own(given=annealing, epochs=4) == scheduler("CosineAnnealingLR", T_max=4)
    assert own(given=annealing, interval="step") == annealing  # in steps, of which there are as many
    assert own(given=None) is None


def test_without_an_optimizer_the_teachers_is_adamw_at_its_rate() -> None:
    made = teacher.own_training(config(None), "net", seed=0)["model"]["optimizer"]
    named = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.init_args.lr", "0.01"]
    cli = DistillationCLI(["--config", "digits_kd", *named], run=False, make=False)
    assert made == cli.plain_config["model"]["optimizer"]


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_it_is_refused_before_any_training(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DistillationCLI, "rehearse", lambda _: pytest.fail("something was trained"))
    given = ["--model.lr_scheduler", f"{TORCH}StepLR", "--model.lr_scheduler.init_args.step_size", "3"]
    assert main([command, "--config", "digits_kd", "--teacher_fit.max_epochs", "4", *given]) == 2
    assert "StepLR with step_size=3, and the teacher's is another" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_teacher_is_trained_by_the_scheduler_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = {"max_epochs": 2, "lr": 0.01, "lr_scheduler": scheduler("OneCycleLR", max_lr=0.03, total_steps=2)}
    given = {"model": {"lr_scheduler": ONE_CYCLE, "lr_interval": "step"}, "teacher_fit": own}
    Path("given.yaml").write_text(yaml.safe_dump(given))
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    assert main(["fit", "--config", "digits_kd", "--config", "given.yaml", *short, *QUIET]) == 0
    record = json.loads(Path("checkpoints/digits_teacher.ckpt.json").read_text())
    assert record["model"]["lr_scheduler"]["init_args"]["max_lr"] == 0.03
    assert record["trainer"]["max_epochs"] == 2
    assert torch.load("checkpoints/digits_teacher.ckpt", weights_only=True)["global_step"] == 2


def test_a_teachers_training_clips_and_accumulates_as_the_students() -> None:
    given = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value", "limit_train_batches": 3}
    carried = given | {"accumulate_grad_batches": 4}
    said = config(None, **carried, callbacks=[], max_time="1:00", overfit_batches=1)
    assert teacher.own_training(said, "net", seed=0)["trainer"] == carried | {"max_epochs": 2}
    defaults = dict.fromkeys(given) | {"accumulate_grad_batches": 1}  # as a whole configuration has them
    assert teacher.own_training(config(None, **defaults), "net", seed=0)["trainer"] == {"max_epochs": 2}


def test_what_differs_is_named_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "t.ckpt"

    def trained(changed: dict[str, Any], number: int = 0) -> str:
        """What is told where a teacher was trained, and the configuration is changed."""
        one = {"class_path": "Net", "init_args": {"width": 8, "depth": 1}}
        before = config(scheduler("CosineAnnealingLR", T_max=2))
        before["model"]["task"] = {"class_path": "a"}
        members = [{"class_path": "lightning_kd.teachers.Frozen", "init_args": {"model": one}} for _ in range(2)]
        before["model"]["teacher"]["init_args"] = {"teachers": members} if number else members[0]["init_args"]
        network = members[number]["init_args"]
        (tmp_path / "t.ckpt.json").write_text(json.dumps(teacher.own_training(before, one, number)))
        now = before | {"teacher_fit": before["teacher_fit"] | changed.get("teacher_fit", {})}
        another = one | {"init_args": one["init_args"] | changed.get("network", {})}
        with pytest.raises(TrainedOtherwiseError) as told:
            check_record(
                file,
                teacher.own_training(now, another, now["teacher_fit"]["seed"] + number),
                teacher.written(now, network, number),
            )
        return str(told.value).partition("(")[2].partition(")")[0]

    assert trained({"network": {"width": 4}}) == "model.teacher.init_args.model.init_args.width: 8 then, 4 now"
    assert trained({"network": {"width": 4}}, number=1) == (
        "model.teacher.init_args.teachers.1.init_args.model.init_args.width: 8 then, 4 now"
    )
    assert trained({"teacher_fit": {"max_epochs": 5, "lr": 1}}) == (
        "teacher_fit.max_epochs: 2 then, 5 now; teacher_fit.lr: 0.01 then, 1 now"
    )
    assert trained({"teacher_fit": {"seed": 3}}, number=1) == "teacher_fit.seed + 1: 1 then, 4 now"
    assert trained({"teacher_fit": {"task": {"class_path": "b"}}}) == "teacher_fit.task.class_path: a then, b now"
    many = trained({"network": dict.fromkeys("abcdef", 0)})
    assert many.endswith("d: None then, 0 now; and 2 more")


def test_a_mistyped_network_of_a_teacher_that_is_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--model.teacher.init_args.checkpoint", "t.ckpt"]
    settings = DistillationCLI(["--config", "digits_kd", *arguments], run=False, make=False).plain_config
    network = settings["model"]["teacher"]["init_args"]["model"]
    Path("t.ckpt").touch()
    Path("t.ckpt.json").write_text(json.dumps(teacher.own_training(settings, network, 0)))
    depth = ["--model.teacher.init_args.model.init_args.depth"]
    assert main(["fit", "--config", "digits_kd", *arguments, *depth, "9"]) == 2
    assert "error: expected a depth" in capsys.readouterr().err
    assert main(["fit", "--config", "digits_kd", *arguments, *depth, "20"]) == 2
    told = "was trained with other settings (model.teacher.init_args.model.init_args.depth: 14 then, 20 now)."
    assert told in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"t.ckpt", "t.ckpt.json"}
