"""A schedule of a term's temperature."""

from lightning_kd.attachment.scheduler import Scheduler
from lightning_kd.schedules import Schedule
from lightning_kd.term import Term


class TemperatureScheduler(Scheduler):
    """Changes the temperature of a term over the run.

    It stands beside whatever distils: ``Distillation``, ``EMATeacher``, or a ``DistillationModule``, in any order.
    The temperature of each step is logged as ``train/<term>/temperature``. That which the loss was given does not count
    in the fit, and is there again when it has ended.

    Args:
        term: Name of the term; its loss has a ``temperature``, wrapped losses included.
        schedule: One of ``lightning_kd.schedules``, or any function of the fraction of the run.
        by: ``"step"``, or ``"epoch"`` for a temperature that changes only where an epoch begins.

    Raises:
        ValueError: If the temperature would not be a positive finite number.

    Example:
        >>> from lightning_kd import schedules
        >>> TemperatureScheduler("kd", schedules.Linear(8.0, 1.0)).schedule
        Linear(8.0, 1.0, until=1.0)
    """

    what = "temperature"

    def _fits(self, value: float) -> bool:
        return value > 0.0

    def _scheduled(self, term: Term) -> Schedule | None:
        return term.schedules.get("temperature")

    def _lend(self, term: Term) -> float:
        term.schedules["temperature"] = self.schedule
        return term.loss.temperature  # type: ignore[return-value]  # a plain attribute of the loss

    def _restore(self, term: Term, before: float) -> None:
        del term.schedules["temperature"]
        term.loss.temperature = before  # type: ignore[assignment]  # as above
