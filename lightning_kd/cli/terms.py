"""Which of the terms a mistake is in: what complains of a value knows its loss, and not the term's name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from lightning_kd.term import Term


def name_term(error: Exception, terms: Any) -> None:
    """Add to an error the name of the term that makes it, where one of them alone does.

    Args:
        error: What was raised when a configuration was parsed, or its classes made.
        terms: What was given, by name.
    """
    parsed = re.match(r'Parser key "([^"]+)"', str(error))
    if parsed and not parsed[1].startswith("model.terms"):  # of the file that a term's class is in, too, say
        return
    for name, given in terms.items() if isinstance(terms, Mapping) else ():
        complaint = _complaint(given)
        if complaint and complaint in str(error):
            error.add_note(f"This happened in the distillation term {name!r}.")
            return


def _complaint(given: Any) -> str:
    """What is complained of when a term is made alone, by the last line; empty, where nothing is."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--term", type=Term)
    try:
        given = given.as_dict() if hasattr(given, "as_dict") else given
        parser.instantiate_classes(parser.parse_object({"term": given}))
    except Exception as error:  # whatever a class says of its arguments
        return (str(error).strip().splitlines() or [""])[-1].strip()
    return ""


def terms_in(arguments: Any) -> dict[str, Any]:
    """The terms that the configurations of a command line have, those of a later one put into those before."""
    found: dict[str, Any] = {}
    for file in arguments if isinstance(arguments, list) else ():
        path = Path(str(file).removeprefix("--config="))
        if path.suffix in (".yaml", ".yml") and path.is_file():
            with suppress(yaml.YAMLError, UnicodeDecodeError):  # which is told better where it is read
                content = yaml.safe_load(path.read_text(encoding="utf-8"))
                model = content.get("model") if isinstance(content, dict) else None
                found = _merged(found, (model.get("terms") if isinstance(model, dict) else None) or {})
    return found


def _merged(before: Any, given: Any) -> Any:
    if not (isinstance(before, dict) and isinstance(given, dict)):
        return given
    return before | {key: _merged(before.get(key), value) for key, value in given.items()}
