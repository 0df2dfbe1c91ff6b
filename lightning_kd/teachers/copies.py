"""Teachers that are copies of the student: how they are made, asked, saved and put in its place."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_kd.copying import own_copy
from lightning_kd.schedules import Moment
from lightning_kd.sharding import is_sharded, local, reshard, sharded_as, whole
from lightning_kd.taps import Record, Taps
from lightning_kd.teachers.base import Teacher, in_type_of, own_type
from lightning_kd.teachers.precision import Precision, checked, context, type_of_weights


class CopyTeacher(Teacher):
    """A copy of the student teaches it; subclasses say how the copy follows the student.

    The copy is made when the teacher is bound. It is kept in float32 where the student's weights are half precision,
    in which small changes would be lost, and is in eval mode.

    Args:
        count: Number of copies; epoch ``e`` is taught by copy ``e % count``.
        evaluate: Whether validation during the fit and checkpoints use the weights of the copy, and the student
            has them when the fit ends.
        precision: What the copy runs in, whatever the Trainer's precision: ``"bf16-mixed"`` (or ``"bf16"``) and
            ``"16-mixed"`` are autocast, ``"32-true"`` is none. Unless given: the Trainer's autocast.

    Raises:
        ValueError: If there is no such precision, or it would change the copy's weights.
    """

    def __init__(self, count: int = 1, evaluate: bool = False, precision: Precision | None = None) -> None:
        super().__init__()
        if type_of_weights(checked(precision)) not in (None, torch.float32):
            raise ValueError(
                f"A copy of the student keeps its weights in float32, in which small steps count; got {precision!r}. "
                f"Let it compute in less: precision='{str(precision).replace('true', 'mixed')}'."
            )
        self.precision = precision
        self.copies = nn.ModuleList()
        self.count = count
        self.evaluated = evaluate
        self.active = 0
        self._student: list[nn.Module] = []  # in a list, so that it is not a submodule
        self._taps: list[Taps] = []
        self._recalled = False
        self._lent: list[Tensor] = []  # while the student has the copy's weights: these, as precise as they are
        self._swapped = False
        self._ended = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_taps": [], "_student": [], "_swapped": False, "_lent": []}

    @property
    def model(self) -> nn.Module:
        """The copy that teaches now.

        Raises:
            RuntimeError: If there is none: it is made when a fit begins.
        """
        if not self.copies:
            raise RuntimeError(f"{type(self).__name__} has no copy of a student yet: it is made when a fit begins.")
        return self.copies[self.active]

    @property
    def student(self) -> nn.Module:
        """The student that is followed."""
        if not self._student:
            raise RuntimeError("The teacher is not bound: call bind(student, paths) first.")
        return self._student[0]

    def root(self, student: nn.Module) -> nn.Module:
        """Returns the student: the copy's paths are the same."""
        return student

    def bind(self, student: nn.Module, paths: Collection[str]) -> None:
        """Makes the copies, and prepares to answer for the given module paths."""
        self.unbind()
        self._student = [student]
        self.copies = nn.ModuleList(_copy(student) for _ in range(self.count))
        self.active = 0
        self._ended = False
        for model in self.copies:
            # A sharded model has to return, or its layers would not be sharded again.
            stop_early = self._may_stop_early() and not is_sharded(model)
            taps = Taps(model, paths, "the teacher, a copy of the student,", stop_early=stop_early)
            taps.attach()
            self._taps.append(taps)

    def _may_stop_early(self) -> bool:
        return True

    def unbind(self) -> None:
        """Removes the hooks, and gives the student its own weights back if it had lent its place."""
        if self._swapped:
            self.swap()
        for taps in self._taps:
            taps.detach()
        self._taps = []  # the student stays known: a checkpoint may be saved after this

    def forward(self, *args: Any, **kwargs: Any) -> Record:
        """Runs the copy that teaches now, without gradient."""
        if not self._taps:
            raise RuntimeError("The teacher is not bound: call bind(student, paths) first.")
        self._set_mode()
        args, kwargs = in_type_of(self.model, args, kwargs)
        with torch.no_grad(), context(self.precision, self.model), own_type(self.model):
            return self._taps[self.active].run(*args, **kwargs)

    def _set_mode(self) -> None:
        self.model.eval()

    def begin(self) -> None:
        """Starts from the student as it is now, unless a checkpoint gave the copies back."""
        if not self._recalled:
            self.copy_student()
        self._recalled = False

    def copy_student(self) -> None:
        """Makes every copy the student of now."""
        for model in self.copies:
            copy_tensors(_state(model), _state(self.student))
            from_first_process(list(model.buffers()))

    def begin_epoch(self, moment: Moment) -> None:
        """Gives the turn to the next copy."""
        self.active = moment.epoch % self.count

    def memory(self) -> dict[str, Any]:
        """Returns the copies' weights, whose turn it is, and the student's own where checkpoints hold the copy's."""
        if not self.copies:
            return {}
        memory: dict[str, Any] = {"copies": whole(self.copies.state_dict()), "active": self.active}
        if self.evaluated and self._student:
            memory["student"] = whole(self.student.state_dict())
        if self._swapped:  # saved within a validation
            held = {f"{self.active}.{key}": value for key, value in memory["student"].items()}
            memory["student"] = {key.partition(".")[2]: memory["copies"][key] for key in held}
            memory["copies"].update(held)
        return memory

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Takes that back."""
        _load(self.copies, memory["copies"])
        self.active = memory["active"]
        if "student" in memory:
            _load(self.student, memory["student"])
        self._recalled = True

    def end(self) -> None:
        """Leaves the student the copy's weights and buffers, if these were evaluated."""
        if self.evaluated:
            copy_tensors(_state(self.student), _state(self.model))
            self._ended = True

    def swap(self) -> None:
        """Exchanges the weights and buffers of student and copy, if the copy is evaluated."""
        if not self.evaluated:
            return
        own, students = _state(self.model), _state(self.student)
        if self._swapped:
            copy_tensors(students, own)
            copy_tensors(own, self._lent)
            self._lent = []
        else:
            self._lent = [x.clone() for x in own]
            copy_tensors(own, students)
            copy_tensors(students, self._lent)
        self._swapped = not self._swapped

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights of the copy in the student's types, if they are evaluated."""
        if not self.evaluated or not self._student or self._ended or self._swapped:  # the student has them itself
            return {}
        types = {key: value.dtype for key, value in self.student.state_dict().items()}
        return {key: value.to(types[key]) for key, value in self.model.state_dict().items()}


def _copy(student: nn.Module) -> nn.Module:
    model = own_copy(student)
    # Not by tensor.data: of a shard that would not be what its layer gathers.
    model._apply(_widen)  # type: ignore[no-untyped-call]  # torch's own gap
    return model.requires_grad_(False).eval()


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _load(model: nn.Module, state: Mapping[str, Any]) -> None:
    model.load_state_dict(sharded_as(state, model.state_dict()))


def _state(model: nn.Module) -> list[Tensor]:
    return parameters_of(model) + list(model.buffers())


def parameters_of(model: nn.Module) -> list[Tensor]:
    """Returns a model's parameters; of a sharded one what this process holds of them, in the same memory."""
    reshard(model)  # a forward without backward may have left them whole
    return local(list(model.parameters()))


@torch.no_grad()
def copy_tensors(into: list[Tensor], values: list[Tensor]) -> None:
    """Copies values, whatever their types, in as few kernels as can be."""
    if into:
        torch._foreach_copy_(into, values)


def from_first_process(buffers: Collection[Tensor]) -> None:
    """Gives every process the buffers of the first, as DDP does with the student's."""
    if not (buffers and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for dtype in dict.fromkeys(b.dtype for b in buffers):
        group = [b for b in buffers if b.dtype == dtype]
        flat = torch.cat([b.flatten() for b in group])
        dist.broadcast(flat, src=0)
        parts = torch.split(flat, [b.numel() for b in group])
        copy_tensors(group, [x.view_as(b) for x, b in zip(parts, group, strict=True)])
