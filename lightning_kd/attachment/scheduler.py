"""A callback that sets something of a term by a schedule, for the length of a fit."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_kd.attachment.attachment import attachments_of
from lightning_kd.schedules import ByEpoch, Custom, Schedule
from lightning_kd.term import Term
from lightning_kd.wiring import describe

By = Literal["step", "epoch"]


class Scheduler(Callback, ABC):
    """Finds a term by its name, whoever brings it, and lends it a schedule until the fit ends.

    It holds no state: what a step gets depends on where in the run the step is, so that a resumed run goes on exactly.

    Args:
        term: The term's name.
        schedule: What it follows over the run; a function of the fraction of the run, or one of ``schedules.*``.
        by: Whether the value changes with each ``"step"``, or only where an ``"epoch"`` begins.
    """

    what: str
    """What of a term is scheduled."""

    def __init__(self, term: str, schedule: Schedule | Callable[[float], float], by: By = "step") -> None:
        super().__init__()
        if by not in ("step", "epoch"):
            raise ValueError(f"by is 'step' or 'epoch', got {by!r}.")
        given: object = term  # what a caller without a type checker may pass
        if not isinstance(given, str):
            raise TypeError(
                f"{type(self).__name__} takes the name of a term, 'kd', and a schedule; got {describe(given)}."
            )
        own = schedule if isinstance(schedule, Schedule) else Custom(schedule)
        ends = own(0.0), own(1.0)
        if not all(self._fits(end) and end < math.inf for end in ends):
            raise ValueError(
                f"A {self.what} cannot follow {own!r}: it goes from {ends[0]} to {ends[1]}. Weights are finite and not "
                "negative, temperatures are positive and finite."
            )
        self.term = term
        self.schedule = ByEpoch(own) if by == "epoch" else own
        self._lent: tuple[Term, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lends the schedule, before anybody asks whether the run needs an end; the callbacks' order is no matter."""
        if stage == "fit":
            self._take_back()
            term = self._find(trainer)
            self._lent = term, self._lend(term)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the term as it was."""
        self._take_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the term as it was after an interrupted fit, too."""
        self._take_back()

    @abstractmethod
    def _fits(self, value: float) -> bool:
        """Tells whether a value is in range."""

    @abstractmethod
    def _scheduled(self, term: Term) -> Schedule | None:
        """Returns the schedule that the term has already."""

    @abstractmethod
    def _lend(self, term: Term) -> Any:
        """Puts the schedule in place, and returns what was there."""

    @abstractmethod
    def _restore(self, term: Term, before: Any) -> None:
        """Puts back what was there."""

    def _take_back(self) -> None:
        if self._lent is not None:
            self._restore(*self._lent)
            self._lent = None

    def _find(self, trainer: Trainer) -> Term:
        me = f"{type(self).__name__}({self.term!r})"
        terms = dict(pair for attachment in attachments_of(trainer) for pair in attachment.distiller.named_terms())
        if not terms:
            raise ValueError(
                f"{me} found nothing that distils. Add Distillation(...), or another callback that distils, to the "
                "Trainer's callbacks, give the DistillationModule a teacher and terms, or take the scheduler out."
            )
        if self.term not in terms:
            close = get_close_matches(self.term, terms, n=1, cutoff=0.0)
            raise ValueError(
                f"{me}: no term has that name. Closest: {close[0]!r}. The terms are {', '.join(map(repr, terms))}."
            )
        term = terms[self.term]
        if not hasattr(term.loss, self.what) and not hasattr(term, self.what):
            able = [repr(name) for name, other in terms.items() if hasattr(other.loss, self.what)]
            raise ValueError(
                f"{me}: {type(term.loss).__name__} has no {self.what} that could be set. Terms whose loss has one: "
                f"{', '.join(able) or 'none'}."
            )
        if (already := self._scheduled(term)) is not None:
            raise ValueError(f"{me}: the {self.what} of that term follows {already!r} already. Keep one of the two.")
        return term
