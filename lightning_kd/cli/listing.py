"""``lightning-kd list``: what there is to put in a configuration, each with its one line."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from types import ModuleType

from lightning_kd.cli import configs
from lightning_kd.cli.errors import unknown
from lightning_kd.schedules import Moment

KINDS = ("losses", "teachers", "tasks", "models", "data", "callbacks", "schedules", "projectors", "configs")


def main(arguments: list[str]) -> None:
    """Print the names of the kinds that are asked for; of all kinds, when none is."""
    parser = argparse.ArgumentParser(prog="lightning-kd list", description=__doc__, allow_abbrev=False)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    asked = parser.parse_args(arguments).kinds
    for kind in asked:
        if kind not in KINDS:
            raise unknown("kind", kind, KINDS)
    print("\n\n".join(_section(kind) for kind in asked or KINDS))


def members(kind: str) -> dict[str, str]:
    """The members of a kind: name to its one line.

    Example:
        >>> "digits_kd" in members("configs")
        True
    """
    if kind == "configs":
        return {name: configs.summary(path) for name, path in configs.shipped().items()}
    # By name, since the core imports no task and no callback.
    module = importlib.import_module(f"lightning_kd.{kind}")
    return {name: _one_line(module, name) for name in _public(module) if _is_made(getattr(module, name, None))}


def _public(module: ModuleType) -> list[str]:
    """What the module offers in ``__all__``; without one, the classes that it defines."""
    if (offered := getattr(module, "__all__", None)) is not None:
        return sorted(name for name in offered if name[0].isupper())
    own = {k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, type)}
    return sorted(k for k, v in own.items() if v.__module__.startswith(module.__name__))


def _is_made(member: object) -> bool:
    """Tells what a configuration can name from what others derive from, or are told by the engine."""
    return isinstance(member, type | None) and not inspect.isabstract(member) and member is not Moment


def _one_line(module: ModuleType, name: str) -> str:
    try:
        member = getattr(module, name)
    except ImportError as error:
        return f"({error})"
    line = (inspect.getdoc(member) or "").partition("\n")[0]
    return re.sub(r":\w+:`([^`]+)`", r"\1", line).replace("``", "")


def _section(kind: str) -> str:
    found = members(kind)
    width = max(map(len, found), default=0)
    return "\n".join([f"{kind}:", *(f"  {name:{width}}  {line}".rstrip() for name, line in found.items())])
