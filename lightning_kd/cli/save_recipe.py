"""The callback that makes a checkpoint complete: weights, and what they are the weights of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_kd.cli.inputs import Inputs, inputs_of
from lightning_kd.cli.recipe import KEY, Recipe, teacher_mark
from lightning_kd.module import DistillationModule


class SaveRecipe(Callback):
    """Puts the student's class, its arguments and the shapes of its inputs into every checkpoint.

    A checkpoint can then be moved, and still be exported or compared without the file it was trained from.

    Args:
        recipe: ``{"class_path": ..., "init_args": {...}}`` of the student.
        peers: Likewise of the networks that learn beside it.
        deployed: Recipes of ``task``, ``teacher`` and ``teacher_input``, where more runs in the end than the student.
    """

    def __init__(
        self, recipe: Recipe, peers: Sequence[Recipe] = (), deployed: Mapping[str, Recipe | None] | None = None
    ) -> None:
        self.recipe = recipe
        self.peers = list(peers)
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

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the recipe."""
        checkpoint[KEY] = {"student": self.recipe, "inputs": [list(i) for i in self.inputs]}
        if self.peers:
            checkpoint[KEY]["peers"] = self.peers
        if self.deployed:
            assert isinstance(pl_module, DistillationModule)
            checkpoint[KEY]["deployed"] = {**self.deployed, "fingerprint": teacher_mark(pl_module.teacher)}
