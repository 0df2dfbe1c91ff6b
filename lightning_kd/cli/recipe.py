"""What a checkpoint needs besides weights to become a network again: its recipe, as plain Python types."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.caching.checks import fingerprint
from lightning_kd.cli.errors import UsageError
from lightning_kd.meeting import introduce
from lightning_kd.task import TaskAdapter
from lightning_kd.teachers import Frozen, Teacher
from lightning_kd.teachers.weights import peers_in, read_checkpoint

KEY = "lightning_kd"
FROZEN = "lightning_kd.teachers.Frozen"
_INITIAL_WEIGHTS = {
    "weights": None,
    "pretrained": False,
    "encoder_weights": None,
    "weights_backbone": None,
    "backbone_from": None,
}

Recipe = dict[str, Any]
Inputs = list[tuple[list[int], str]]
"""Of each input, its shape without the batch, and the name of its type; ``list[...]`` of images that detectors take."""


def plain(value: Any, initial: bool = False) -> Any:
    """Configuration values as plain types, without what only says where training started from, unless that is asked."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, dict):
        kept = {str(k): plain(v, initial) for k, v in value.items()}
        if "class_path" in kept and "init_args" in kept and not initial:
            kept["init_args"] = {k: _INITIAL_WEIGHTS.get(k, v) for k, v in kept["init_args"].items()}
        return kept
    if isinstance(value, list | tuple):
        return [plain(v, initial) for v in value]
    if isinstance(value, bool | int | float | str | None) and not isinstance(value, Enum):  # a StrEnum's are texts
        return value
    return _named(value)


def _named(value: Any) -> str | Recipe:
    """What says of an argument that is no plain type how it is found again."""
    if isinstance(value, os.PathLike):
        return str(value)
    if isinstance(value, Enum):
        return {KEY: "enum", "of": _import_path(type(value)), "name": value.name}
    if isinstance(value, type):
        return {KEY: "class", "of": _import_path(value)}
    if isinstance(value, torch.dtype):
        return {KEY: "dtype", "of": str(value).removeprefix("torch.")}
    of = f"{value.__module__}.{value.__qualname__}" if inspect.isroutine(value) else str(value)
    return {KEY: "function" if inspect.isroutine(value) else type(value).__name__, "of": of}


def _import_path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def not_made_again(recipe: Any) -> list[str]:
    """What of a network's arguments is not made out of a file: functions, and objects that are no networks."""
    if isinstance(recipe, dict):
        if recipe.get(KEY) not in (None, "enum", "class", "dtype"):
            return [f"{recipe['of']}, a {recipe[KEY]}"]
        recipe = list(recipe.values())
    return [each for part in recipe for each in not_made_again(part)] if isinstance(recipe, list) else []


def accepts(class_path: str, argument: str) -> bool:
    """Whether the class at that path takes the argument by name."""
    return argument in inspect.signature(_import(class_path)).parameters


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
    arguments = build(recipe.get("init_args", {}))
    try:
        return kind(**arguments)
    except Exception as error:
        raise UsageError(f"{recipe['class_path']}({arguments}) cannot be built: {error}") from error


def _argument(recipe: Recipe) -> Any:
    """What stands in a recipe for an argument that is no plain type."""
    kind, of = recipe[KEY], str(recipe.get("of"))
    if kind == "class":
        return _import(of)
    if kind == "enum" and (name := recipe.get("name")) in (members := _import(of, Enum).__members__):
        return members[name]
    if kind == "dtype" and isinstance(getattr(torch, of, None), torch.dtype):
        return getattr(torch, of)
    raise UsageError(
        f"an argument of the network was {of}, a {kind}, and none is made out of a checkpoint, which may be from "
        "someone else. Make it a subclass of torch.nn.Module or a member of an Enum; or load the weights by your own "
        "code: teachers.load_weights(network, file)"
    )


def _import(class_path: str, base: type = nn.Module) -> Any:
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
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


class Saved:
    """What runs in the end, of a checkpoint: the student, or what its task makes of it and of its teacher.

    Args:
        path: A checkpoint that ``lightning-kd fit`` wrote. Loaded with ``weights_only=True``.
        peer: Which of the networks that learned beside the student to take instead of it; 0 is the student.
        teacher: The teacher's checkpoint, where it is not any more where it was in the training.

    Raises:
        UsageError: If there is no such file or peer, it is not such a checkpoint, or the teacher is not there or is
            another one.
    """

    def __init__(self, path: str | Path, peer: int = 0, teacher: str | None = None) -> None:
        content = read(path)
        if isinstance(content, dict) and KEY not in content and Path(f"{path}.json").is_file():
            raise UsageError(
                f"{path} is a teacher's file, with the record of its training beside it, and export takes a student's: "
                "teachers.load_weights(network, file) loads this one into the plain network"
            )
        if not isinstance(content, dict) or KEY not in content or "state_dict" not in content:
            raise UsageError(f"{path} does not say which network it holds: give a .ckpt that `lightning-kd fit` wrote")
        try:
            recipes, states = (
                [content[KEY]["student"], *content[KEY].get("peers", [])],
                [content, *peers_in(content).values()],
            )
            if not 0 <= peer < min(len(recipes), len(states)):
                raise UsageError(f"--peer: {path} holds {len(states) - 1} peers of the student, received {peer}")
            self.recipe: Recipe = dict(recipes[peer])
            self.inputs: Inputs = [(list(map(int, shape)), _dtype_name(name)) for shape, name in content[KEY]["inputs"]]
            prefix = "student."
            self.state = {
                k.removeprefix(prefix): v for k, v in states[peer]["state_dict"].items() if k.startswith(prefix)
            }
            class_path = self.recipe["class_path"]
            self.deployed: dict[str, Any] = {} if peer else dict(content[KEY].get("deployed") or {})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{path} is damaged: what it says of its network cannot be read ({error!r})") from error
        if teacher is not None:
            self._teach(teacher)
        student: nn.Module = build(self.recipe)
        try:
            student.load_state_dict(self.state)
        except RuntimeError as error:
            raise UsageError(f"{path}: the weights do not fit {class_path}: {error}") from error
        self.model = self._deploy(student)
        if self.deployed:
            self.state = self.model.state_dict()
        self.any_size = False  # until it is shown for what was exported

    def fresh(self) -> nn.Module:
        """The same network once more, without the weights that were learned."""
        return self._deploy(build(self.recipe))

    def _deploy(self, student: nn.Module) -> nn.Module:
        """What the task makes of the student, and of its teacher."""
        if not self.deployed:
            return student.eval()
        makes: Any = self.deployed.get("teacher_input")
        if isinstance(makes, str) or not_made_again(makes):
            said = makes if isinstance(makes, str) else makes["of"]
            raise UsageError(
                f"the teacher is called by a function, teacher_input={said}, and out of a checkpoint only networks "
                "are made: export task.deployed(student) by your own code, or make it a torch.nn.Module"
            )
        task, teacher, makes = (build(self.deployed.get(part)) for part in ("task", "teacher", "teacher_input"))
        if not isinstance(task, TaskAdapter) or not isinstance(teacher, nn.Module):
            raise UsageError("the checkpoint is damaged: it names no task and teacher of what runs in the end")
        teacher = teacher if isinstance(teacher, Teacher) else Frozen(teacher)
        if teacher_mark(teacher) != self.deployed.get("fingerprint"):
            raise UsageError(
                "the teacher is not the one of the training: other weights. Give that one's checkpoint with --teacher"
            )
        introduce(task, student, teacher, makes or task.teacher_input)
        return task.deployed(student).eval().requires_grad_(False)

    def _teach(self, checkpoint: str) -> None:
        """Takes the teacher's weights from a file."""
        if (self.deployed.get("teacher") or {}).get("class_path") != FROZEN:
            raise UsageError(
                "--teacher: expected a run whose teacher is part of what is exported, a Frozen with a model (the "
                "difference of student and teacher); this one has none"
            )
        self.deployed["teacher"]["init_args"]["checkpoint"] = checkpoint

    @property
    def takes_lists(self) -> bool:
        """Whether the network takes lists of images, as detectors do."""
        return any(name.startswith("list[") for _, name in self.inputs)

    def example(self, batch: int, larger: bool = False) -> tuple[Any, ...]:
        """Random inputs of the shapes that the student was trained on; or with images larger than these."""
        if not self.inputs:
            raise UsageError(
                "the checkpoint does not hold the shapes of the student's inputs: it was called with something else "
                "than tensors, or with some that its forward does not name in order; --format state_dict needs none"
            )
        if not larger:
            return random_inputs(self.inputs, batch, self.model)
        # Steps that most networks take, and different ones, so that height and width are not taken for one number.
        grown = [([s[0], s[1] + 32, s[2] + 64] if len(s) == 3 else s, name) for s, name in self.inputs]
        return random_inputs(grown, batch, self.model)


def _dtype_name(name: str) -> str:
    if not isinstance(getattr(torch, _of_items(name)), torch.dtype):
        raise ValueError(f"{name!r} is no type of tensors")
    return name


def _of_items(name: str) -> str:
    return name.removeprefix("list[").removesuffix("]")


def inputs_of(network: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Inputs:
    """What a network was given: tensors or lists of them, in the order of its forward; empty, if it was something else.

    The targets that detectors take in training, a list of dicts, are no inputs, nor is what is as it is by default.

    Example:
        >>> inputs_of(nn.ReLU(), (torch.zeros(8, 3, 32, 32),), {})
        [([3, 32, 32], 'float32')]
        >>> inputs_of(nn.ReLU(), (), {"input": torch.zeros(8, 3)})
        [([3], 'float32')]
        >>> inputs_of(nn.ReLU(), ([torch.zeros(3, 60, 80), torch.zeros(3, 64, 64)], [{}, {}]), {})
        [([3, 60, 80], 'list[float32]')]
    """
    if named:
        signature = inspect.signature(network.forward)
        default = {name: each.default for name, each in signature.parameters.items()}
        bound = signature.bind(*arguments, **{k: v for k, v in named.items() if v is not default.get(k)})
        arguments = bound.args
        if bound.kwargs:
            return []
    found: Inputs = []
    for given in arguments:
        several = list(given) if isinstance(given, list | tuple) else []
        if isinstance(given, Tensor):
            found.append((list(given.shape[1:]), _name(given)))
        elif several and all(isinstance(each, Tensor) for each in several):
            found.append((list(several[0].shape), f"list[{_name(several[0])}]"))
        elif not (several and found and all(isinstance(each, dict) for each in several)):
            return []
    return found


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def random_inputs(inputs: Inputs, batch: int, model: nn.Module) -> tuple[Any, ...]:
    """Tensors of those shapes and types, the same in every call; images in a list are in [0, 1].

    Floating-point ones are of the type of the model's weights, whatever the precision in which it was trained.
    """
    generator = torch.Generator().manual_seed(0)
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    made: list[Any] = []
    for shape, name in inputs:
        dtype: torch.dtype = getattr(torch, _of_items(name))
        if dtype.is_floating_point and floating is not None:
            dtype = floating
        if name.startswith("list["):
            made.append(list(torch.rand(batch, *shape, generator=generator).to(dtype)))
            continue
        noise = torch.randn(batch, *shape, generator=generator)
        made.append(noise.to(dtype) if dtype.is_floating_point else noise.abs().to(dtype))
    return tuple(made)
