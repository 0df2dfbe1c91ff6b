"""What callbacks and schedulers watch: a mistyped name is told before the training, and not after its first epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lightning_kd.cli.errors import UsageError, guess
from lightning_kd.cli.teacher import watched_term
from lightning_kd.task import TaskAdapter

STAGES = ("train/", "val/", "test/")
"""How the names of what a DistillationModule logs begin."""

KNOWN = ("lightning.", "lightning_kd.", "pytorch_lightning.")
"""Packages whose callbacks log nothing under such names."""


def refuse(config: Any, task: TaskAdapter, logged: Iterable[str]) -> None:
    """Refuse to monitor what no epoch logs, as far as that is certain.

    Left alone is what may be logged later: by callbacks of one's own, or a task that logs more; by a term, which may
    begin later; of a class that the one batch has not; and all of a stage that logged nothing.

    Args:
        config: The parsed configuration.
        task: The task.
        logged: Names that an epoch of one batch has logged.

    Raises:
        UsageError: If something watches what is not logged.
    """
    model, names = config["model"], sorted(name for name in logged if name.startswith(STAGES))
    stages = {name.partition("/")[0] for name in names} | {"test"}
    if type(task).values is not TaskAdapter.values:
        stages -= {"train"}
    if not names or not all(each["class_path"].startswith(KNOWN) for each in config["trainer"].get("callbacks") or []):
        return
    for owner, given in _watching(config):
        monitor = (given.get("init_args") or {}).get("monitor")
        if not isinstance(monitor, str) or monitor in names or watched_term(given, model):
            continue
        stage, _, name = monitor.partition("/")
        mistyped = (stage in stages and "/" not in name) or monitor.replace("_", "/", 1) in names  # val_loss, of habit
        if mistyped and given["init_args"].get("strict") is not False:
            near = guess(monitor, names)
            raise UsageError(f"{owner} monitors {monitor!r}, which is not logged.{near} There are: {', '.join(names)}")


def _watching(config: Any) -> Iterator[tuple[str, Any]]:
    for each in config["trainer"].get("callbacks") or []:
        yield each["class_path"].rpartition(".")[2], each
    if scheduler := config["model"].get("lr_scheduler"):
        yield "model.lr_scheduler", scheduler
