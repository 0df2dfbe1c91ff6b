"""Labels: what losses need of a batch, whatever its format."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_kd.overwriting import Given
from lightning_kd.term import how_to_give
from lightning_kd.watching import LabelsOf
from lightning_kd.wiring import describe

Label = Callable[[Any], Any] | str | int
"""How to get labels out of a batch: a function of it, a key, or an index."""


class Labels:
    """Reads the labels of a batch once: before its step, as many a step tidies them, or when asked, if it makes them.

    A step is seen to make labels when they are there after it and were not before. What is there before the next step
    is of the last batch then, so from there on all are read when somebody asks.

    Args:
        sources: How to get what out of a batch, by name; None is ``batch[1]``.
        after_step: Whether they are known to be made by the step.
    """

    def __init__(self, sources: Mapping[str, Label | None], after_step: bool = False) -> None:
        self.sources = dict(sources)
        self.after_step = after_step
        self._checked: set[str] = set()

    def begin(self) -> None:
        """Is told that a fit begins, in which functions may come to what an earlier one has left."""
        self._checked = set()

    def of(self, batch: Any, needed: Mapping[str, bool], position: list[int] | None = None) -> LabelsOf:
        """Returns what gives the labels of a batch, when asked.

        Args:
            batch: The batch, before its step.
            needed: What is used, by name, and whether somebody cannot do without.
            position: Which samples of the data set these are, if that is known.
        """

        def read(but: Collection[str] = ()) -> dict[str, Any]:
            found = labels_of(batch, {name: how for name, how in self.sources.items() if name not in but}, needed)
            return found if position is None or "position" in (*found, *but) else {**found, "position": position}

        before: dict[str, Any] = {}
        if not self.after_step:
            try:
                before = read()
            except ValueError:  # told when somebody asks: the step may skip this batch
                pass
            else:
                self._look_for_earlier(before, batch, read)
                if not self.after_step and all(label is not None for label in before.values()):
                    return lambda: before
        there = {} if self.after_step else {name: x for name, x in before.items() if x is not None}
        found: dict[str, Any] = {}

        def labels() -> dict[str, Any]:
            if not found:
                made = read(but=there)
                found.update(there | made)
                if any(label is not None for label in made.values()):
                    self.after_step = True
            return found

        return labels

    def _look_for_earlier(self, labels: Mapping[str, Any], batch: Any, read: Callable[[], Mapping[str, Any]]) -> None:
        """Looks for labels that a function only fetches, and not out of the batch: an earlier step has left them."""
        new = {name for name, how in self.sources.items() if callable(how) and labels.get(name) is not None}
        if new <= self._checked:
            return
        with isolate_rng():  # of functions that draw
            again = read()
        here = {id(x) for x in Given(batch).tensors}
        for name in new - self._checked:
            first, second = (
                [id(x) for x in tree_leaves(each[name]) if isinstance(x, Tensor)] for each in (labels, again)
            )
            if first and first == second and here.isdisjoint(first):
                self.after_step = True
        self._checked |= new


def label_sources(
    target: Label | None, index: Label | None, others: Mapping[str, Label] | None
) -> dict[str, Label | None]:
    """Returns how to get what out of a batch, by name, of what a callback was given.

    Raises:
        ValueError: If one of them is given twice.
    """
    others = dict(others or {})
    twice = sorted({"target", "index"} & others.keys())
    if twice:
        raise ValueError(f"labels= is for what has no argument of its own: give {' and '.join(twice)} by that name.")
    found: dict[str, Label | None] = {"target": target, **others}
    return found if index is None else {**found, "index": index}


def refuse_unasked(given: Iterable[str], asked: Iterable[str]) -> None:
    """Raises ``ValueError`` where ``labels=`` names what nobody asks for: a name that is misspelt."""
    asked = sorted(asked)
    for name in given:
        if name not in asked:
            raise ValueError(
                f"labels= gives {name!r}, which no loss and no function of inputs asks for. Asked for "
                f"{'are ' + ', '.join(asked) if asked else 'is nothing'}."
            )


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns the batch that a ``training_step`` was called with, its first argument."""
    return args[0] if args else next(iter(kwargs.values()))


def labels_of(batch: Any, sources: Mapping[str, Label | None], needed: Mapping[str, bool]) -> dict[str, Any]:
    """Gets out of a batch what some term can use; what a loss only may use can be missing.

    Args:
        batch: The batch.
        sources: How to get what, by name; None is ``batch[1]``.
        needed: What is used, by name, and whether somebody cannot do without.

    Raises:
        ValueError: If something that is needed is not there.
    """
    found = {}
    for name, how in sources.items():
        has_default = isinstance(batch, (tuple, list)) and len(batch) > 1
        if name in needed and (needed[name] or how is not None or has_default):
            found[name] = _label(how, batch, name)
    return found


def _label(how: Label | None, batch: Any, name: str) -> Any:
    try:
        if callable(how):
            return how(batch)
        if how is None and not isinstance(batch, (tuple, list)):
            raise TypeError("batch[1] is the default for batches that are tuples or lists")
        return batch[1 if how is None else how]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        given = how_to_give(name)
        raise ValueError(
            f"A loss needs {name!r}, and {'batch[1]' if how is None else repr(how)} did not get it out of the batch, "
            f"{describe(batch)}: {error!r}. Pass {given}, a function of the batch, its key or its index."
        ) from error
