"""What every loss asks of its inputs: shapes and dtypes only, so that no check waits for the device."""

import math

import torch
from torch import Tensor, nn

from lightning_kd.numbers import is_number, is_whole
from lightning_kd.wiring import describe


def module(loss: object) -> None:
    """Raise ``TypeError`` if what is given as a loss is a class, a function or a name."""
    if not isinstance(loss, nn.Module):
        hint = f" Did you mean {loss.__name__}()?" if isinstance(loss, type) else ""
        raise TypeError(f"loss is a module, loss(student, teacher) -> scalar; got {loss!r}.{hint}")


def positive(name: str, value: float) -> float:
    """Return ``value`` if it is a positive finite number, else raise ``ValueError``."""
    if not (is_number(value) and value > 0):
        hint = ""
        if name == "temperature" and callable(value):
            hint = " That of a term's loss follows a schedule by callbacks.TemperatureScheduler(term, schedule)."
        raise ValueError(f"{name} must be a positive finite number, got {value!r}.{hint}")
    return value


def whole(name: str, value: int) -> int:
    """Return ``value`` if it is a positive whole number, else raise ``ValueError``."""
    if not (is_whole(value) and value > 0):
        raise ValueError(f"{name} must be a positive whole number, got {value!r}.")
    return int(value)


def dimension(dim: int) -> int:
    """Return ``dim`` if it is the number of a dimension, else raise ``ValueError``."""
    if not is_whole(dim):
        raise ValueError(f"dim is the number of a dimension, 1 for (B, C, ...), -1 for (B, N, C); got {dim!r}.")
    return dim


def temperature(value: float | Tensor) -> None:
    """Raise ``ValueError`` if a number that divides logits is not positive; of a tensor it would be to wait for it."""
    if not isinstance(value, Tensor):
        positive("temperature", value)


def bounds(low: float, high: float) -> tuple[float, float]:
    """Return the bounds of a temperature, or raise ``ValueError``."""
    if not (is_number(low) and is_number(high) and 0 < low < high):
        raise ValueError(f"the bounds of a temperature are finite numbers, 0 < low < high; got {low!r} and {high!r}.")
    return low, high


def weights(**values: float) -> None:
    """Raise ``ValueError`` if the weights of a loss's parts are not finite, or negative, or all of several are 0."""
    if not all(is_number(value) and value >= 0 for value in values.values()):
        said = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise ValueError(f"the weights of a loss are finite numbers that are not negative, got {said}.")
    if len(values) > 1 and not any(values.values()):
        raise ValueError(f"{' and '.join(values)} are both 0: the term would be silently zero.")


def tensors(student: Tensor, teacher: Tensor) -> None:
    """Raise ``ValueError`` if one of the two holds no real numbers, or nothing at all."""
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(
            f"expected floating-point tensors, got student {student.dtype} and teacher {teacher.dtype}. Compare what a "
            "model computes before it decides (logits, not classes), and cast other numbers with .float()."
        )
    if not (student.numel() and teacher.numel()):
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must not be empty: a mean over nothing "
            "is not a number. Leave such batches out."
        )


def same_shape(student: Tensor, teacher: Tensor, remedy: str) -> None:
    """Raise ``ValueError`` with both shapes and the remedy if they differ, or if they are no :func:`tensors`."""
    tensors(student, teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same shape. {remedy}"
        )


def maps(student: Tensor, teacher: Tensor, channels: bool = True, at_least: int = 1, why: str = "") -> None:
    """Check a pair of maps (B, C, H, W) of one resolution, of so many positions and, if asked, the same channels."""
    if channels:
        same_shape(student, teacher, "Let the term's projector map the student's feature to the teacher's shape.")
    tensors(student, teacher)
    shapes = f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
    if student.ndim != 4 or teacher.ndim != 4 or student[:, 0].shape != teacher[:, 0].shape:
        raise ValueError(
            f"{shapes} must be maps (B, C, H, W) of the same batch and resolution. Let the term's projector align "
            "the size; lay tokens out as maps first, with projectors.TokensToMap."
        )
    positions(student, teacher, at_least, why)


def positions(student: Tensor, teacher: Tensor, at_least: int, why: str) -> None:
    """Raise ``ValueError`` if maps (B, C, ...) of one resolution have fewer positions."""
    if math.prod(student.shape[2:]) < at_least:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} have fewer than {at_least} positions: "
            f"{why} Tap a layer of a higher resolution, or compare vectors: x.flatten(1)."
        )


def direction(student: Tensor) -> None:
    """Raise ``ValueError`` if vectors (B, C) or maps (B, C, ...) have one channel: their direction has no gradient."""
    if student.shape[1] == 1:
        raise ValueError(
            f"the student's tensor is {tuple(student.shape)}, and directions are compared: that of one channel is its "
            "sign, from which nothing is learned. Compare its values: FitNet(), or for a logit KD(activation='sigmoid')"
            "."
        )


def embeddings(student: Tensor, teacher: Tensor) -> None:
    """Raise ``ValueError`` unless both are embeddings (B, D) of one length, whose direction can be learned."""
    same_shape(student, teacher, "Let the term's projector map the student's embedding to the teacher's length.")
    if student.ndim != 2:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be embeddings (B, D). Pool maps "
            "and tokens first, or tap the layer behind the pooling."
        )
    direction(student)


def logits(student: Tensor, teacher: Tensor, dim: int = 1, classes: int = 2, why: str = "") -> None:
    """Check a pair of logits: same shape, a class dimension ``dim``, and at least so many ``classes``."""
    same_shape(
        student,
        teacher,
        "Let both models tell the same classes apart, or give the term a projector that maps them. Where only the "
        "resolution differs, losses.Pixelwise(...) around the loss lets the term align it.",
    )
    if not (student.ndim >= 2 and -student.ndim <= dim < student.ndim):
        raise ValueError(
            f"expected logits (B, C) or (B, C, ...) with classes in dimension {dim}, got shape "
            f"{tuple(student.shape)}. A single logit per sample is (B, 1): use logits.unsqueeze(1)."
        )
    if student.shape[dim] < classes:
        raise ValueError(
            f"at least {classes} classes are needed in dimension {dim}, got {student.shape[dim]} in shape "
            f"{tuple(student.shape)}. {why or ONE_CLASS}"
        )


ONE_CLASS = (
    "A softmax over one class is always 1, so the term would be silently zero: "
    "use KD(activation='sigmoid') for binary and multi-label logits."
)
TWO_CLASSES = (
    "With two classes there is one non-target class, whose share of the non-target mass is always 1, so that "
    "part is undefined: use KD() for two classes, KD(activation='sigmoid') for binary and multi-label logits."
)


ONE_LABEL = (
    "KD needs no target: KD() for classes that exclude each other, mixed ones (mixup) too, KD(activation='sigmoid') "
    "for multi-hot ones. Of one-hot targets pass target.argmax(1)."
)

OTHER_SAMPLES = (
    "The student was called with other samples than these labels are of, two views or a part of a batch: pass the "
    "labels of what it is called with, target=lambda batch: torch.cat([batch[1], batch[1]])."
)


NOT_THE_LABELS = (
    "The logits are of so many classes: are there more in the data, or are these not the labels? target= says which "
    "part of the batch they are."
)
BY_MASK = f"{NOT_THE_LABELS} Leave other labels out by a mask: target != 255."
_IGNORED = (
    f"{NOT_THE_LABELS} Losses know no ignore_index: leave such samples out, and pixels of a map by a mask and "
    "losses.Pixelwise(...)."
)


def class_target(target: Tensor | None, logits: Tensor, bounded: bool = True, remedy: str = ONE_LABEL) -> Tensor:
    """Return the class indices as ``int64`` of the logits' shape without the class dimension 1, or raise.

    That the indices lie in ``[0, C)``, unless they are not ``bounded``, is checked on the CPU only: on an
    accelerator it would stall the step.
    """
    if target is None:
        raise ValueError("this loss needs the class indices as `target`, got None.")
    given: object = target  # what the batch has in that place
    if not isinstance(given, Tensor):
        raise ValueError(
            f"target must be a tensor of class indices, got {describe(given)}. Say where in the batch they are: "
            "target=lambda batch: batch[1]['labels'], or target(batch) of a task adapter."
        )
    if target.is_floating_point() or target.is_complex():
        raise ValueError(
            f"target must hold integer class indices, got {target.dtype} of shape {tuple(target.shape)}. {remedy}"
        )
    expected = (*logits.shape[:1], *logits.shape[2:])
    if tuple(target.shape) != expected:
        if target.ndim == len(expected) and len(target) != len(logits):
            remedy = OTHER_SAMPLES
        raise ValueError(
            f"target must have shape {expected}, one class index per sample and position of {tuple(logits.shape)}, "
            f"got {tuple(target.shape)}. {remedy}"
        )
    if bounded:
        in_range("target", target, logits.shape[1], _IGNORED)
    return target.long()


def in_range(name: str, index: Tensor, size: int, remedy: str) -> None:
    """Raise ``ValueError`` if an index on the CPU is not in ``[0, size)``; elsewhere asking would stall the step."""
    if index.device.type != "cpu" or not index.numel() or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name} must be in [0, {size}), got values from {low} to {high}. {remedy}")


def samples(student: Tensor, teacher: Tensor, at_least: int, why: str) -> None:
    """Check that both sides hold the same, large enough number of samples in dimension 0."""
    tensors(student, teacher)
    if student.ndim < 2 or teacher.ndim < 2 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be (B, ...) with the "
            "same batch size B. Capture both from the same forward."
        )
    if student.shape[0] < at_least:
        raise ValueError(
            f"at least {at_least} samples are needed, got {student.shape[0]}: {why} "
            "Use a larger batch, and drop_last=True for a rest batch."
        )
