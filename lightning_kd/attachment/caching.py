"""Puts a cache in the teacher's place for the length of a fit."""

import functools
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_kd.attachment.attachment import Attachment, attachments_of
from lightning_kd.teachers import Cached, Ensemble, Frozen, Teacher
from lightning_kd.teachers.cached import AnsweredError


class Caching(Callback):
    """What ``callbacks.TeacherCache`` does.

    Args:
        folder: Where the answers are, or will be.
        storage: How tensors are stored.
        fill_only: Whether to make the answers that lack, and nothing else.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        storage: str | Mapping[str, str] = "float16",
        fill_only: bool = False,
    ) -> None:
        super().__init__()
        Cached(folder, storage=storage)  # so that a mistake is told now
        self.folder = folder
        self.storage = storage
        self.fill_only = fill_only
        self._lent: tuple[Attachment, Teacher, Cached] | None = None
        self._module: LightningModule | None = None
        self._quiet = ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lent": None, "_module": None, "_quiet": ExitStack()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts the cache in the teacher's place."""
        self._give_back(trainer)
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            return
        found = [each for each in attachments_of(trainer) if isinstance(each.distiller.teacher, (Frozen, Ensemble))]
        if len(found) != 1:
            there = ", ".join(type(each.distiller.teacher).__name__ for each in attachments_of(trainer))
            raise ValueError(
                f"TeacherCache is for one trained teacher, and this run has {len(found)} (teachers: {there or 'none'}"
                "). Beside several give each its own: Distillation(teacher=teachers.Cached(folder, teacher=...))."
            )
        if self.fill_only and trainer.world_size > 1:
            raise ValueError(
                "fill_only makes answers in one process. Set devices=1; or train with all of them and "
                "fill_only=False, whose first epoch fills the cache."
            )
        attachment, teacher = found[0], found[0].distiller.teacher
        cached = Cached(self.folder, teacher, self.storage)
        cached.answers_only = self.fill_only
        attachment.distiller.set_teacher(cached)
        self._lent = attachment, teacher, cached
        if self.fill_only:
            self._module = pl_module
            self._quiet.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="`training_step` returned `None`")  # on purpose
            pl_module.training_step = _answering(pl_module.training_step)  # type: ignore[method-assign]  # as above

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the teacher its place back."""
        self._give_back(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keeps what was answered, and gives the teacher its place back."""
        self._give_back(trainer)

    def _give_back(self, trainer: Trainer) -> None:
        if self._lent is not None:
            attachment, teacher, cached = self._lent
            self._lent = None
            attachment.leave(trainer)  # whichever of the two Lightning asks first
            attachment.distiller.set_teacher(teacher)
            cached.unbind()
        self._quiet.close()
        if self._module is not None:
            vars(self._module).pop("training_step", None)
            self._module = None


def _answering(training_step: Any) -> Any:
    @functools.wraps(training_step)
    def only_answers(*args: Any, **kwargs: Any) -> Any:
        try:
            return training_step(*args, **kwargs)
        except AnsweredError:
            return None  # Lightning skips the batch

    return only_answers
