"""The callback that makes a checkpoint complete: weights, and what they are the weights of."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_kd.cli.inputs import Inputs, inputs_of
from lightning_kd.cli.recipe import KEY, UNLIKE, Recipe, teacher_mark
from lightning_kd.cli.remade import true_recipe
from lightning_kd.module import DistillationModule
from lightning_kd.teachers import Peers
from lightning_kd.teachers.weights import read_checkpoint


class SaveRecipe(Callback):
    """Puts the student's class, its arguments and the shapes of its inputs into every checkpoint.

    A checkpoint can then be moved, and still be exported or compared without the file it was trained from.

    Args:
        recipe: ``{"class_path": ..., "init_args": {...}}`` of the student.
        peers: Likewise of the networks that learn beside it.
        whole: Of the student and its peers what else they were made with, where training started from: what is said
            in a recipe's place, if the network of that says something else.
        deployed: Recipes of ``task``, ``teacher`` and ``teacher_input``, where more runs in the end than the student.
    """

    def __init__(
        self,
        recipe: Recipe,
        peers: Sequence[Recipe] = (),
        deployed: Mapping[str, Recipe | None] | None = None,
        whole: Sequence[Recipe] = (),
    ) -> None:
        self.recipes = [recipe, *peers]
        self._run = uuid.uuid4().hex
        self._wrote = False
        self._whole = whole or self.recipes
        self.deployed = deployed
        self.inputs: Inputs = []
        self.trained = False
        self._handle: RemovableHandle | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first call of the student, to see what it is given."""
        student = pl_module.student
        assert isinstance(student, nn.Module)
        self._handle = student.register_forward_pre_hook(self._see, with_kwargs=True)

    def on_train_start(self, *_: Any) -> None:
        """Keep in mind that there was something to train: a run that is over is not begun again."""
        self.trained = True

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs = inputs_of(module, args, kwargs)
        self.on_fit_end()

    def on_fit_end(self, *_: Any) -> None:
        """Leave nothing behind in the student."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_exception(self, *_: Any) -> None:
        """Leave nothing behind in the student."""
        self.on_fit_end()

    def complete_checkpoint(self, module: DistillationModule, checkpoint: dict[str, Any]) -> None:
        """Add the recipes, and of which run they are; not to weights that a run is asked for, a teacher's for one."""
        if "optimizer_states" not in checkpoint and not module.trainer.checkpoint_callbacks:
            return
        self._wrote = True
        checkpoint[KEY] = {**self._recipes(), "inputs": [list(i) for i in self.inputs], "run": self._run}
        if self.deployed:
            checkpoint[KEY]["deployed"] = {**self.deployed, "fingerprint": teacher_mark(module.teacher)}

    def _recipes(self) -> dict[str, Any]:
        student, *peers = self.recipes
        return {"student": student, "peers": peers} if peers else {"student": student}

    def compare(self, trainer: Trainer, module: DistillationModule) -> None:
        """When the fit is over, call what was trained and what its recipe makes: checkpoints are to say if they differ.

        Not where a network is in several parts, of which one process has its own.
        """
        sharded = isinstance(trainer.strategy, DeepSpeedStrategy)
        whole = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)) and not sharded
        if not (whole and trainer.is_global_zero and self._wrote and self.recipes[0]):
            return
        networks = [module.student, *(module.teacher.peers if isinstance(module.teacher, Peers) else ())]
        found = [
            true_recipe(network, self.inputs, recipe, more, trainer.strategy.root_device)
            for network, recipe, more in zip(networks, self.recipes, self._whole, strict=True)
        ]
        for i, recipe in enumerate(found):
            if UNLIKE in recipe and UNLIKE not in self.recipes[i]:
                tell_unlike(i, recipe)
        if found != self.recipes:
            self.recipes = found
            folders = [getattr(each, "dirpath", None) for each in trainer.checkpoint_callbacks]
            for folder in map(Path, filter(None, folders)):
                for path in folder.rglob(f"*{ModelCheckpoint.FILE_EXTENSION}"):  # val/loss in a name makes a folder
                    self._correct(path.resolve())

    def _correct(self, path: Path) -> None:
        """Write the recipes of now into a checkpoint of this run; it is complete at any moment."""
        try:
            content = read_checkpoint(path)
        except (ValueError, OSError):  # which export does not read either
            return
        said = content.get(KEY) if isinstance(content, dict) else None
        if isinstance(said, dict) and said.get("run") == self._run:
            said.update(self._recipes())
            part = path.with_name(f".{path.name}.part")
            try:
                torch.save(content, part)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)


@rank_zero_only
def tell_unlike(number: int, recipe: Recipe) -> None:
    """Say that a network will not be exported; the student is number 0, and a peer has its own."""
    network = f"peer {number}" if number else "student"
    print(f"{network}: lightning-kd export will not make it again: {recipe[UNLIKE]}")
