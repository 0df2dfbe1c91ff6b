"""Labels that say what of a batch counts: a loss that is given what they are about must not overlook them."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Counts(NamedTuple):
    """What a label of booleans is about, and what to do where a loss does not take it.

    Attributes:
        what: Whatever is False in it.
        concerns: Tells of the label, the student's and the teacher's tensor whether it is about these two.
        remedy: How a term can honour it.
    """

    what: str
    concerns: Callable[[Tensor, Tensor, Tensor], bool]
    remedy: str


COUNTS = {
    "mask": Counts(
        "positions",
        lambda _, student, __: student.ndim == 4,
        "Around a loss of logits put losses.Pixelwise(...); for features take one that knows a mask, losses.FitNet() "
        "or losses.CWD() say.",
    ),
    "joints": Counts(
        "joints",
        lambda joints, student, teacher: student.ndim > 2 and joints.shape == student.shape[:2] == teacher.shape[:2],
        "Put losses.Jointwise(...) around it. Where dimension 1 is of channels, as many by chance as there are joints, "
        "give the loss a forward with joints=None.",
    ),
}
"""By name, the labels that are read wherever a batch has them, whether or not a loss asks."""
