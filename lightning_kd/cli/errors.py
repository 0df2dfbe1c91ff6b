"""Mistakes of the person at the terminal: told in one line, with exit code 2."""

from __future__ import annotations

import difflib
import inspect
import pydoc
import re
from collections.abc import Iterable, Sequence


class UsageError(Exception):
    """Something that the command line or a file it names got wrong; the message says the remedy."""


GROUPS = ("trainer", "model", "data", "seed_everything", "teacher_fit", "ckpt_path")
"""What a configuration has at its top."""

OPTIONS = {"compare": ("seeds", "teacher", "student-ckpt", "output"), "predict": ("output",)}
"""What a command takes besides ``--config`` and what a configuration has."""

CALLED = {"trainer": "lightning.Trainer", "model": "lightning_kd.DistillationModule"}
"""What the arguments of a group go to."""

OWN_MODULE = (
    ". Here model takes task, student, teacher and terms, and no class. A LightningModule of your own is trained by "
    "LightningCLI, with lightning_kd.Distillation in trainer.callbacks: docs/doors.md"
)

NAMED = ("losses", "schedules", "teachers", "tasks", "models", "data")
"""Where the classes are that a configuration names."""


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not among the known ones: the closest first, then all of them.

    Example:
        >>> unknown("colour", "rde", ["red", "blue"]).args[0]
        "no colour 'rde'. Did you mean red? There are: blue, red"
    """
    names = sorted(known)
    return UsageError(f"no {what} {name!r}.{guess(name, names)} There are: {', '.join(names) or 'none'}")


def alternatives(told: str) -> list[str]:
    """What each type of a union complained of, where jsonargparse says that a value fits none of them.

    Example:
        >>> told = ["... any of the Union subtypes", "Errors:", "  - one", "  - two", "Given value type: int"]
        >>> alternatives(chr(10).join(told))
        ['one', 'two']
    """
    found = re.search(r"^( *)Errors:\n(.*?)\n\1Given value type: ", told, re.DOTALL | re.MULTILINE)
    if not found or "Union subtypes" not in told:
        return []
    each = re.split(rf"^{found[1]}  - ", found[2], flags=re.MULTILINE)[1:]
    return [re.sub(rf"^{found[1]}    ", "", one, flags=re.MULTILINE).rstrip("\n") for one in each]


def expected(told: str) -> str:
    """What would have fitted, where jsonargparse says that a value is of none of some plain types.

    Example:
        >>> told = ["... any of the Union subtypes", "Errors:", "  - Expected a <class 'NoneType'>"]
        >>> told += ["  - Expected a <class 'int'>", "Given value type: <class 'str'>", "Given value: two"]
        >>> expected(chr(10).join(told))
        'Expected null, int; got two'
    """
    kinds = [re.sub(r"^Expected (a )?", "", each) for each in alternatives(told)]
    kinds = [re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", each).replace("NoneType", "null") for each in kinds]
    kinds = [re.sub(r"typing\.Literal\[(.*)\]$", r"\1", each) for each in kinds]
    kinds = [re.sub(r"dot import path string: .*", "the name of a class", each, flags=re.DOTALL) for each in kinds]
    given = re.findall(r"Given value: (?:NestedArg\(.*val=)?(.*?)\)?$", told, re.MULTILINE)
    return f"Expected {', '.join(dict.fromkeys(kinds))}; got {given[0] if given else 'something else'}"


def closest_argument(told: str, command: str = "") -> str:
    """What was probably meant, where jsonargparse says that it does not know an option or a class.

    Args:
        told: What it says.
        command: The command, which may have options of its own.

    Example:
        >>> closest_argument("Unrecognized arguments: --seed 0", "compare")
        '. Did you mean seeds?'
        >>> closest_argument("given class_path 'lightning_kd.Term': Option 'wieght' is not accepted")
        '. Did you mean weight?'
        >>> closest_argument("module 'lightning_kd.losses' has no attribute 'DDK'")
        '. Did you mean DKD?'
        >>> closest_argument("--model.student.help: Expected a dot import path string: Timm")
        '. Did you mean lightning_kd.models.Timm?'
        >>> closest_argument("Import path lightning_kd.losses.KD does not correspond to a subclass of Term")
        '. Did you mean loss: {class_path: lightning_kd.losses.KD}, one level deeper?'
    """
    if missing := re.search(r"module '(?P<of>[\w.]+)' has no attribute '(?P<name>\w+)'", told):
        known = [name for name in dir(pydoc.locate(missing["of"])) if name[0].isupper()]
        return f".{close}" if (close := guess(missing["name"], known)) else ""
    if own := re.search(r"(?:dot import path string: |the name of a class; got )(?P<name>[A-Za-z]\w+)$", told):
        modules = {f"lightning_kd.{kind}": pydoc.locate(f"lightning_kd.{kind}") for kind in NAMED}
        of = {name: module for module, found in modules.items() for name in getattr(found, "__all__", ())}
        exact = of.get(own["name"])  # a name alone is resolved only where something has imported its class
        close = f" Did you mean {exact}.{own['name']}?" if exact else guess(own["name"], list(of))
        return f".{close}" if close else ""
    found = re.search(r".*class_path '(?P<of>[^']+)'.*Option '(?P<name>\w+)' is not accepted", told, re.DOTALL)
    found = found or re.search(r"(?:option '|arguments: --)(?P<of>trainer|model)\.(?P<name>\w+)", told)
    if not found:
        return _top_level(told, command)
    if found["of"] == "model" and found["name"] in ("class_path", "init_args"):
        return OWN_MODULE
    member = pydoc.locate(CALLED.get(found["of"], found["of"]))
    if not callable(member):
        return ""
    known = list(inspect.signature(member).parameters)
    other = f". What else the model takes: options: {{{found['name']}: ...}}" if "options" in known else ""
    return f".{close}" if (close := guess(found["name"], known)) else other


def _top_level(told: str, command: str) -> str:
    """What was probably meant by what stands too high: a file, a loss, or what belongs into a group."""
    if loss := re.search(r"Import path (?P<name>\S+) does not correspond to a subclass of Term$", told):
        return f". Did you mean loss: {{class_path: {loss['name']}}}, one level deeper?"
    if "class_path='torch.optim.Optimizer'" in told:
        return ". Name its class, too: --model.optimizer=torch.optim.AdamW"
    if file := re.match(r"Unrecognized arguments: (?P<name>[^-\s]\S*\.ya?ml)", told):
        return f". Did you mean --config {file['name']}?"
    top = re.search(r"(?:does not accept option '|arguments: --)(?P<name>[\w-]+)", told)
    if not top:
        return ""
    for group, name in CALLED.items():
        called = pydoc.locate(name)
        if callable(called) and top["name"] in inspect.signature(called).parameters:
            return f". Did you mean {group}.{top['name']}?"
    options = "config", *OPTIONS.get(command, ())
    return f".{close}" if (close := guess(top["name"], [*GROUPS, *options])) else ""


def guess(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """The question whether the closest of the known names were meant, or what begins so; empty if none is close.

    Args:
        name: What was written.
        known: What there is.
        cutoff: How alike they have to be, from 0 to 1; half, and of two letters they may have changed places.

    Example:
        >>> guess("dk", ["hint", "kd"], cutoff=0.5)
        ' Did you mean kd?'
    """
    close = difflib.get_close_matches(name, known, n=3, cutoff=cutoff) or [
        each for each in known if each.startswith(name)
    ]
    return f" Did you mean {' or '.join(close)}?" if close else ""
