"""Runs of a comparison: each is trained once, kept in a file, and found again by what decided it."""

from __future__ import annotations

import gc
import json
import os
import pydoc
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torchmetrics import Metric

from lightning_kd.cli.command import DistillationCLI, stop_if_told
from lightning_kd.cli.errors import UsageError
from lightning_kd.cli.inputs import Inputs, inputs_of, random_inputs
from lightning_kd.cli.recipe import read
from lightning_kd.cli.settings import contents, fingerprint
from lightning_kd.task import TaskAdapter
from lightning_kd.teachers import load_weights
from lightning_kd.teachers.weights import peers_in

Settings = dict[str, Any]
AFTER_TRAINING = ("limit_test_batches", "enable_checkpointing")
"""What of the trainer decides what is measured, not what is learned; which weights are kept is said by itself."""
FOR_RESUMING = ("optimizer_states", "lr_schedulers", "loops")
"""What of a checkpoint a comparison does not keep."""


class Nowhere(DummyLogger):
    """Writes nothing; LearningRateMonitor and others refuse to do without a logger, and some ask for its folder."""

    @property
    def save_dir(self) -> str:
        """The folder that there would be without one."""
        return os.getcwd()


ALL_IN_ONE = {
    "logger": {"class_path": "lightning_kd.cli.runs.Nowhere"},
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


class Run(DistillationCLI):
    """A fit whose checkpoints are not for the eyes."""

    def before_fit(self) -> None:
        """Let what says which weights are kept put them, and the peers, into a folder of this run's own."""
        for each in self.trainer.checkpoint_callbacks:
            if isinstance(each, ModelCheckpoint):
                each.dirpath, each.save_weights_only = self.trainer.default_root_dir, False

    def note_saved(self) -> None:
        """Say nothing: what is named is gone soon."""


def write(settings: Settings, file: Path) -> str:
    """Write settings to a file that ``--config`` reads; its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1))
    return str(file)


def refuse_main(task: TaskAdapter, logged: Iterable[str], stage: str) -> None:
    """Refuse a task that measures on a stage something else than what it is to be judged by.

    Args:
        task: The task.
        logged: What was logged.
        stage: Of which.

    Raises:
        UsageError: If it does.
    """
    names = (name.removeprefix(f"{stage}/") for name in logged if name.startswith(f"{stage}/"))
    measured = {name for name in names if "/" not in name}  # the others are of single classes
    if measured - {"loss", "agreement"} and task.main_metric not in measured | {""}:
        raise UsageError(
            f"main_metric of {type(task).__name__} is {task.main_metric!r}, by which compare judges, and measured are "
            f"{', '.join(sorted(measured))}: name one of these, or '' for the first"
        )


def fit(settings: Settings, folder: Path, say: str) -> Path:
    """Train by the same code as ``lightning-kd fit``, unless that was done before.

    Returns:
        The checkpoint, which is only there when the training ended. It has the weights that the fit would name: where
        the configuration has a ModelCheckpoint, the best ones by what that monitors, else the last.
    """
    saving = _saving(settings)
    training = {"trainer": {k: v for k, v in settings["trainer"].items() if k not in AFTER_TRAINING}}
    key = fingerprint(settings | training | ({"measured": "best"} if saving else {}) | _read_files(settings))
    checkpoint = folder / f"{key}.ckpt"
    if checkpoint.is_file():
        print(f"{say}: trained before")
        return checkpoint
    print(f"{say}: training, {settings['trainer'].get('max_epochs')} epochs", flush=True)
    trainer = settings["trainer"] | ALL_IN_ONE | {"default_root_dir": str(folder)}
    own = folder / f".{key}"
    shutil.rmtree(own, ignore_errors=True)  # of a run that was interrupted
    if saving:
        trainer |= {"enable_checkpointing": True, "default_root_dir": str(own)}
    cli = Run(["fit", "--config", write(settings | {"trainer": trainer}, folder / f"{key}.fit.json")])
    part = folder / f".{key}.part"
    peers = [peer.state_dict() for peer in getattr(cli.model.attachment, "peers", ())]
    cli.trainer.save_checkpoint(part, weights_only=True)
    if cli.saved:
        best = read(cli.saved)
        peers = [peer["state_dict"] for peer in peers_in(best).values()]
        torch.save({k: v for k, v in best.items() if k not in FOR_RESUMING}, part)
    for i, weights in enumerate(peers, 1):
        torch.save(weights, peer_file(checkpoint, i))
    os.replace(part, checkpoint)
    shutil.rmtree(own, ignore_errors=True)
    del cli
    gc.collect()  # data and trainer hold each other: of many runs in a row, each would stay for a while
    return checkpoint


def _saving(settings: Settings) -> bool:
    """Whether one of the configuration's callbacks says which weights are kept."""
    trainer = settings["trainer"]
    if trainer.get("enable_checkpointing") is False or trainer.get("barebones"):
        return False
    kinds = [pydoc.locate(each["class_path"]) for each in trainer.get("callbacks") or []]
    return any(isinstance(kind, type) and issubclass(kind, ModelCheckpoint) for kind in kinds)


def peer_file(checkpoint: Path, number: int) -> Path:
    """Return where the weights of a peer are, beside those of the student, which is number 0."""
    return checkpoint.with_suffix(f".peer{number}.pt") if number else checkpoint


class Tested:
    """A network with given weights, measured on the test data by the same code as ``lightning-kd test``.

    Args:
        settings: The configuration whose student the network is, and with whose teacher it may agree.
        weights: File with the weights; None where the network brings its own.
        folder: Where what was measured is kept, and found again.
    """

    def __init__(self, settings: Settings, weights: Path | None, folder: Path) -> None:
        quiet = ALL_IN_ONE | {"enable_progress_bar": False}
        self.settings = settings | {"trainer": settings["trainer"] | quiet}
        self.weights = weights
        key = fingerprint(settings | {"weights": _which(weights)} | _read_files(settings))
        self._file, kept = folder / f"{key}.test.json", folder / f"{key}.json"
        content = _read(kept)
        if content is None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(".part")
            part.write_text(json.dumps(self._measure()))
            os.replace(part, kept)
            content = json.loads(kept.read_text())
        self.metrics: dict[str, float] = content["metrics"]
        self.main: str = content["main"]
        self.higher: dict[str, bool | None] = content["higher"]
        self.fraction: dict[str, bool | None] = content["fraction"]
        self._inputs: Inputs = content["inputs"]

    def cli(self) -> DistillationCLI:
        """Return data and module of the configuration, with these weights in its student."""
        cli = DistillationCLI(["--config", write(self.settings, self._file)], run=False)
        if self.weights is not None:
            load_weights(cli.model.student, self.weights)
        return cli

    def _measure(self) -> dict[str, Any]:
        cli = self.cli()
        seen: Inputs = []

        def see(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not seen:
                seen.extend(inputs_of(network, args, kwargs))

        handle = cli.model.student.register_forward_pre_hook(see, with_kwargs=True)
        tested = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
        handle.remove()
        stop_if_told(cli.trainer)
        if not tested:
            raise UsageError("compare measures on the test data, which gave no batch; see --trainer.limit_test_batches")
        measured = tested[0]
        metrics = {k.removeprefix("test/"): float(v) for k, v in measured.items()}
        task = cli.model.task
        refuse_main(task, measured, "test")
        asked = {"higher": _asked(task, metrics, _higher), "fraction": _asked(task, metrics, _fraction)}
        return {"metrics": metrics, "inputs": seen, "main": task.main_metric} | asked

    def network(self) -> tuple[nn.Module, tuple[Any, ...], Any]:
        """What runs where the network is used, one input for it, and of which settings it was made."""
        model, settings = self.cli().model, self.settings["model"]
        deployed: nn.Module = model.task.deployed(model.student)
        made = ("student",) if deployed is model.student else ("student", "task", "teacher", "teacher_input")
        recipe = _without_weights({part: settings.get(part) for part in made})
        return deployed.eval(), random_inputs(self._inputs, 1, deployed), recipe


def _without_weights(recipe: Any) -> Any:
    """Settings of networks without the files that their weights come from, which decide nothing of what they cost."""
    if isinstance(recipe, dict):
        return {key: _without_weights(value) for key, value in recipe.items() if key != "checkpoint"}
    return [_without_weights(each) for each in recipe] if isinstance(recipe, list) else recipe


def _read(kept: Path) -> dict[str, Any] | None:
    """What was measured before; None where that is not there, or not whole, so that it is measured again."""
    try:
        content: Any = json.loads(kept.read_text())
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(content, dict) and {"metrics", "inputs", "main", "higher", "fraction"} <= content.keys()
    return content if whole and content["metrics"] else None


def _read_files(settings: Settings) -> dict[str, Any]:
    """What is in the files that a run reads, and that its settings only name."""
    found = contents(settings.get("data"))
    return _taught(settings) | ({"files": found} if found else {})


def _taught(settings: Settings) -> dict[str, Any]:
    """Which teacher decides what is learned, and with whom a student agrees: its settings name files, not weights."""
    found = contents(settings["model"].get("teacher"))
    return {"teacher": found} if found else {}


def _which(weights: Path | None) -> list[Any]:
    """What tells a file with weights from others, and from itself when it was written again."""
    return [str(weights), weights.stat().st_size, weights.stat().st_mtime_ns] if weights else []


def _asked(task: TaskAdapter, logged: Iterable[str], ask: Callable[[Metric], bool | None]) -> dict[str, bool | None]:
    """Of each logged metric, what it answers; None where it is not known which one of several it is of."""
    own = {name: ask(metric) for name, metric in task.metrics().items(keep_base=True)}
    # One that computes several values is not logged under its own name.
    of_several = {answer for name, answer in own.items() if name not in logged}
    agreement = task.agreement()
    if agreement is not None:
        own["agreement"] = ask(agreement)
        of_several = of_several or {own["agreement"]}
    other = of_several.pop() if len(of_several) == 1 else None
    return {name: own.get(name, other) for name in logged if name != "loss"} | {"loss": False}


def _higher(metric: Metric) -> bool | None:
    """Whether more is better, as torchmetrics says; None where it does not."""
    return metric.higher_is_better


def _fraction(metric: Metric) -> bool:
    """Whether it may be a fraction: a correlation goes down to -1, and a ratio of signal to noise up to anything."""
    return (metric.plot_lower_bound, metric.plot_upper_bound) in ((None, None), (0.0, 1.0))
