"""Renormalize: inputs that were normalised for one model, made those of another."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Renormalize(nn.Module):
    """Undoes one normalisation of the channels and applies another, in float32.

    ``x' = ((x * from_std + from_mean) - to_mean) / to_std``

    As ``Frozen(model, input=Renormalize(...))`` it is for one teacher, of an ensemble too; as ``teacher_input=`` of a
    door for all of them.

    Args:
        from_mean: Mean per channel that the student's inputs were normalised with, C numbers.
        from_std: Likewise the standard deviation.
        to_mean: Mean per channel that the teacher was trained with.
        to_std: Likewise the standard deviation.

    Returns:
        ``forward(x)`` with x (B, C, ...), returns the same shape.

    Raises:
        ValueError: If the four do not have the same length, a deviation is not positive, or x has other channels.

    Example:
        >>> to_teacher = Renormalize(from_mean=[0.5], from_std=[0.25], to_mean=[0.0], to_std=[1.0])
        >>> to_teacher(torch.tensor([[-2.0], [2.0]]))
        tensor([[0.],
                [1.]])
    """

    def __init__(
        self, from_mean: Sequence[float], from_std: Sequence[float], to_mean: Sequence[float], to_std: Sequence[float]
    ) -> None:
        super().__init__()
        given = (from_mean, from_std, to_mean, to_std)
        if len({len(numbers) for numbers in given}) > 1 or not all(std > 0 for std in (*from_std, *to_std)):
            raise ValueError(
                "Renormalize takes one number per channel four times, deviations above 0; got from_mean="
                f"{from_mean}, from_std={from_std}, to_mean={to_mean} and to_std={to_std}."
            )
        mean, std, own_mean, own_std = (torch.tensor(numbers, dtype=torch.float64) for numbers in given)
        self.register_buffer("scale", (std / own_std).float())
        self.register_buffer("shift", ((mean - own_mean) / own_std).float())

    scale: Tensor
    shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Returns the inputs as the teacher was trained on them."""
        if x.ndim < 2 or x.shape[1] != len(self.scale):
            raise ValueError(
                f"Renormalize has {len(self.scale)} channels and its input (B, C, ...) is {tuple(x.shape)}. Give mean "
                "and std of every channel; of several arguments pick the one that is meant: "
                "input=lambda x, mask: (renormalize(x), mask)."
            )
        shape = (-1, *[1] * (x.ndim - 2))
        return x * self.scale.view(shape) + self.shift.view(shape)
