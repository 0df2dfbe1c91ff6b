"""Find a configuration: a file, or one that ships with the package, by its name."""

from __future__ import annotations

import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from lightning_kd.cli.errors import UsageError, guess, unknown

_CONFIG = ("--config", "-c")
_OF_A_TERM = re.compile(r"--model\.terms\.([^.=]+)(?:\.(?:init_args\.)?(\w+))?")
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
        return name_or_file
    named = name_or_file.removesuffix(".yaml")
    if named in (known := shipped()):
        return str(known[named])
    if named != name_or_file:
        raise UsageError(
            f"no file {name_or_file!r} (looked from {os.getcwd()!r}), and no shipped configuration {named!r}."
            f"{guess(named, list(known))} `lightning-kd list configs` names them"
        )
    raise unknown("configuration", name_or_file, known)


def expand_arguments(arguments: list[str]) -> list[str]:
    """The arguments, with the value of every ``--config`` replaced by the path of its file.

    A file that changes some terms, or adds one, leaves those of the files before it: they are given again behind it.
    """
    expanded: list[str] = []
    terms: dict[str, Any] = {}
    options: list[list[str]] = []
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        before = arguments[position - 1] if position else ""
        if argument == "--model.terms=null":
            terms, options = {}, []
        own = _OF_A_TERM.match(option)
        if own:
            options.append([own[1], argument, *([] if equals else arguments[position + 1 : position + 2])])
        if not ((equals and option in _CONFIG) or before in _CONFIG):
            expanded.append(argument)
            continue
        file = find(value if equals else argument)
        expanded.append(f"{option}={file}" if equals else file)
        named = _terms_of(file)
        if named is None:
            terms, options, named = {}, [], {}
        for name in terms.keys() - named.keys() if named else ():
            expanded.append(f"--model.terms.{name}={json.dumps(terms[name])}")
            expanded += [each for owner, *given in options if owner == name for each in given]
        terms |= {name: _changed(terms.get(name), term) for name, term in named.items()}
    return expanded


def _terms_of(file: str) -> dict[str, Any] | None:
    """The terms that a file names; None if it says that there are none."""
    model = yaml.safe_load(Path(file).read_text(encoding="utf-8")).get("model")
    terms = model.get("terms", {}) if isinstance(model, dict) else {}
    return terms if isinstance(terms, dict) or terms is None else {}


def _changed(before: Any, after: Any) -> Any:
    """What a class is given by, with what a later file says of it; of another class nothing stays."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return after
    if after.get("class_path", before.get("class_path")) != before.get("class_path"):
        return after
    return before | {key: _changed(before.get(key), value) for key, value in after.items()}


def refuse_terms_without_loss(arguments: list[str]) -> None:
    """Refuses a term that is named, and given no loss by any of the files and options: the name is mistyped.

    Args:
        arguments: What stands on the command line, with the paths of the files.

    Raises:
        UsageError: If there is such a term.
    """
    named: dict[str, bool] = {}
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in _CONFIG:
            file = value if equals else "".join(arguments[position + 1 : position + 2])
            for name, term in (_terms_of(file) or {}).items():
                whole = not isinstance(term, dict) or "loss" in term or "class_path" in term
                named[name] = named.get(name, False) or whole
        elif own := _OF_A_TERM.match(option):
            named[own[1]] = named.get(own[1], False) or own[2] in (None, "loss")
    there = sorted(name for name, has in named.items() if has)
    for name in (each for each, has in named.items() if not has):
        raise UsageError(
            f"term {name!r} has no loss; the terms with one are: {', '.join(there) or 'none'}.{guess(name, there, 0.5)}"
        )
