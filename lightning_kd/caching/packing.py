"""Packing: a teacher's answer as plain tensors with a row per sample, made smaller, and back."""

import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_kd.losses._numerics import upcast
from lightning_kd.wiring import describe

STORAGES = "'float16', 'bfloat16', 'float32', or 'top20' for logits"

Form = Any
"""How an answer is put together, as JSON: a tensor's name, None, or the kind of a container with its items."""


def take_apart(value: Any, name: str, found: dict[str, Tensor]) -> Form:
    """Returns the form of what a module returned, and puts its tensors into ``found`` by name.

    Raises:
        ValueError: If something in it is neither a tensor nor a container of them.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        found[name] = value
        return name
    if isinstance(value, Mapping) or (is_dataclass(value) and not isinstance(value, type)):
        items = value.items() if isinstance(value, Mapping) else vars(value).items()
        if all(isinstance(key, (str, int)) for key, _ in items):
            return {"dict": [[key, take_apart(item, f"{name}.{key}", found)] for key, item in items]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [take_apart(item, f"{name}.{i}", found) for i, item in enumerate(value)]}
    raise ValueError(
        f"the teacher's {name!r} is {describe(value)}, and a cache keeps tensors, and lists, tuples and dicts of them. "
        "Tap a module that returns these."
    )


def put_together(form: Form, tensors: Callable[[str], Tensor]) -> Any:
    """Returns what has that form, with the tensors that are given by name; what was a dataclass is a dict."""
    if form is None:
        return None
    if isinstance(form, str):
        return tensors(form)
    ((kind, items),) = form.items()
    if kind == "dict":
        return {key: put_together(item, tensors) for key, item in items}
    made = [put_together(item, tensors) for item in items]
    return tuple(made) if kind == "tuple" else made


def checked_storage(storage: object) -> str:
    """Returns the name of a storage.

    Raises:
        ValueError: If there is none of that name.
    """
    if isinstance(storage, str) and re.fullmatch(r"float16|bfloat16|float32|top[1-9]\d*", storage):
        return storage
    raise ValueError(f"storage is {STORAGES}; got {storage!r}.")


def pack(tensor: Tensor, storage: str, name: str) -> dict[str, Tensor]:
    r"""Returns what is stored of a tensor, by suffix of its name; what is no floating-point tensor stays as it is.

    ``"float16"`` and its like round. ``"top20"`` keeps of logits z over C classes the 20 largest log-probabilities and
    their classes, and the mean of the others::

        l_c = log softmax(z)_c,    tail = log (sum_{c not in top} softmax(z)_c / (C - 20))

    Args:
        tensor: ``(B, ...)``; logits ``(B, C, ...)``.
        storage: One of those names.
        name: What the tensor is called in error messages.

    Raises:
        ValueError: If it cannot be stored so.

    Source:
        To keep the k largest and spread the rest evenly: Shen and Xing, arXiv 2112.01528 ("marginal smoothing with
        top-K").

    Example:
        >>> {suffix: stored.dtype for suffix, stored in pack(torch.randn(2, 100), "top5", "output").items()}
        {'.top': torch.float16, '.class': torch.int16, '.tail': torch.float32}
    """
    if not tensor.is_floating_point():
        return {"": tensor}
    if not storage.startswith("top"):
        stored = tensor.to(getattr(torch, storage))
        if storage == "float16" and bool((stored.isinf() & tensor.isfinite()).any()):
            raise ValueError(
                f"the teacher's {name!r} has values up to {float(tensor.abs().max()):.4g}, which float16 cannot hold "
                f"(65504 at most). Store it with more range: storage={{{name!r}: 'float32'}}, or 'bfloat16'."
            )
        return {"": stored}
    k = int(storage.removeprefix("top"))
    if tensor.ndim < 2 or tensor.shape[1] <= k:
        raise ValueError(
            f"storage={storage!r} keeps {k} of the classes in dimension 1, and the teacher's {name!r} is "
            f"{tuple(tensor.shape)}. Keep fewer, or store it as 'float16'."
        )
    log_p = upcast(tensor).log_softmax(1)
    top, classes = log_p.topk(k, dim=1)
    rest = log_p.scatter(1, classes, -torch.inf).logsumexp(1, keepdim=True)
    tail = rest - torch.tensor(float(tensor.shape[1] - k), device=rest.device).log()
    # What underflows in float32 is as good as impossible: a finite floor keeps every loss finite.
    smallest = torch.finfo(torch.float16).min
    few = tensor.shape[1] <= torch.iinfo(torch.int16).max
    return {
        ".top": top.clamp(min=smallest).half(),
        ".class": classes.to(torch.int16 if few else torch.int32),
        ".tail": tail.clamp(min=smallest).float(),
    }


def unpack(parts: Mapping[str, Tensor], storage: str, spec: Mapping[str, Any]) -> Tensor:
    """Returns the tensor of what was stored of it: of top-k, log-probabilities.

    Args:
        parts: What ``pack`` returned, or rows of it.
        storage: How it was stored.
        spec: Its ``shape`` without the batch, and its ``dtype``, by name.
    """
    dtype: torch.dtype = getattr(torch, spec["dtype"])
    if ".top" not in parts:
        return parts[""].to(dtype)
    top = parts[".top"].float()
    shape = (len(top), *spec["shape"])
    return parts[".tail"].expand(shape).scatter(1, parts[".class"].long(), top).to(dtype)
