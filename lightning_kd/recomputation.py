"""The random numbers of a student that is computed again in backward: those behind its teacher's."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import get_device_states, set_device_states

_MOST = 256
"""Calls that wait for their backward; a step has one, or a few."""


class Recomputation:
    """Lets ``torch.utils.checkpoint`` around a whole student draw the student's random numbers again.

    It puts back the numbers with which the student's call began. The teacher's side drew from them first, in a
    ``teacher_input`` that adds noise, or in dropout, and does not run again: so the student would get the teacher's.
    """

    def __init__(self) -> None:
        self._behind: dict[bytes, _State] = {}

    def begin(self, inputs: Any) -> "_State | None":
        """Is told that the teacher's side will run; returns where random numbers are, if that may come again."""
        # Of checkpoint's hooks on what is saved for backward, or of others: 0.2 us where there are none.
        return None if torch._C._autograd._top_saved_tensors_default_hooks(False) is None else _State(inputs)

    def end(self, before: "_State | None", inputs: Any) -> None:
        """Is told that it ran; remembers where random numbers are now."""
        if before is not None and (now := _State(inputs)).key != before.key:
            self._behind[before.key] = now
            if len(self._behind) > _MOST:
                del self._behind[next(iter(self._behind))]

    def again(self, inputs: Any) -> None:
        """Goes to where the random numbers were behind the teacher's, in a call that is computed again."""
        if self._behind and (behind := self._behind.get(_State(inputs).key)) is not None:
            behind.restore()

    @staticmethod
    def now() -> bool:
        """Tells whether a backward computes what it did not keep."""
        return torch._C._current_graph_task_id() != -1


class _State:
    """Where the random numbers are, on the CPU and on the inputs' devices: what a checkpoint puts back."""

    def __init__(self, inputs: Any) -> None:
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(inputs)
        self.key = b"".join(state.numpy().tobytes() for state in (self.cpu, *self.states))
        tensors = (x for x in tree_leaves(inputs) if isinstance(x, Tensor))
        self._type = next((x.device.type for x in tensors if x.device.type not in ("cpu", "meta")), None)

    def restore(self) -> None:
        """Goes back to there."""
        torch.set_rng_state(self.cpu)
        if self._type is not None:
            set_device_states(self.devices, self.states, device_type=self._type)
