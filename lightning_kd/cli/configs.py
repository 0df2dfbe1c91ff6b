"""Find a configuration: a file, or one that ships with the package, by its name."""

from __future__ import annotations

import inspect
import os
import pydoc
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from lightning_kd.cli.errors import CALLED, GROUPS, UsageError, guess, unknown
from lightning_kd.paths import expand_path

_CONFIG = ("--config", "-c")
_LINES = re.compile(r"\s*\n\s*")


CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
"""What a class is given by."""


def _refuse_twice(node: Any, file: str) -> None:
    """Refuses keys that stand twice in a part of a YAML file, of which the first would be forgotten: of two terms."""
    seen = set()
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = part if isinstance(part, tuple) else (None, part)
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            if key.value in seen:
                raise UsageError(
                    f"{file}, line {key.start_mark.line + 1}: {key.value} stands there twice, and the first one would "
                    "be forgotten; put both together, or rename one"
                )
            seen.add(key.value)
        _refuse_twice(value, file)


def _refuse_arguments_beside(content: Any, file: str, at: str = "") -> None:
    """Refuses a class whose arguments stand beside its path, where nobody would look for them."""
    parts: Any = content.items() if isinstance(content, dict) else enumerate(content)
    if isinstance(content, dict) and "class_path" in content:
        beside = [str(key) for key in content if key not in CLASS_KEYS]
        if beside:
            raise UsageError(
                f"{file}: {at}: {', '.join(beside)} beside class_path: expected the arguments of "
                f"{content['class_path']} in init_args: {{{beside[0]}: ...}}"
            )
    for key, part in parts:
        if isinstance(part, dict | list):
            _refuse_arguments_beside(part, file, f"{at}.{key}" if at else str(key))


def _refuse_empty_unknown(content: dict[str, Any], file: str) -> None:
    """Refuses a section of another name in which nothing is given: jsonargparse looks only at what is."""
    for at, part in (("", content), *((f"{group}.", content.get(group)) for group in CALLED)):
        for key in (key for key, value in part.items() if _is_empty(value)) if isinstance(part, dict) else ():
            member: Any = pydoc.locate(CALLED[at[:-1]]) if at else None
            known = list(inspect.signature(member).parameters) if at else GROUPS
            if key not in known:
                near = guess(str(key), known) or f" There are: {', '.join(known)}"
                raise UsageError(f"{file}: a configuration has no section {at}{key}.{near}")


def _is_empty(part: Any) -> bool:
    return isinstance(part, dict) and all(map(_is_empty, part.values()))


def shipped() -> dict[str, Path]:
    """The shipped configurations: name to file."""
    folder = files("lightning_kd.configs")
    found = {Path(entry.name).stem: Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    return dict(sorted(found.items()))


def summary(path: Path) -> str:
    """The first comment line of a YAML file: what it is, in one line."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def find(name_or_file: str) -> str:
    """The path of a configuration.

    Raises:
        UsageError: If it is neither a YAML file of keys and values nor the name of a shipped configuration.
    """
    name_or_file = expand_path(name_or_file)
    if Path(name_or_file).is_file():
        try:
            text = Path(name_or_file).read_text(encoding="utf-8")
            content = yaml.safe_load(text)
        except UnicodeDecodeError as error:
            raise UsageError(f"{name_or_file} is not UTF-8 text ({error}): save it as such") from error
        except yaml.MarkedYAMLError as error:
            at = error.problem_mark or error.context_mark
            place = f", line {at.line + 1}, column {at.column + 1}" if at else ""
            raise UsageError(f"{name_or_file}{place}: this is not YAML, {error.problem or error.context}") from error
        except yaml.YAMLError as error:
            raise UsageError(f"{name_or_file} is not YAML: {_LINES.sub(' ', str(error))}") from error
        if not isinstance(content, dict):
            raise UsageError(
                f"{name_or_file}: expected keys and values (trainer:, data:, model:), received "
                f"{'an empty file' if content is None else f'a {type(content).__name__}'}"
            )
        _refuse_twice(yaml.compose(text, yaml.SafeLoader), name_or_file)
        _refuse_arguments_beside(content, name_or_file)
        _refuse_empty_unknown(content, name_or_file)
        return name_or_file
    named = name_or_file.removesuffix(".yaml")
    if named in (known := shipped()):
        return str(known[named])
    if Path(name_or_file).is_dir():
        raise UsageError(
            f"--config: {name_or_file!r} is a folder; give a YAML file: a run's is config.yaml, beside its metrics.csv"
        )
    if named != name_or_file:
        raise UsageError(
            f"no file {name_or_file!r} (looked from {os.getcwd()!r}), and no shipped configuration {named!r}."
            f"{guess(named, list(known))} `lightning-kd list configs` names them"
        )
    if beside := [file for file in (f"{name_or_file}.yaml", f"{name_or_file}.yml") if Path(file).is_file()]:
        raise UsageError(f"no shipped configuration {name_or_file!r}. Did you mean {beside[0]}?")
    raise unknown("configuration", name_or_file, known)


def expand_arguments(arguments: list[str]) -> list[str]:
    """The arguments, with the value of every ``--config`` replaced by the path of its file."""
    expanded: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if equals and option in _CONFIG:
            expanded.append(f"{option}={find(value)}")
        else:
            expanded.append(find(argument) if expanded and expanded[-1] in _CONFIG else argument)
    return expanded
