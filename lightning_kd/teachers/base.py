"""What a teacher is."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_kd.schedules import Moment
from lightning_kd.taps import Record
from lightning_kd.teachers.stillness import remember_modes, set_training
from lightning_kd.wiring import describe


class Teacher(nn.Module, ABC):
    """Where the other side's knowledge comes from: bound to paths, it answers the student's calls.

    A teacher is called with exactly the arguments that the student was called with, and returns for each
    path it was bound to what was captured there. It is never a submodule of what is trained, so that it
    reaches no checkpoint, no optimizer and no gradient synchronisation. Only the three methods without a
    default have to be written; the others are for teachers that change while the student learns.
    """

    learner: nn.Module | None
    """What learns along with the student, by the same optimizer (a router, say); None for most teachers."""

    evaluated = False
    """Whether evaluation and checkpoints use its weights in place of the student's; then it has ``swap``."""

    same_call = False
    """Whether it answers with what the student itself computes in the call that is watched."""

    needs_end = False
    """Whether it must know how long the run is, as schedules must."""

    labels: Mapping[str, bool] = {}
    """What ``look`` and ``losses`` read of a batch, by name, and whether they cannot do without; see ``order``, too."""

    bound_to: frozenset[str] = frozenset()
    """The paths that it was asked for when it was attached last; a distiller says it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if callable(cls.memory) and cls.memory is not Teacher.memory and cls.recall is Teacher.recall:
            raise TypeError(
                f"{cls.__name__} says in memory what a checkpoint must hold of it, and has no recall(memory) that "
                "takes it back: a resumed run would begin anew, in silence. Write both."
            )

    def __init__(self) -> None:
        super().__init__()
        self.learner = None  # not on the class, where it would hide the submodule of this name

    @property
    def still(self) -> nn.Module | None:
        """The model that stands still, with whose layers a projector may work; None where there is none."""
        return None

    def root(self, student: nn.Module) -> nn.Module | None:
        """Returns the model in which terms name their paths, or None if it can tell only in ``bind``."""
        return None

    @abstractmethod
    def bind(self, student: nn.Module, paths: Collection[str]) -> None:
        """Prepares to answer for the given module paths.

        Args:
            student: The student, for teachers that are made from it.
            paths: Module paths in the teacher; ``"output"`` is what it returns.

        Raises:
            ValueError: If a path is unknown.
        """

    @abstractmethod
    def unbind(self) -> None:
        """Removes everything that ``bind`` left in the teacher's model."""

    def refresh(self) -> None:
        """Is told that layers of the student may have been replaced since it was bound, for who watches them."""

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Record:
        """Returns the captured outputs by path."""

    def after_call(self, output: Any) -> None:
        """Is told what the student returned to the call that it has answered; None, where that call failed."""

    def look(self, labels: Mapping[str, Any]) -> None:
        """Is shown what there is of the batch before it is called, if its ``labels`` name something."""

    def order(self, dataset: Any, batches: Any) -> Any:
        """Is asked in which order training samples come, if its ``labels`` name ``position``, where a sample is.

        Args:
            dataset: The training data.
            batches: The loader's batch sampler.

        Returns:
            The batch sampler to use.
        """
        return batches

    def losses(self, answers: Sequence[Record], labels: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns losses by which its ``learner`` learns, of what it answered to the calls of a step; they weigh 1."""
        return {}

    def begin(self) -> None:
        """Is told that training begins: the student's weights are there, from a checkpoint too."""

    def begin_epoch(self, moment: Moment) -> None:
        """Is told that an epoch begins."""

    def update(self, moment: Moment) -> None:
        """Is told that the optimizer has made a step, of the student it is bound to."""

    def memory(self) -> dict[str, Any]:
        """Returns what a checkpoint must hold of it to resume: nothing, unless it changes in the run."""
        return {}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Takes back what ``memory`` returned."""

    def swap(self) -> None:
        """Exchanges its weights with the student's, if it is ``evaluated``."""

    def end(self) -> None:
        """Is told that training has ended: gives the student its weights, if it is ``evaluated``."""

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights that checkpoints hold in place of the student's, if it is ``evaluated``."""
        return {}


def refuse_labels(teacher: Teacher) -> None:
    """Raises ``TypeError`` where the ``labels`` of a teacher are not names with whether it cannot do without."""
    labels: object = teacher.labels  # what an author without a type checker may write
    names = isinstance(labels, Mapping) and all(isinstance(name, str) for name in labels)
    if not (names and all(isinstance(needed, bool) for needed in labels.values())):  # type: ignore[attr-defined]
        raise TypeError(
            f"labels of {type(teacher).__name__} say what it reads of a batch, and whether it cannot do without: "
            f"{{'target': True}}; got {labels!r}."
        )


def refuse_answer(teacher: Teacher, answer: object) -> None:
    """Raises ``TypeError`` where a teacher has not answered with a list of values for each path."""
    if isinstance(answer, Mapping):
        wrong = [f"{describe(value)} at {path!r}" for path, value in answer.items() if not isinstance(value, list)]
        got = wrong[0] if wrong else None
    else:
        got = describe(answer)
    if got is not None:
        raise TypeError(
            f"forward of {type(teacher).__name__} returned {got}. A teacher returns by path a list of values, one for "
            "each call of the module: {'output': [logits]}."
        )


def values_at(teacher: Teacher, answer: Record, path: str) -> list[Any]:
    """Returns what a teacher answered for a path, one value for each call of the module.

    Raises:
        ValueError: If it was asked for that and has not answered it.
        RuntimeError: If another distiller has asked for something else since.
    """
    if path in answer:
        return answer[path]
    if path in teacher.bound_to:
        paths = ", ".join(map(repr, answer)) or "nothing"
        raise ValueError(
            f"{type(teacher).__name__} was asked for {path!r} and answered {paths}. A teacher answers the paths that "
            "bind is told; what a term selects inside of one, 'output.logits', is in its values: {'output': "
            "[{'logits': logits}]}."
        )
    raise RuntimeError(
        f"the teacher gave no {path!r}: another Distiller that was attached since has the same one. Give each a "
        "teachers.Frozen of its own, of one model."
    )


def in_type_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments with their floating-point tensors in the type of the model's weights, or in one given."""
    dtype = dtype or _type_of(model)

    def convert(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != dtype else x

    if dtype is not None:
        args, kwargs = tree_map(convert, (args, kwargs))
    return args, kwargs


@contextmanager
def own_type(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Lets a float32 model make its constants in float32, whatever default type the Trainer's precision has set.

    Args:
        model: The model.
        dtype: The type that was asked for, which some of its weights (BatchNorm's) may not have.
    """
    default = torch.get_default_dtype()
    if default == torch.float32 or (dtype or _type_of(model)) != torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def _type_of(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def labels_asked(make: Callable[..., Any] | None) -> dict[str, bool]:
    """Returns what a function that makes arguments asks for of a batch, and whether it cannot do without.

    That are its keyword-only parameters: ``def noisy(images, *, target)``.
    """
    if make is None:
        return {}
    try:
        parameters = inspect.signature(make.forward if isinstance(make, nn.Module) else make).parameters.values()
    except ValueError:  # a function of torch that is not written in Python
        return {}
    return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}


@contextmanager
def _standing(network: nn.Module) -> Iterator[None]:
    """Calls a network in evaluation mode, and puts its modes back."""
    if not any(getattr(part, "training", False) for part in network.modules()):
        yield
        return
    restore = remember_modes(network.modules())
    set_training(network, False)
    try:
        yield
    finally:
        restore()


def made_by(
    make: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    labels: Mapping[str, Any] | None = None,
    learns: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments that a function makes out of others: a tensor, a tuple of positional ones or a dict.

    A network that makes them is called as a teacher is, in evaluation mode and in the type of its weights.

    Args:
        make: The function; without one the arguments are those that were given.
        args: The positional arguments that it is given.
        kwargs: The keyword arguments that it is given.
        labels: What there is of the batch, by name, of which it is given what it asks for.
        learns: Whether it is one that learns with the student.

    Raises:
        ValueError: If it asks for a label that the batch has not.
    """
    if make is None:
        return args, kwargs
    asked = {}
    for name, required in labels_asked(make).items():
        if labels and labels.get(name) is not None:
            asked[name] = labels[name]
        elif required and name not in kwargs:
            raise ValueError(
                f"{getattr(make, '__name__', type(make).__name__)}, which makes a model's arguments, asks for {name!r} "
                "(a keyword-only parameter is a label of the batch), and there is none. Say how to get it, with "
                "target= or labels= of the callback, or labels() of the task; teachers.Frozen(input=...) gets none."
            )
    if isinstance(make, nn.Module) and not learns and next(make.parameters(), None) is not None:
        args, kwargs = in_type_of(make, args, kwargs)
        with own_type(make), _standing(make):
            made = make(*args, **kwargs, **asked)
    else:
        made = make(*args, **kwargs, **asked)
    if isinstance(made, dict):
        return (), made
    return (made if isinstance(made, tuple) else (made,)), {}
