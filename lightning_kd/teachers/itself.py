"""Itself: the student's own layers teach other layers of it."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_kd.taps import Record, Taps
from lightning_kd.teachers.base import Teacher


class Itself(Teacher):
    """The student, in the same forward pass: what some of its layers say is knowledge for others (Zhang et al.).

    The teacher's side of a term is a path of the student, without its gradient. So a network's last layers teach its
    early exits::

        loss = task + sum_i KD(exit_i, output) + sum_i FitNet(layer_i, deepest layer)

    and a decoder learns to restore what its frozen encoder saw (reverse distillation; Deng and Li). Nothing runs a
    second time: it costs the terms alone.

    Source:
        Zhang et al., Be Your Own Teacher, arXiv 1905.08094, eqs. 2 to 5; Deng and Li, Anomaly Detection via Reverse
        Distillation from One-Class Embedding, arXiv 2201.10703.

    Example:
        >>> import torch
        >>> from lightning_kd import Distiller, Term, losses
        >>> student = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
        >>> distiller = Distiller({"deep": Term(losses.KD(), student="0", teacher="output")}, Itself())
        >>> distiller.attach(student)
        >>> with distiller.watch() as calls:
        ...     _ = student(torch.randn(8, 4))
        >>> distiller(calls)["deep"].backward()
        >>> student[1].weight.grad is None  # the output teaches, and does not learn of it
        True
        >>> distiller.detach()
    """

    same_call = True

    def __init__(self) -> None:
        super().__init__()
        self._taps: Taps | None = None
        self._answer: Record = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_taps": None, "_answer": {}}

    def root(self, student: nn.Module) -> nn.Module:
        """Returns the student."""
        return student

    def bind(self, student: nn.Module, paths: Collection[str]) -> None:
        """Prepares to answer for the given module paths; see ``Teacher.bind``.

        Raises:
            ValueError: If a path is unknown.
        """
        self.unbind()
        self._taps = Taps(student, paths, "the student, which is its own teacher,")
        self._taps.attach()

    def refresh(self) -> None:
        """Watches layers that were replaced where they are now."""
        if self._taps is not None:
            self._taps.refresh()

    def unbind(self) -> None:
        """Removes the hooks from the student."""
        if self._taps is not None:
            self._taps.detach()
            self._taps = None
        self._answer = {}

    def forward(self, *args: Any, **kwargs: Any) -> Record:
        """Returns the record that the student's call fills."""
        if self._taps is None:
            raise RuntimeError("The teacher is not bound: call bind(student, paths) first.")
        self._answer = self._taps.open()
        return self._answer

    def after_call(self, output: Any) -> None:
        """Completes the record, and cuts it off from the student's gradient."""
        assert self._taps is not None
        self._taps.close(output)
        self._taps.check()
        for values in self._answer.values():
            values[:] = [tree_map(_detached, value) for value in values]
        self._answer = {}


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x
