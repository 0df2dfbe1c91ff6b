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
        self._own_failed: Tensor | None = None
        """Whether the module's own loss was not finite in an earlier step."""

    def __getstate__(self) -> dict[str, object]:
        return {"_arriving": [], "_own_failed": None}

    def __call__(
        self, step: int, losses: Mapping[str, Tensor], ranges: Callable[[str], Tensor], own: Tensor | None = None
    ) -> None:
        """Checks the losses of a step.

        Args:
            step: The number of the optimizer step.
            losses: The terms' losses by name.
            ranges: Gives (lowest and highest of the student, lowest and highest of the teacher) of a term's inputs.
            own: The module's own loss, which spoils the student, and so later every term, when it is not finite.

        Raises:
            FloatingPointError: If a term of this step, or of an earlier one that was on its way, is not finite.
        """
        values = torch.stack([upcast(loss.detach()) for loss in losses.values()])
        if values.device.type != "cuda":
            if not bool(values.isfinite().all()):
                self._raise(step, list(losses), self._table(values, losses, ranges))
            self._remember(own)
            return
        table = self._table(values, losses, ranges)
        self._remember(own)
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

    def _remember(self, own: Tensor | None) -> None:
        if own is not None:
            failed = ~own.detach().isfinite().all()
            self._own_failed = failed if self._own_failed is None else self._own_failed | failed

    def _table(self, values: Tensor, losses: Mapping[str, Tensor], ranges: Callable[[str], Tensor]) -> Tensor:
        """Returns of every term its loss, its inputs' four bounds, and whether the own loss had failed before."""
        failed = torch.zeros_like(values) if self._own_failed is None else self._own_failed.to(values).expand_as(values)
        return torch.cat(
            [values[:, None], torch.stack([ranges(name).to(values) for name in losses]), failed[:, None]], 1
        )

    @staticmethod
    def _raise(step: int, names: list[str], table: Tensor) -> None:
        said = [
            f"{name!r} is {loss:g} (student in [{low:.4g}, {high:.4g}], teacher in [{lowest:.4g}, {highest:.4g}])"
            for name, (loss, low, high, lowest, highest, _) in zip(names, table.tolist(), strict=True)
            if not math.isfinite(loss)
        ]
        if bool(table[:, 5].any()):
            raise FloatingPointError(
                f"Step {step}: the distillation term {' and '.join(said)}, after the module's own loss was not "
                "finite in an earlier step, and so spoiled the student (0 times nan is nan, too). Look at what "
                "training_step returns."
            )
        if bool((table[:, 3] == -math.inf).any()):
            raise FloatingPointError(
                f"Step {step}: the distillation term {' and '.join(said)}. The teacher says -inf, of a class that is "
                "masked, maybe, and a difference of two such is no number. Mask with a finite one on both sides: "
                "logits.masked_fill(mask, -1e4)."
            )
        raise FloatingPointError(
            f"Step {step}: the distillation term {' and '.join(said)}. If the student's range is wide or not a number, "
            "its training diverged: lower the learning rate or the term's weight, or clip gradients. If the teacher's "
            "is, look at its weights and at how its inputs are normalised."
        )
