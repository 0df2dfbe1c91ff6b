"""What counts as a number that a user gave: no text, no truth value, and nothing that a device has to be asked for."""

import math
from numbers import Integral, Real
from typing import TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Tells whether something is a finite number; neither a bool nor a tensor, on which it would wait, is one.

    Example:
        >>> is_number(2), is_number("2"), is_number(float("nan")), is_number(True)
        (True, False, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> TypeGuard[int]:
    """Tells whether something is a whole number, written as one.

    Example:
        >>> is_whole(2), is_whole(2.0), is_whole("2")
        (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)
