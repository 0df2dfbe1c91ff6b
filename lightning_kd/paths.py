"""Paths that a shared configuration can name without naming a machine."""

from __future__ import annotations

import os
from pathlib import Path


def data_root() -> Path:
    """The folder of the data: ``$LIGHTNING_KD_DATA``, else ``../shared/data``."""
    return Path(os.environ.get("LIGHTNING_KD_DATA") or Path("..", "shared", "data")).expanduser()


def expand_path(path: str | os.PathLike[str]) -> str:
    """``path`` with ``~``, environment variables and ``$LIGHTNING_KD_DATA`` (or its default) filled in.

    Example:
        >>> expand_path("$LIGHTNING_KD_DATA/weights") == str(data_root() / "weights")
        True
    """
    path = os.fspath(path)
    for name in ("${LIGHTNING_KD_DATA}", "$LIGHTNING_KD_DATA"):
        path = path.replace(name, str(data_root()))
    return os.path.expanduser(os.path.expandvars(path))


def cache_root() -> Path:
    """The folder for what can be made again: ``$XDG_CACHE_HOME/lightning_kd``, else ``~/.cache/lightning_kd``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_kd"
