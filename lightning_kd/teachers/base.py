"""What a teacher is."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_kd.schedules import Moment
from lightning_kd.taps import Record


class Teacher(nn.Module):
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

    needs_end = False
    """Whether it must know how long the run is, as schedules must."""

    labels: Mapping[str, bool] = {}
    """What ``losses`` reads of a batch, by name, and whether it cannot do without."""

    def __init__(self) -> None:
        super().__init__()
        self.learner = None  # not on the class, where it would hide the submodule of this name

    def root(self, student: nn.Module) -> nn.Module | None:
        """Returns the model in which terms name their paths, or None if it can tell only in ``bind``."""
        return None

    def bind(self, student: nn.Module, paths: Collection[str]) -> None:
        """Prepares to answer for the given module paths.

        Args:
            student: The student, for teachers that are made from it.
            paths: Module paths in the teacher; ``"output"`` is what it returns.

        Raises:
            ValueError: If a path is unknown.
        """
        raise NotImplementedError

    def unbind(self) -> None:
        """Removes everything that ``bind`` left in the teacher's model."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Record:
        """Returns the captured outputs by path."""
        raise NotImplementedError

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


def in_type_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments with their floating-point tensors in the type of the model's weights."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def convert(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != dtype else x

    if dtype is not None:
        args, kwargs = tree_map(convert, (args, kwargs))
    return args, kwargs


def made_by(
    make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments that a function makes out of others: a tensor, a tuple of positional ones or a dict."""
    made = make(*args, **kwargs)
    if isinstance(made, dict):
        return (), made
    return (made if isinstance(made, tuple) else (made,)), {}
