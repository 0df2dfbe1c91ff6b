"""Wiring: paths that name an output of a module inside of a model."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

OUTPUT = "output"
"""The path of what a model's own ``forward`` returned."""

TAPPED = ("the student", "the teacher")
"""Whose outputs are captured; of other models a path names a module alone."""

_SELECTOR = re.compile(
    r"""\.(?P<name>\w+)|\[(?P<index>-?\d+)\]|\[(?P<start>-?\d+)?:(?P<stop>-?\d+)?\]"""
    r"""|\[(?P<quote>["'])(?P<key>.+?)(?P=quote)\]"""
)


class Levels(list[Any]):
    """What a slice selected: a list of which each item is compared with its like."""


class Path:
    """A path in a model: a module, and what to select inside of the module's output.

    ``"layer3"`` is the output of the submodule ``layer3``, as ``named_modules()`` spells it;
    ``"encoder[0]"`` the first item of what ``encoder`` returned; ``"output"`` what the model itself
    returned, ``"output.logits"`` and ``'output["logits"]'`` an attribute or a key of that. A slice selects levels:
    ``"neck[:]"`` is the list of all that ``neck`` returned, a tuple or a dict, and ``"neck[1:4]"`` three of them.

    Args:
        text: The path.

    Raises:
        TypeError: If it is no text.
        ValueError: If the text is not a path.

    Example:
        >>> Path("output.logits").select({"logits": 1})
        1
    """

    def __init__(self, text: str) -> None:
        given: object = text  # what a caller without a type checker may pass
        if not isinstance(given, str):
            raise TypeError(
                f"a path is the name of a module as text, 'layer3', or {OUTPUT!r} for what the model returns; got "
                f"{given!r}."
            )
        self.text = text
        if text == OUTPUT or text.startswith((OUTPUT + ".", OUTPUT + "[")):
            self.module, rest = OUTPUT, text[len(OUTPUT) :]
        else:
            self.module, bracket, rest = text.partition("[")
            rest = bracket + rest
        self.selectors: list[str | int | slice] = []
        position = 0
        while match := _SELECTOR.match(rest, position):
            self.selectors.append(_selector(match))
            position = match.end()
        if not self.module or position != len(rest):
            raise ValueError(
                f"{text!r} is not a path. A path is a module name as named_modules() spells it ('layer3', "
                f"'encoder.4[0]', 'neck[:]'), or {OUTPUT!r} with what to select inside of it ('output.logits', "
                "'output[0]')."
            )

    def select(self, value: Any) -> Any:
        """Returns what the path selects inside of its module's output."""
        for selector in self.selectors:
            if isinstance(value, Tensor) and not isinstance(selector, str):
                part = f"{_spelled(selector)} of {describe(value)}"
                raise KeyError(f"{self.text!r}: {part} would be a part of the batch.")
            whole = value
            try:
                if isinstance(selector, slice):
                    value = Levels(list(value.values() if isinstance(value, Mapping) else value)[selector])
                elif isinstance(selector, str) and not isinstance(value, Mapping):
                    value = getattr(value, selector)
                else:
                    value = value[selector]
            except (AttributeError, KeyError, IndexError, TypeError) as error:
                raise KeyError(f"{self.text!r}: {_spelled(selector)} is not in {describe(value)}.") from error
            if isinstance(selector, slice) and not value:
                raise KeyError(f"{self.text!r}: {_spelled(selector)} selects nothing of {describe(whole)}.")
        return value


def _selector(match: re.Match[str]) -> str | int | slice:
    if match["index"]:
        return int(match["index"])
    if match["name"] or match["key"]:
        return match["name"] or match["key"]
    return slice(*(int(bound) if bound else None for bound in (match["start"], match["stop"])))


def _spelled(selector: str | int | slice) -> str:
    if isinstance(selector, slice):
        return f"[{'' if selector.start is None else selector.start}:{'' if selector.stop is None else selector.stop}]"
    return repr(selector) if isinstance(selector, str) else f"[{selector}]"


def describe(value: Any) -> str:
    """Says in a few words what a captured value is, for error messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, nn.Module):
        return f"a module ({type(value).__name__})"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)} items"
    fields = [name for name in getattr(value, "__dict__", {}) if not name.startswith("_")]
    return f"a {type(value).__name__}" + (f" with the fields {', '.join(map(repr, fields))}" if fields else "")


def find_module(root: nn.Module, path: str, owner: str) -> nn.Module:
    """Returns the submodule at a dotted path; compiled modules on the way are looked through.

    Args:
        root: Where the path starts.
        path: Dotted path, as ``root.named_modules()`` spells it.
        owner: What the root is called in the error message, such as ``"the student"``.

    Raises:
        ValueError: If there is no such module; the message lists the closest names.
    """
    module = root
    for part in path.split("."):
        module = getattr(module, "_orig_mod", module)
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{owner} ({type(root).__name__}) is TorchScript, inside of which nothing can be tapped, {path!r} for "
                f"one; only {OUTPUT!r}, what it returns. Give the module that it was made of."
            )
        child = module._modules.get(part)
        if child is None:
            names = [name for name in map(_uncompiled, dict(root.named_modules())) if name]
            names = list(dict.fromkeys(names))
            close = difflib.get_close_matches(path, names, n=5, cutoff=0.4) or [n for n in names if "." not in n]
            output = f", or {OUTPUT!r} for what forward() returns" if owner in TAPPED else ""
            raise ValueError(
                f"{owner} ({type(root).__name__}) has no module {path!r}. Closest: "
                f"{', '.join(map(repr, close[:12])) or 'it has no submodules'}. A path is a name of "
                f"named_modules(){output}."
            )
        module = child
    return module


def lazy_in(module: nn.Module) -> list[str]:
    """Returns the names of what has no weights before its first call."""
    return [name for name, x in (*module.named_parameters(), *module.named_buffers()) if is_lazy(x)]


def _uncompiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
