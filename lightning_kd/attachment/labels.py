"""Labels: what losses need of a batch, whatever its format."""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

from lightning_kd.attachment.batches import add_new, as_it_comes
from lightning_kd.holding import Made
from lightning_kd.term import how_to_give
from lightning_kd.watching import LabelsOf
from lightning_kd.wiring import describe

Label = Callable[[Any], Any] | str | int
"""How to get labels out of a batch: a function of it, a key, or an index."""


class Labels:
    """Gets labels out of each batch as it came, when somebody asks: of losses, when the step is over.

    So what a step takes out of its batch, exchanges or writes into is no matter. What it has put there, where nothing
    or None was, and what a function fetches from where the step has left it (mixup) is of this step.

    Args:
        sources: How to get what out of a batch, by name; None is ``batch[1]``.
    """

    def __init__(self, sources: Mapping[str, Label | None]) -> None:
        self.sources = dict(sources)

    def of(self, batch: Any, asked: Collection[str], position: list[int] | None = None) -> LabelsOf:
        """Returns what gives the labels of a batch, which no step has had yet.

        Args:
            batch: The batch.
            asked: What may be asked for, by name.
            position: Which samples of the data set these are, if that is known.
        """
        made: Made = {}
        came = as_it_comes(batch, made) if self.sources.keys() & set(asked) else batch
        added: set[tuple[int, Any]] = set()

        def labels(needed: Mapping[str, bool]) -> dict[str, Any]:
            add_new(came, batch, made, added)
            found = labels_of(came, self.sources, needed, batch)
            return found if position is None or "position" in found else {**found, "position": position}

        return labels


def label_sources(
    target: Label | None, index: Label | None, others: Mapping[str, Label] | None
) -> dict[str, Label | None]:
    """Returns how to get what out of a batch, by name, of what a callback was given.

    Raises:
        TypeError: If others are not given by name.
        ValueError: If one of them is given twice.
    """
    given: object = others  # what a caller without a type checker may pass
    if not (given is None or isinstance(given, Mapping)):
        raise TypeError(
            f"labels= says by the name of a loss's argument how to get it from a batch, {{'mask': 'mask'}}: a function "
            f"of the batch, its key or its index; got {describe(given)}."
        )
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


def labels_of(
    batch: Any, sources: Mapping[str, Label | None], needed: Mapping[str, bool], later: Any = None
) -> dict[str, Any]:
    """Gets out of a batch what some term can use; what a loss only may use can be missing.

    Args:
        batch: The batch.
        sources: How to get what, by name; None is ``batch[1]``.
        needed: What is used, by name, and whether somebody cannot do without.
        later: The batch as it is now, in which may be what was not in it before.

    Raises:
        ValueError: If something that is needed is not there.
    """
    found = {}
    for name, how in sources.items():
        has_default = isinstance(batch, (tuple, list)) and len(batch) > 1
        if name in needed and (needed[name] or how is not None or has_default):
            try:
                found[name] = _label(how, batch, name)
            except ValueError:
                if later is None:
                    raise
                found[name] = _label(how, later, name)
            if found[name] is None and later is not None:
                with suppress(ValueError):
                    found[name] = _label(how, later, name)
    return found


def _label(how: Label | None, batch: Any, name: str) -> Any:
    try:
        if callable(how):
            return how(batch)
        if how is None and not isinstance(batch, (tuple, list)):
            raise TypeError("batch[1] is the default for batches that are tuples or lists")
        return batch[1 if how is None else how]
    except (KeyError, IndexError, TypeError, AttributeError, StopIteration) as error:
        given = how_to_give(name)
        raise ValueError(
            f"A loss needs {name!r}, and {'batch[1]' if how is None else repr(how)} did not get it out of the batch, "
            f"{describe(batch)}: {error!r}. Pass {given}, a function of the batch, its key or its index."
        ) from error
