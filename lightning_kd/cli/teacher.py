"""The teachers' own training: before the first distillation, once."""

from __future__ import annotations

import inspect
import json
import os
import pydoc
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import LightningCLI, LRSchedulerCallable, ReduceLROnPlateau
from torch.optim import AdamW, lr_scheduler

from lightning_kd.cli.errors import UsageError
from lightning_kd.cli.recipe import plain
from lightning_kd.cli.settings import check_record
from lightning_kd.paths import expand_path
from lightning_kd.schedules import Schedule
from lightning_kd.teachers import Teacher

DECIDING = ("limit_train_batches", "gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches")
"""What of the trainer, besides the epochs, decides how well a teacher learns."""

QUIET = (
    "accelerator",
    "devices",
    "precision",
    "enable_progress_bar",
    "enable_model_summary",
    "limit_val_batches",
    "check_val_every_n_epoch",
)
"""What of the trainer is carried over, and decides only how the training is done, or shown."""

DISTILLING = ("teacher", "terms", "task_weight", "teacher_input", "student_input")
"""What of the model a student that is trained alone does not have."""

OUR_CALLBACKS = "lightning_kd.callbacks."

OF_ANY_RUN = (Schedule, lr_scheduler.ExponentialLR, lr_scheduler.ReduceLROnPlateau, ReduceLROnPlateau)
"""Schedulers whose arguments say nothing of how long a run is."""

RATES = ("max_lr", "base_lr", "swa_lr")
"""What schedulers call a learning rate that they set, whatever the optimizer was given."""


@dataclass
class TeacherFit:
    """How a teacher is trained when its checkpoint does not exist: alone, on the same data and task.

    Optimizer and scheduler are the student's, with these values instead. A scheduler that is written for the student's
    run, for its length or its learning rate, is refused where the teacher's is another.

    Args:
        max_epochs: Epochs to train for.
        lr: Learning rate.
        seed: Seed, the same for all students of this teacher; the next teacher of an ensemble has the next seed.
        task: ``class_path`` and ``init_args`` of the teacher's task, where that is another than the student's.
        lr_scheduler: The teacher's own scheduler, as ``model.lr_scheduler`` is the student's.
    """

    max_epochs: PositiveInt
    lr: float
    seed: int = 0
    task: dict[str, Any] | None = None
    lr_scheduler: LRSchedulerCallable | Schedule | None = None


def standing(model: Any) -> list[Any]:
    """The ``init_args`` with a network of the teacher in a model's configuration; of an ensemble, of each of them.

    Of a plain network, which becomes a ``Frozen``, they are those that this would have. Teachers that learn with the
    student have none.
    """
    teacher = model.get("teacher") or {}
    kind = pydoc.locate(teacher.get("class_path") or "")
    if isinstance(kind, type) and not issubclass(kind, Teacher):
        return [{"model": teacher}]
    given = teacher.get("init_args") or {}
    each = [one.get("init_args") or {} for one in given.get("teachers") or []] or [given]
    return [one for one in each if one.get("model")]


def trained(model: Any) -> list[Any]:
    """Of these, those with a checkpoint; the others bring their weights with their network."""
    return [one for one in standing(model) if one.get("checkpoint")]


def refuse_untrained(config: Any) -> None:
    """Refuses to train a teacher, as the configuration says, that is to be saved nowhere: a fresh one would teach.

    Raises:
        UsageError: If no teacher of the configuration has a checkpoint.
    """
    model = config["model"]
    if config.get("teacher_fit") and standing(model) and not trained(model):
        raise UsageError(
            "teacher_fit trains a teacher that has a file to be saved to and found again, and this one has none: give "
            "model.teacher as a lightning_kd.teachers.Frozen with a model and a checkpoint, "
            "checkpoints/my_teacher.ckpt say. Of a network that brings its weights: --teacher_fit null"
        )


@rank_zero_only
def note_fresh(model: Any) -> None:
    """Says which teachers have no file that their weights come from."""
    if any(not one.get("checkpoint") for one in standing(model)):
        print("teacher: no checkpoint is given; it has the weights that its network brings")


def missing(config: Any) -> list[Any]:
    """Of these, those that the configuration says how to train, and that are not there."""
    each = trained(config["model"]) if config.get("teacher_fit") else []
    return [one for one in each if not Path(expand_path(one["checkpoint"])).is_file()]


def watched_term(given: Any, model: Any) -> str | None:
    """What a callback or a scheduler monitors, if it is a term: what only a student with a teacher logs."""
    monitor = (given.get("init_args") or {}).get("monitor")
    return monitor if monitor in {f"train/{name}" for name in model.get("terms") or {}} else None


def refuse_schedule(config: Any) -> None:
    """Refuses to train a missing teacher by a scheduler that is written for the student's run.

    Raises:
        UsageError: If the teacher's run is of another length or learning rate, or the scheduler watches a term.
    """
    how, given = config.get("teacher_fit"), plain(config["model"].get("lr_scheduler"))
    if not given or not missing(config) or how.get("lr_scheduler"):
        return
    if monitor := watched_term(given, config["model"]):
        raise UsageError(
            f"model.lr_scheduler monitors {monitor!r}, a term, and the teacher, which is trained first, has none. "
            "Monitor what both have: val/loss, train/task, or a metric of the task; or give teacher_fit.lr_scheduler, "
            "the teacher's own"
        )
    kind: Any = pydoc.locate(given["class_path"])
    arguments = given.get("init_args") or {}
    written = {k: v for k, v in arguments.items() if v is not None and k != "last_epoch"}
    adapts = isinstance(kind, type) and issubclass(kind, OF_ANY_RUN)
    adapts = adapts or ("T_max" in written and config["model"].get("lr_interval") != "step")
    rates = [name for name in RATES if name in written and written[name] != how["lr"]]
    if not rates and (adapts or _as_long(config)):
        return
    defaults = {name: each.default for name, each in inspect.signature(kind).parameters.items()} if kind else {}
    said = ", ".join(f"{k}={v}" for k, v in written.items() if k not in defaults or v != defaults[k])
    raise UsageError(
        f"model.lr_scheduler is written for the student's run, {given['class_path']} with {said or 'its defaults'}, "
        f"and the teacher's is another: teacher_fit has max_epochs={how['max_epochs']} and lr={how['lr']}. Give "
        "teacher_fit.lr_scheduler, the teacher's own, or as model.lr_scheduler one of lightning_kd.schedules, which "
        "fit any run"
    )


def _as_long(config: Any) -> bool:
    """Whether the teacher's run takes as many epochs as the student's, and as many steps."""
    trainer = config["trainer"]
    stopped = trainer.get("max_steps") not in (None, -1) or trainer.get("max_time") is not None
    return trainer.get("max_epochs") == config["teacher_fit"]["max_epochs"] and not stopped


def ensure(config: dict[str, Any], run: Callable[[list[str]], LightningCLI]) -> None:
    """Train the teachers of a configuration and save them where the configuration says, unless they are there.

    Beside the checkpoint lies a ``.json`` with all that decided it. A checkpoint that was trained otherwise is
    never used and never overwritten.

    Args:
        config: The configuration, as plain types.
        run: Runs a command line, of its arguments.

    Raises:
        UsageError: If the checkpoint that is there was trained with other settings.
    """
    how: Any = config.get("teacher_fit")
    for number, one in enumerate(trained(config["model"]) if how else []):
        settings = own_training(config, one["model"], how["seed"] + number)
        path = Path(expand_path(one["checkpoint"]))
        if path.is_file():
            check_record(path, settings, written(config, one, number))
            print(f"teacher: found at {path}, trained before")
            continue
        if path.exists():
            raise UsageError(
                f"the teacher's checkpoint: expected a file, received the folder {path}; name a file in it"
            )
        print(f"teacher: no checkpoint at {path}; it is trained first ({how['max_epochs']} epochs)")
        fit(config, settings, path, run)
        print(f"teacher: saved to {path}\n")


def own_training(config: dict[str, Any], network: Any, seed: int) -> dict[str, Any]:
    """The configuration of a teacher's own training: the same one, with the teacher in the student's place."""
    how = config["teacher_fit"]
    trainer = {k: v for k, v in config["trainer"].items() if k in DECIDING and v is not None}
    if trainer.get("accumulate_grad_batches") == 1:
        del trainer["accumulate_grad_batches"]  # as if nothing was said of it
    trainer["max_epochs"] = how["max_epochs"]
    model = alone(config)["model"] | {"student": network, "task": own_task(config) or config["model"]["task"]}
    model["optimizer"] = _replace(model.get("optimizer") or _adamw(), lr=how["lr"])
    if how.get("lr_scheduler"):
        model["lr_scheduler"] = how["lr_scheduler"]
    elif model.get("lr_scheduler") and model.get("lr_interval") != "step":
        model["lr_scheduler"] = _replace(model["lr_scheduler"], T_max=how["max_epochs"])
    return alone(config) | {"seed_everything": seed, "trainer": trainer, "model": model}


def written(config: dict[str, Any], one: Any, number: int) -> dict[str, str]:
    """Where in the configuration stands what is decided in a teacher's own training.

    Args:
        config: The configuration, as plain types.
        one: The ``init_args`` with that teacher's network.
        number: How many teachers are trained before it.

    Returns:
        What keys of its own training begin with, and with what those that were written begin.
    """
    how, model = config["teacher_fit"], config["model"]
    members = (model["teacher"].get("init_args") or {}).get("teachers") or []
    inside = [f"teachers.{i}.init_args." for i, each in enumerate(members) if each.get("init_args") is one]
    found = {
        "model.student": f"model.teacher.init_args.{''.join(inside)}model",
        "model.optimizer.init_args.lr": "teacher_fit.lr",
        "trainer.max_epochs": "teacher_fit.max_epochs",
        "seed_everything": f"teacher_fit.seed + {number}" if number else "teacher_fit.seed",
    }
    found |= {f"model.{name}": f"teacher_fit.{name}" for name in ("task", "lr_scheduler") if how.get(name)}
    if not how.get("lr_scheduler") and model.get("lr_interval") != "step":
        found["model.lr_scheduler.init_args.T_max"] = "teacher_fit.max_epochs"
    return found


def _adamw() -> dict[str, Any]:
    """The optimizer of a configuration that names none, in full: the record beside the teacher says all."""
    arguments = {k: each.default for k, each in inspect.signature(AdamW).parameters.items() if k != "params"}
    spec: dict[str, Any] = json.loads(json.dumps({"class_path": "torch.optim.AdamW", "init_args": arguments}))
    return spec


def own_task(config: Any) -> Any:
    """The task of a configuration's teacher, where that is another than the student's."""
    return (config.get("teacher_fit") or {}).get("task")


def alone(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without distillation: the same data, student, optimizer and trainer."""
    if "trainer" in config:
        trainer = dict(config["trainer"])
        # Without schedules of terms that are not there; with none left, as if none was ever given.
        given = trainer.pop("callbacks", None) or []
        if others := [each for each in given if not each["class_path"].startswith(OUR_CALLBACKS)]:
            trainer["callbacks"] = others
        config = config | {"trainer": trainer}
    model = {k: v for k, v in config["model"].items() if k not in DISTILLING}
    return {k: config[k] for k in ("seed_everything", "data", "trainer") if k in config} | {"model": model}


def _replace(spec: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The spec with those of the values that it has."""
    arguments = spec.get("init_args") or {}
    return spec | {"init_args": arguments | {k: v for k, v in values.items() if k in arguments}}


def fit(config: dict[str, Any], settings: dict[str, Any], path: Path, run: Callable[[list[str]], LightningCLI]) -> None:
    """Train with those settings; the checkpoint appears at ``path`` when it is whole."""
    quiet = {k: config["trainer"][k] for k in QUIET if config["trainer"].get(k) is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.stem}-"))
    try:
        file = folder / "teacher.json"
        root = {"default_root_dir": str(folder), "logger": False, "enable_checkpointing": False}
        file.write_text(json.dumps(settings | {"trainer": quiet | settings["trainer"] | root}))
        done = run(["fit", "--config", str(file)])
        if done.trainer.is_global_zero:
            (path.parent / f"{path.name}.json").write_text(json.dumps(settings, indent=1))
        done.trainer.save_checkpoint(folder / path.name, weights_only=True)
        _move(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@rank_zero_only
def _move(made: Path, path: Path) -> None:
    os.replace(made, path)
