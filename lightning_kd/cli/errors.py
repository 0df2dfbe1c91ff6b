"""Mistakes of the person at the terminal: told in one line, with exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """Something that the command line or a file it names got wrong; the message says the remedy."""


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not among the known ones: the closest first, then all of them.

    Example:
        >>> unknown("colour", "rde", ["red", "blue"]).args[0]
        "no colour 'rde'. Did you mean red? There are: blue, red"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    guess = f" Did you mean {' or '.join(close)}?" if close else ""
    return UsageError(f"no {what} {name!r}.{guess} There are: {', '.join(names) or 'none'}")
