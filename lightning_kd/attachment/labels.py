"""Labels: what losses need of a batch, whatever its format."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_kd.term import how_to_give
from lightning_kd.wiring import describe

Label = Callable[[Any], Any] | str | int
"""How to get labels out of a batch: a function of it, a key, or an index."""


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
