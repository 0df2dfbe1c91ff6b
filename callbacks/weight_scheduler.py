"""A schedule of a term's weight."""

from lightning.pytorch.utilities import rank_zero_info

from lightning_kd.attachment.scheduler import Scheduler
from lightning_kd.schedules import Schedule
from lightning_kd.term import Term


class WeightScheduler(Scheduler):
    """Changes the weight of a term over the run.

    It does what ``Term(weight=schedule)`` does, from outside: beside whatever distils, in any order. The weight of each
    step is logged as ``train/<term>/weight``. A term whose weight is 0 is switched off, and stays so.

    Args:
        term: Name of the term.
        schedule: One of ``lightning_kd.schedules``, or any function of the fraction of the run.
        by: ``"step"``, or ``"epoch"`` for a weight that changes only where an epoch begins.

    Raises:
        ValueError: If the weight would be negative or not finite; in a fit, if the term has a weight of its own.

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
        before = term.weight
        if before == 0:
            rank_zero_info(f"WeightScheduler({self.term!r}) leaves that term alone: its weight is 0, so it is off.")
        elif before != 1:
            raise ValueError(
                f"WeightScheduler({self.term!r}): that term has the weight {before}, which the schedule would replace. "
                "Put it into the schedule, whose values are the weight, and leave the term's out (0 switches it off), "
                "or take the scheduler out."
            )
        else:
            term.weight = self.schedule
        return before

    def _restore(self, term: Term, before: float | Schedule) -> None:
        term.weight = before
