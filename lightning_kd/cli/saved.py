"""What a checkpoint of ``lightning-kd fit`` becomes: a network with its weights, and what it is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_kd.cli.errors import UsageError
from lightning_kd.cli.inputs import Inputs, dtype_name, random_inputs
from lightning_kd.cli.recipe import FROZEN, KEY, UNLIKE, Recipe, build, read, teacher_mark
from lightning_kd.meeting import introduce
from lightning_kd.paths import expand_path
from lightning_kd.task import TaskAdapter
from lightning_kd.teachers import Frozen, Teacher
from lightning_kd.teachers.weights import part_of, peers_in


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
        if isinstance(content, dict) and KEY not in content and Path(expand_path(f"{path}.json")).is_file():
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
            self.inputs: Inputs = [(list(map(int, shape)), dtype_name(name)) for shape, name in content[KEY]["inputs"]]
            self.state: Mapping[str, Any] = part_of(states[peer]["state_dict"], "student.")
            class_path = self.recipe["class_path"]
            self.deployed: dict[str, Any] = {} if peer else dict(content[KEY].get("deployed") or {})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{path} is damaged: what it says of its network cannot be read ({error!r})") from error
        if UNLIKE in self.recipe:
            raise UsageError(
                f"{path}: the network cannot be made again: {self.recipe[UNLIKE]}. Load the weights by your own code: "
                "teachers.load_weights(network, file)"
            )
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
        self.largest_batch: int | None = None

    def fresh(self) -> nn.Module:
        """The same network once more, without the weights that were learned."""
        return self._deploy(build(self.recipe))

    def _deploy(self, student: nn.Module) -> nn.Module:
        """What the task makes of the student, and of its teacher."""
        if not self.deployed:
            return student.eval()
        makes: Any = self.deployed.get("teacher_input")
        if isinstance(makes, dict) and KEY in makes:
            raise UsageError(
                f"the teacher is called by a function, teacher_input={makes['of']}, and out of a checkpoint only "
                "networks are made: export task.deployed(student) by your own code, or make it a torch.nn.Module"
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
