"""What losses around losses share: the target is handed on, and the temperature is the wrapped loss's."""

import inspect
from typing import Literal

from torch import Tensor, nn

from lightning_kd.losses import _check


class Wrapped(nn.Module):
    """Holds a loss and calls it, with the labels if it takes them.

    Args:
        loss: The loss that is called.
        tempers: Whether the temperature of the loss is to be set in each call.

    Raises:
        TypeError: If the loss is not a module.
        ValueError: If its temperature is to be set and it has none, or if it follows the run and would not be told.
    """

    def __init__(self, loss: nn.Module, tempers: bool = False) -> None:
        super().__init__()
        _check.module(loss)
        if tempers and not hasattr(loss, "temperature"):
            raise ValueError(
                f"{type(self).__name__} sets the temperature of the loss that it wraps, and {type(loss).__name__} has "
                "none that could be set. Wrap a loss on logits, such as KD()."
            )
        if hasattr(loss, "at"):
            name = type(loss).__name__
            raise ValueError(f"{name} follows the run, so it is the outermost: {name}({type(self).__name__}(...)).")
        self.loss = loss
        # Behind the two sides, whatever these are called: torch's own are (input, target).
        parameters = dict(list(inspect.signature(loss.forward).parameters.items())[2:])
        parameter = parameters.get("target")
        self.takes_mask = "mask" in parameters
        self.takes_target = parameter is not None
        self.needs_target = parameter is not None and parameter.default is inspect.Parameter.empty
        self.align: Literal["none", "map", "size", "shape"] = getattr(loss, "align", "none")
        self.per_sample = bool(getattr(loss, "per_sample", False))

    def call(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        mask: Tensor | None = None,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """Return the wrapped loss, at a temperature that holds for this call alone if one is given."""
        if target is None and self.needs_target:
            raise ValueError(f"{type(self.loss).__name__} needs the labels as `target`, got None.")
        if mask is not None and not self.takes_mask and student.ndim != 2:
            outer, inner = type(self).__name__, type(self.loss).__name__
            remedy = f"{outer}(Pixelwise({inner}()))" if hasattr(self, "at") else f"Pixelwise({outer}({inner}()))"
            raise ValueError(
                f"{inner} takes no mask and would compare the pixels that do not count, too: use {remedy}, which "
                "leaves them out."
            )
        labels = {"target": target} if self.takes_target else {}
        if self.takes_mask:
            labels["mask"] = mask
        if temperature is None:
            loss: Tensor = self.loss(student, teacher, **labels)
            return loss
        before = self.loss.temperature
        self.loss.temperature = temperature
        try:
            loss = self.loss(student, teacher, **labels)
        finally:
            self.loss.temperature = before
        return loss

    def _temperature(self) -> float:
        return self.loss.temperature  # type: ignore[return-value]  # a plain attribute of the loss

    def _set_temperature(self, value: float) -> None:
        self.loss.temperature = value  # type: ignore[assignment]  # as above


temperature_of_the_loss = property(
    Wrapped._temperature,
    Wrapped._set_temperature,
    doc="The wrapped loss's temperature, so that a schedule reaches it through here.",
)
