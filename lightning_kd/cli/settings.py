"""Settings of runs: what of them decides a training, and what tells one from another."""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning_kd.cli.errors import UsageError
from lightning_kd.paths import expand_path
from lightning_kd.teachers.cached import FILE

DISPLAY = (
    "enable_progress_bar",
    "enable_model_summary",
    "log_every_n_steps",
    "logger",
    "profiler",
    "default_root_dir",
    "limit_predict_batches",
)
"""What of the trainer decides only what is shown, or written beside the network."""

LOADING = {"num_workers": 0, "pin_memory": False, "persistent_workers": False, "prefetch_factor": None}
"""What of the data decides only how they are loaded, and torch's defaults."""

SHOWN = 4
"""How many settings that differ are named."""


class TrainedOtherwiseError(UsageError):
    """A teacher's checkpoint was trained with other settings than a configuration has, or one of these is mistyped."""


def fingerprint(settings: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that settings share only with equal ones, or with ones that look different."""
    if "trainer" in settings:
        settings = settings | {"trainer": {k: v for k, v in settings["trainer"].items() if k not in DISPLAY}}
    if "data" in settings:
        settings = settings | {"data": _loaded_anyhow(settings["data"])}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _loaded_anyhow(data: Any) -> Any:
    """The data's settings as if nothing was said of how they are loaded."""
    if isinstance(data, dict):
        return {key: LOADING.get(key, _loaded_anyhow(value)) for key, value in data.items()}
    return [_loaded_anyhow(each) for each in data] if isinstance(data, list) else data


def contents(config: Any) -> dict[str, str]:
    """What is in the files that a configuration names, and in what tells a teacher's cache from another, by file.

    A file that is written again under its name, by another training, is another teacher; folders are not looked into.
    """
    if isinstance(config, list):
        return {file: content for one in config for file, content in contents(one).items()}
    if isinstance(config, dict):
        if config.get("teacher") is None and isinstance(folder := config.get("folder"), str):  # of a Cached
            config = config | {"folder": str(Path(folder, FILE))}
        return contents(list(config.values()))
    if not isinstance(config, str) or not os.path.isfile(file := expand_path(config)):
        return {}
    written = os.stat(file)
    return {config: _content(os.path.abspath(file), written.st_size, written.st_mtime_ns)}


@lru_cache
def _content(file: str, size: int, written: int) -> str:  # read again only after it was written again
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_record(path: Path, settings: dict[str, Any], names: dict[str, str] | None = None) -> None:
    """Refuse a teacher that was trained otherwise than these settings say.

    Args:
        path: The checkpoint.
        settings: The configuration of the teacher's own training.
        names: Where those settings were written, as ``written`` says.

    Raises:
        UsageError: If the record is broken, or a file of the configuration is not there.
        TrainedOtherwiseError: Naming what differs.
    """
    record = path.parent / f"{path.name}.json"
    if not record.is_file():
        print(f"teacher: no record beside {path} of how it was trained; it is taken as it is")
        return
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"{record}, the record of how the teacher was trained, cannot be read ({error}). Delete it to take the "
            "teacher as it is, or delete both to train again"
        ) from error
    then, now = _flat(before), _flat(settings)
    counting = [k for k in sorted(then | now) if not (k.startswith("data.") and k.rpartition(".")[2] in LOADING)]
    changed = [(k, then.get(k), now.get(k)) for k in counting if then.get(k) != now.get(k)]
    if not changed:
        return
    for key, was, given in changed:
        if _exists(was) and isinstance(given, str) and not _exists(given):
            raise UsageError(f"{_named(key, names)}: there is no {given} (looked from {os.getcwd()!r})")
    # What was written once may decide two settings: the length of the run, and of its scheduler.
    differ = list(dict.fromkeys(f"{_named(key, names)}: {was} then, {given} now" for key, was, given in changed))
    more = f"; and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
    raise TrainedOtherwiseError(
        f"the teacher at {path} was trained with other settings ({'; '.join(differ[:SHOWN])}{more}). Delete it to "
        "train again, name another checkpoint in the configuration, or take it as it is with --teacher_fit null"
    )


def _named(key: str, names: dict[str, str] | None) -> str:
    """What the key of a setting is called where it was written."""
    for start, written_as in (names or {}).items():
        if key == start or key.startswith(f"{start}."):
            return written_as + key.removeprefix(start)
    return key


def _exists(path: Any) -> bool:
    return isinstance(path, str) and os.path.exists(expand_path(path))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
