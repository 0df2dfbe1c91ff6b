"""Stops a run whose terms are no longer numbers, without waiting for the device in any step."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_kd.losses._numerics import upcast


class FiniteCheck:
    """Raises when a term's loss is not finite, with its name, the step and the range of its inputs.

    On the CPU the step itself fails. On a GPU the numbers travel to the host while the device works on, and
    the error comes a step or two later, when they have arrived; it still names the step where it happened.
    """

    def __init__(self) -> None:
        self._arriving: list[tuple[torch.Event, Tensor, int, list[str]]] = []

    def __getstate__(self) -> dict[str, object]:
        return {"_arriving": []}

    def __call__(self, step: int, losses: Mapping[str, Tensor], ranges: Callable[[str], Tensor]) -> None:
        """Checks the losses of a step.

        Args:
            step: The number of the optimizer step.
            losses: The terms' losses by name.
            ranges: Gives (lowest and highest of the student, lowest and highest of the teacher) of a term's inputs.

        Raises:
            FloatingPointError: If a term of this step, or of an earlier one that was on its way, is not finite.
        """
        values = torch.stack([upcast(loss.detach()) for loss in losses.values()])
        if values.device.type != "cuda":
            if not bool(values.isfinite().all()):
                self._raise(step, list(losses), torch.stack([values, *_columns(losses, ranges, values)]).T)
            return
        table = torch.stack([values, *_columns(losses, ranges, values)]).T
        host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
        host.copy_(table, non_blocking=True)
        event = torch.Event(values.device)
        event.record()
        self._arriving.append((event, host, step, list(losses)))
        while self._arriving and self._arriving[0][0].query():
            self._read()

    def finish(self) -> None:
        """Checks what was still on its way."""
        while self._arriving:
            self._arriving[0][0].synchronize()
            self._read()

    def _read(self) -> None:
        _, host, step, names = self._arriving.pop(0)
        if not bool(host[:, 0].isfinite().all()):
            self._arriving.clear()
            self._raise(step, names, host)

    @staticmethod
    def _raise(step: int, names: list[str], table: Tensor) -> None:
        said = [
            f"{name!r} is {loss:g} (student in [{low:.4g}, {high:.4g}], teacher in [{lowest:.4g}, {highest:.4g}])"
            for name, (loss, low, high, lowest, highest) in zip(names, table.tolist(), strict=True)
            if not math.isfinite(loss)
        ]
        raise FloatingPointError(
            f"Step {step}: the distillation term {' and '.join(said)}. If the student's range is wide or not a number, "
            "its training diverged: lower the learning rate or the term's weight, or clip gradients. If the teacher's "
            "is, look at its weights and at how its inputs are normalised."
        )


def _columns(losses: Mapping[str, Tensor], ranges: Callable[[str], Tensor], like: Tensor) -> Tensor:
    return torch.stack([ranges(name).to(like) for name in losses]).T
