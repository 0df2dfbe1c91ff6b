"""What a checkpoint needs besides weights to become a network again: its recipe, as plain Python types."""

from __future__ import annotations

import inspect
import os
import pkgutil
import warnings
from collections.abc import Callable
from enum import Enum
from functools import cache
from numbers import Integral, Real
from pathlib import Path, PurePath
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_kd.attachment.random_state import random_numbers_restored
from lightning_kd.caching.checks import fingerprint
from lightning_kd.cli.errors import UsageError
from lightning_kd.paths import expand_path
from lightning_kd.teachers import Frozen, Teacher
from lightning_kd.teachers.weights import read_checkpoint

KEY = "lightning_kd"
FROZEN = "lightning_kd.teachers.Frozen"
UNLIKE = "unlike"
"""Where a recipe says why it does not make the network that was trained."""

INITIAL_WEIGHTS = {
    "weights": None,
    "pretrained": False,
    "encoder_weights": None,
    "weights_backbone": None,
    "backbone_from": None,
}
"""Arguments that name weights, and their value where none are loaded."""

_OF_A_CLASS_OF_ITS_OWN: dict[type, Callable[[Any], Any]] = {Integral: int, Real: float, str: str}
"""What numbers and texts of numpy, or of jsonargparse's restricted types, become."""

Recipe = dict[str, Any]


def plain(value: Any, initial: bool = False) -> Any:
    """Configuration values as plain types, without what only says where training started from, unless that is asked.

    What a file would give back as something else, a tuple for one, says what it was.
    """
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if type(value) in (bool, int, float, str, type(None)):
        return value
    if isinstance(value, list):
        return [plain(each, initial) for each in value]
    if isinstance(value, dict):
        kept = {key: plain(each, initial) for key, each in value.items()}
        if not all(type(key) is str for key in kept):
            return {KEY: "dict", "of": [[plain(key), each] for key, each in kept.items()]}
        if "class_path" in kept and "init_args" in kept and not initial:
            kept["init_args"] = {
                key: INITIAL_WEIGHTS[key] if key in INITIAL_WEIGHTS and _names_weights(each) else each
                for key, each in kept["init_args"].items()
            }
        return kept
    return _named(value, initial)


def _names_weights(value: Any) -> bool:
    """Whether a plain value may name weights, and is not one of several numbers, say."""
    return isinstance(value, str | bool) or (isinstance(value, dict) and value.get(KEY) in ("enum", "path"))


def _named(value: Any, initial: bool) -> Any:
    """What says of an argument that is no plain type how it is found again."""
    if isinstance(value, Enum):  # whose members may be texts and numbers
        return {KEY: "enum", "of": _import_path(type(value)), "name": value.name}
    for kind, as_plain in _OF_A_CLASS_OF_ITS_OWN.items():
        if isinstance(value, kind):
            return as_plain(value)
    if type(value) is tuple:
        return {KEY: "tuple", "of": [plain(each, initial) for each in value]}
    name, of = type(value).__name__, str(value)
    if isinstance(value, PurePath):
        name = "path"
    elif isinstance(value, type):
        name, of = "class", _import_path(value)
    elif isinstance(value, torch.dtype):
        name, of = "dtype", of.removeprefix("torch.")
    elif inspect.isroutine(value):
        name, of = "function", f"{value.__module__}.{value.__qualname__}"
    elif isinstance(value, os.PathLike):
        return of
    return {KEY: name, "of": of}


def _import_path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def whole_of(config: Any, fill: Callable[[Recipe], Recipe] = lambda recipe: recipe) -> Recipe:
    """The recipe of a network with all that was said of it, where training started from, too."""
    return fill(plain(config, initial=True))


def recipe_of(network: nn.Module, config: Any, fill: Callable[[Recipe], Recipe] = lambda recipe: recipe) -> Recipe:
    """The recipe of a network, by which it was made once more to see that it is the same.

    What only says where training started from is left out, unless the network is another without it. If there is no
    such recipe, ``recipe[UNLIKE]`` says why.

    Args:
        network: The network.
        config: How it was made: ``class_path`` and ``init_args``.
        fill: What fills in what is linked.
    """
    without, whole = (fill(plain(config, initial)) for initial in (False, True))
    if without != whole and unlike(network, without, tensors=True) is None:
        return without
    why = unlike(network, whole)
    return whole if why is None else without | {UNLIKE: why}


def unlike(network: nn.Module, recipe: Recipe, tensors: bool = False) -> str | None:
    """What of a network is otherwise when it is made again by a recipe, or why it cannot be; None, if it is the same.

    Compared are all modules by their classes, what they hold in public as plain types, and the shapes of weights. What
    is another each time, a time or a number that counts them, says nothing.

    Args:
        network: The network.
        recipe: What it is made of again.
        tensors: Whether to compare the values of tensors, too, that no file of weights holds: constants, if they are
            not drawn.
    """
    try:
        was, now = _contents(network, tensors), _made(recipe, tensors)
        differing = [key for key in {**was, **now} if not _alike(was.get(key), now.get(key))]
        again = _made(recipe, tensors) if differing else now
        differing = [key for key in differing if _alike(now.get(key), again.get(key))]
    except UsageError as error:
        return str(error)
    except Exception as error:  # of whatever a network holds
        return f"made again, it cannot be compared: {error!r}"
    if not differing:
        return None
    key = differing[0]
    return f"made again, its {key} is {_shown(now.get(key))}, and was {_shown(was.get(key))}"


def _made(recipe: Recipe, tensors: bool) -> dict[str, Any]:
    """The contents of a network that is made for that alone."""
    with warnings.catch_warnings(), random_numbers_restored():
        warnings.simplefilter("ignore")  # they were shown when the network was made
        return _contents(build(recipe), tensors)


def _contents(network: nn.Module, tensors: bool) -> dict[str, Any]:
    """What there is to compare of a network, by what a person calls it."""
    found: dict[str, Any] = {}
    weights = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    buffers = {name: value for name, value in network.named_buffers() if name not in weights}
    for name, module in network.named_modules():
        found[f"{name or 'network'}'s class"] = _import_path(type(module))
        own = {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE and key[0] != "_"}
        found |= {f"{name}.{key}".lstrip("."): value for key, value in own.items()}
    kept = {key: value for key, value in (found | buffers).items() if tensors or not isinstance(value, Tensor)}
    return kept | {f"{key}'s shape": list(value.shape) for key, value in weights.items() if not is_lazy(value)}


_OF_EVERY_MODULE = vars(nn.Module()).keys()
_COMPARED = (Real, str, Enum, type, torch.dtype, type(None))
_DEPTH = 20


def _alike(one: Any, other: Any, depth: int = _DEPTH) -> bool:
    """Whether two values are the same; so are objects that cannot say it, and what is too deep inside to look."""
    if any(isinstance(one, kind) != isinstance(other, kind) for kind in (list, tuple, dict, Tensor)):
        return False
    if isinstance(one, list | tuple) and depth:
        return len(one) == len(other) and all(_alike(*each, depth - 1) for each in zip(one, other, strict=True))
    if isinstance(one, dict) and depth and all(isinstance(key, Real | str | Enum) for key in (*one, *other)):
        return bool(one.keys() == other.keys()) and all(_alike(one[key], other[key], depth - 1) for key in one)
    return isinstance(one, list | tuple | dict) or _same(one, other)


def _same(one: Any, other: Any) -> bool:
    """Whether two values that hold no others are the same; objects that cannot say it count as that."""
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    if inspect.isroutine(one) and inspect.isroutine(other):
        return bool(_named(one, initial=True) == _named(other, initial=True))
    one, other = (str(each) if isinstance(each, os.PathLike) else each for each in (one, other))
    if not isinstance(one, _COMPARED) and not isinstance(other, _COMPARED):
        return True
    return bool(one == other or repr(one) == repr(other))  # NaN is not itself


def _shown(value: Any, length: int = 60) -> str:
    """A value as a message shows it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= length else f"{text[:length]}…"


@cache
def _arguments(kind: type) -> frozenset[str]:
    """The arguments that a class takes by name, and those that it gives on to another's."""
    parser = ArgumentParser(exit_on_error=False)
    given_on = parser.add_class_arguments(kind, "its", fail_untyped=False)
    return frozenset({*inspect.signature(kind).parameters, *(name.removeprefix("its.") for name in given_on)})


def accepts(class_path: str, argument: str) -> bool:
    """Whether the class at that path takes the argument by name."""
    return argument in _arguments(_import(class_path))


def build(recipe: Any) -> Any:
    """The network of a recipe, with fresh weights.

    A recipe comes from a file, so it is not trusted: it can name subclasses of ``nn.Module``, members of an ``Enum``,
    types of tensors, and nothing else.

    Raises:
        UsageError: If it names something else, or something that cannot be imported or built.
    """
    if isinstance(recipe, list):
        return [build(part) for part in recipe]
    if not isinstance(recipe, dict):
        return recipe
    if KEY in recipe:
        return _argument(recipe)
    if "class_path" not in recipe:
        return {key: build(value) for key, value in recipe.items()}
    kind = _import(str(recipe["class_path"]))
    arguments = {**build(recipe.get("init_args") or {}), **build(recipe.get("dict_kwargs") or {})}
    try:
        return kind(**arguments)
    except Exception as error:
        raise UsageError(f"{recipe['class_path']}({arguments}) cannot be built: {error}") from error


def _argument(recipe: Recipe) -> Any:
    """What stands in a recipe for an argument that is no plain type."""
    kind, of = recipe[KEY], recipe.get("of")
    if kind == "tuple" and isinstance(of, list):
        return tuple(build(of))
    if kind == "dict" and isinstance(of, list):
        return dict(build(of))
    if kind == "path":
        return Path(str(of))
    if kind == "class":
        return _import(str(of))
    if kind == "enum" and (name := recipe.get("name")) in (members := _import(str(of), Enum).__members__):
        return members[name]
    if kind == "dtype" and isinstance(getattr(torch, str(of), None), torch.dtype):
        return getattr(torch, str(of))
    raise UsageError(
        f"an argument of the network was {of}, a {kind}, and none is made out of a checkpoint, which may be from "
        "someone else. Make it a subclass of torch.nn.Module or a member of an Enum"
    )


def _import(class_path: str, base: type = nn.Module) -> Any:
    try:
        found = pkgutil.resolve_name(class_path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot import {class_path!r}, a class of the saved network: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        what = "torch.nn.Module" if base is nn.Module else base.__name__
        raise UsageError(f"refused: {class_path!r} is no subclass of {what}; is the file from someone else?")
    return found


def read(path: str | Path) -> Any:
    """What is in a checkpoint: tensors and plain types, and no code.

    Raises:
        UsageError: If there is no such file, or it holds something else.
    """
    path = expand_path(path)
    if not Path(path).is_file():
        raise UsageError(f"no checkpoint at {path}: give the path of a .ckpt file that `lightning-kd fit` wrote")
    try:
        return read_checkpoint(path)
    except ValueError as error:
        raise UsageError(str(error)) from error


def teacher_mark(teacher: Teacher | None) -> str | None:
    """What tells a teacher that stands still from another; None, where there is none."""
    if isinstance(teacher, Frozen):
        teacher.context()  # which brings its weights into the type that they have in a training
    return fingerprint(teacher.still) if teacher is not None and teacher.still is not None else None
