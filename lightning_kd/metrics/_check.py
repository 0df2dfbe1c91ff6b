"""What metrics refuse to measure."""

from torch import Tensor


def refuse_no_numbers(what: str, wrong: Tensor, of: int, kind: str = "images") -> None:
    """Refuses what some of ``of`` images have said; it waits for the device, so metrics ask at the end.

    Raises:
        ValueError: If there are any.
    """
    if count := int(wrong):
        raise ValueError(
            f"{what} of {count} of {of} {kind} have values that are not numbers: the network has diverged, or divides "
            "by zero. Nothing is measured of them."
        )
