"""What of a configuration can be written and read again: the rest are defaults, and a class has its own itself."""

from __future__ import annotations

import inspect
import math
import os
import pydoc
import warnings
from functools import lru_cache
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from lightning_kd.cli.errors import UsageError


def lasting(value: Any, name: str = "", strict: bool = False) -> Any:
    """A parsed configuration without the defaults of classes that would be read again as something else.

    Of an argument without a type a file gives back a list for a tuple, and a text for a function or a member of an
    enum; without it, the class takes what it has itself.

    Args:
        value: What was parsed, or a part of it.
        name: Where that part stands.
        strict: Whether to refuse what is no default, and would be read again as something else.

    Raises:
        UsageError: Naming that argument.
    """
    if type(value) is list:
        return [lasting(each, f"{name}.{i}", strict) for i, each in enumerate(value)]
    if type(value) is dict:
        return {key: lasting(each, f"{name}.{key}", strict) for key, each in value.items()}
    if not isinstance(value, Namespace):
        return value
    parts = {key: lasting(each, f"{name}.{key}".lstrip("."), strict) for key, each in vars(value).items()}
    if isinstance(class_path := parts.get("class_path"), str) and isinstance(parts.get("init_args"), Namespace):
        arguments = vars(parts["init_args"])
        inside = f"{name}.init_args"
        parts["init_args"] = _namespace(
            {key: each for key, each in arguments.items() if _lasts(each, class_path, key, inside, strict)}
        )
    return _namespace(parts)


def _namespace(parts: dict[str, Any]) -> Namespace:
    return Namespace(**parts)  # type: ignore[no-untyped-call]  # jsonargparse's own gap


def _lasts(value: Any, class_path: str, argument: str, where: str, strict: bool) -> bool:
    """Whether an argument is to be written."""
    if value is None or type(value) in (bool, int) or (type(value) is float and math.isfinite(value)):
        return True
    if _names_classes(value) or (parser := _parser(class_path, argument)) is None:  # its parts were looked at
        return True
    again = _again(parser, value)
    if _equal(value, again):
        return True
    default = parser.get_defaults().get(f"its.{argument}")
    if _equal(value, default):
        return False
    if strict:
        became = "cannot be read again" if again is _UNREADABLE else f"would be read again as {again!r}"
        raise UsageError(
            f"{where.lstrip('.')}.{argument}: {value!r} is written down for a run, and {became}. Give the argument of "
            f"{class_path} a type that says what it takes: dict[int, float], say"
        )
    return True


def _names_classes(value: Any) -> bool:
    """Whether there are classes with arguments of their own in a value."""
    if isinstance(value, Namespace):
        return "class_path" in value
    return isinstance(value, list | dict) and any(
        map(_names_classes, value.values() if isinstance(value, dict) else value)
    )


@lru_cache(maxsize=4096)
def _parser(class_path: str, argument: str) -> ArgumentParser | None:
    """What reads one argument of a class as it is read in a configuration; None, if it is not known there."""
    kind = pydoc.locate(class_path)
    if not isinstance(kind, type):
        return None
    known = ArgumentParser(exit_on_error=False)
    try:
        names: set[str | int] = {
            name.removeprefix("its.") for name in known.add_class_arguments(kind, "its", fail_untyped=False)
        }
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(kind, "its", fail_untyped=False, skip={*names} - {argument})
    except Exception:  # jsonargparse's, of a class that it cannot look into
        return None
    return parser if argument in names else None


_UNREADABLE = object()


def _again(parser: ArgumentParser, value: Any) -> Any:
    """What an argument is after it was written and read."""
    argument = next(iter(vars(parser.get_defaults()["its"])))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot be written
            text = parser.dump(_namespace({"its": _namespace({argument: value})}), format="json", skip_validation=True)
            return parser.parse_string(text)["its"][argument]
    except Exception:  # of whatever a class takes
        return _UNREADABLE


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are equal, and of one type; so are objects of one type that cannot say it."""
    if isinstance(one, os.PathLike) and isinstance(other, os.PathLike):
        return str(one) == str(other)
    if type(one) is not type(other):
        return False
    if isinstance(one, Namespace):
        one, other = vars(one), {key: each for key, each in vars(other).items() if key in vars(one)}
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return _same(one, other)


def _same(one: Any, other: Any) -> bool:
    """Whether two values of one type that hold no others are equal."""
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool((one == other).all())
    if one is other or isinstance(one, type) or inspect.isroutine(one):
        return one is other
    cannot_say = "__eq__" not in {name for kind in type(one).__mro__[:-1] for name in vars(kind)}
    return cannot_say or repr(one) == repr(other) or bool(one == other)
