"""Where in a run a step is, and how long the run is."""

import math

from lightning.pytorch import Trainer

from lightning_kd.attachment.refusals import accumulates_by_schedule, refuse_changing_accumulation
from lightning_kd.schedules import Moment


class Moments:
    """Tells the moment of the next step. How long the run is, is asked once; only schedules must know it."""

    def __init__(self) -> None:
        self._total_steps = math.nan
        self._epochs = math.nan

    def measure(self, trainer: Trainer, needs_end: bool) -> None:
        """Learns how long the run is.

        Raises:
            ValueError: If it has to have an end and has none.
        """
        if needs_end:
            refuse_changing_accumulation(trainer)
        self._total_steps = _steps_of(trainer)
        self._epochs = _epochs_of(trainer)
        if needs_end and math.isnan(self._total_steps):
            raise ValueError(
                "A schedule is over the run, and the run has no end. Set max_epochs of the Trainer, or max_steps where "
                "the data has no length."
            )

    def __call__(self, trainer: Trainer) -> Moment:
        """Returns where in the run the next step is."""
        step, epoch = trainer.global_step, trainer.current_epoch
        return Moment(step / self._total_steps, step, epoch, epoch / self._epochs)


def _steps_of(trainer: Trainer) -> float:
    """Returns how many steps a run has; not a number, where nothing says it."""
    if accumulates_by_schedule(trainer):
        return math.nan
    steps = float(trainer.estimated_stepping_batches)
    return steps if 0.0 < steps < math.inf else math.nan


def _epochs_of(trainer: Trainer) -> float:
    """Returns how many epochs a run has, which max_steps may end sooner; not a number, where nothing says it."""
    if not trainer.max_epochs or trainer.max_epochs < 0:
        return math.nan
    if trainer.max_steps < 0 or trainer.num_training_batches == math.inf:
        return float(trainer.max_epochs)
    steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    return float(min(trainer.max_epochs, math.ceil(trainer.max_steps / steps)))
