"""Find a configuration: a file, or one that ships with the package, by its name."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import yaml

from lightning_kd.cli.errors import UsageError, unknown

_LINES = re.compile(r"\s*\n\s*")


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
    if Path(name_or_file).is_file():
        try:
            content = yaml.safe_load(Path(name_or_file).read_text(encoding="utf-8"))
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
        return name_or_file
    named = name_or_file.removesuffix(".yaml")
    if named in (known := shipped()):
        return str(known[named])
    raise unknown("configuration", name_or_file, known)


def expand_arguments(arguments: list[str]) -> list[str]:
    """The arguments, with the value of every ``--config`` replaced by the path of its file."""
    expanded: list[str] = []
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if equals and option in ("--config", "-c"):
            expanded.append(f"{option}={find(value)}")
        elif position and arguments[position - 1] in ("--config", "-c"):
            expanded.append(find(argument))
        else:
            expanded.append(argument)
    return expanded
