"""A schedule of a term's weight."""

from lightning_kd.attachment.scheduler import Scheduler
from lightning_kd.schedules import Schedule
from lightning_kd.term import Term


class WeightScheduler(Scheduler):
    """Changes the weight of a term over the run.

    It does what ``Term(weight=schedule)`` does, from outside: beside whatever distils, in any order. The weight of each
    step is logged as ``train/<term>/weight``. After the fit the term has the weight that it had.

    Args:
        term: Name of the term.
        schedule: One of ``lightning_kd.schedules``, or any function of the fraction of the run.
        by: ``"step"``, or ``"epoch"`` for a weight that changes only where an epoch begins.

    Raises:
        ValueError: If the weight would be negative or not finite.

    Example:
        >>> from lightning_kd import schedules
        >>> WeightScheduler("hint", schedules.Cosine(100.0, 0.0), by="epoch").schedule
        ByEpoch(Cosine(100.0, 0.0, until=1.0))
    """

    what = "weight"

    def _fits(self, value: float) -> bool:
        return value >= 0.0

    def _scheduled(self, term: Term) -> Schedule | None:
        return term.weight if isinstance(term.weight, Schedule) else None

    def _lend(self, term: Term) -> float | Schedule:
        before, term.weight = term.weight, self.schedule
        return before

    def _restore(self, term: Term, before: float | Schedule) -> None:
        term.weight = before
