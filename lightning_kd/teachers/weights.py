"""Weights from files: what a trained model left behind, loaded strictly and never run as code."""

import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lightning_kd.paths import expand_path
from lightning_kd.wiring import describe


def load_weights(model: nn.Module, checkpoint: str | os.PathLike[str], peer: int = 0) -> None:
    """Loads a checkpoint's weights into a model, strictly, whatever common prefix its keys have.

    Args:
        model: The model to fill.
        checkpoint: A file with a state dict, or a Lightning checkpoint; ``~`` and environment variables are filled in.
        peer: Of a checkpoint of mutual distillation, which of the student's peers to load, 1 for the first; 0 is the
            student itself.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If the checkpoint is not the name of a file.
        ValueError: If it cannot be read, holds no state dict or no such peer, or if keys or shapes do not fit.
    """
    given: object = checkpoint  # what a caller without a type checker may pass
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(
            f"a checkpoint is the name of a file, got a {type(given).__name__}. What is loaded already goes into the "
            "model: model.load_state_dict(...)."
        )
    content = read_checkpoint(checkpoint)
    if peer:
        content = peers_in(content).get(f"peer{peer}")
        if content is None:
            raise ValueError(
                f"{os.fspath(checkpoint)!r} holds no peer {peer}: it is not of mutual distillation with so many."
            )
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not _is_state(state):
        parts = content.items() if isinstance(content, Mapping) else ()
        inside = [key for key, part in parts if isinstance(part, Mapping) and part and _is_state(part)]
        remedy = "Give a file of torch.save(model.state_dict(), path), or a Lightning checkpoint."
        if inside:
            remedy = f"Save the one in it: torch.save(torch.load(path)[{inside[0]!r}], path)."
        raise ValueError(f"{os.fspath(checkpoint)!r} holds no state dict, but {describe(content)}. {remedy}")
    if not state:
        raise ValueError(f"{os.fspath(checkpoint)!r} holds no weights: its state dict is empty.")
    wanted = model.state_dict()
    first = next(iter(wanted), "")
    prefixes = sorted({key.removesuffix(first) for key in state if key == first or key.endswith("." + first)})
    # Strictly: within a prefix nothing may be missing or too much; beside it the file may hold what it likes.
    found = {prefix: part_of(state, prefix) for prefix in prefixes}
    fitting = [prefix for prefix, own in found.items() if not _misfits(wanted, own)]
    if len(fitting) > 1:
        raise ValueError(
            f"{os.fspath(checkpoint)!r} holds more than one set of weights for {type(model).__name__}, under "
            f"{', '.join(map(repr, fitting))}. Save the one that is meant: torch.save(model.state_dict(), path)."
        )
    if not fitting:
        closest = min(found.values(), key=lambda own: len(_misfits(wanted, own)), default=dict(state))
        misfits = _misfits(wanted, closest)
        raise ValueError(
            f"{os.fspath(checkpoint)!r} does not fit {type(model).__name__}: {'; '.join(misfits[:5])}"
            f"{f'; and {len(misfits) - 5} more' if len(misfits) > 5 else ''}. Its keys are "
            f"{', '.join(list(state)[:5])}, .... Is it the checkpoint of another architecture?"
        )
    own = found[fitting[0]]
    for key, value in wanted.items():
        if key.endswith(UNCOUNTED):
            own.setdefault(key, value)
    model.load_state_dict(own, strict=True)


def part_of(state: Mapping[str, Tensor], prefix: str) -> OrderedDict[str, Tensor]:
    """Returns what a state dict holds under a prefix, with the versions of its modules, where it tells them.

    Args:
        state: What ``state_dict()`` returned.
        prefix: Such as ``"student."``.
    """
    part = OrderedDict((key.removeprefix(prefix), value) for key, value in state.items() if key.startswith(prefix))
    versions: Mapping[str, Any] = getattr(state, "_metadata", {})
    module = prefix.removesuffix(".")
    part._metadata = OrderedDict(  # type: ignore[attr-defined]  # as torch's own
        (key.removeprefix(module).removeprefix("."), version)
        for key, version in versions.items()
        if key == module or key.startswith(prefix)
    )
    return part


UNCOUNTED = "num_batches_tracked"
"""What files from before torch 0.4.1 do not have, and others are made without; the model's own stays then."""

SAVED = (b"PK", b"\x80")
"""How files begin that ``torch.save`` wrote: zip archives, and pickles before torch 1.6."""


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Reads a checkpoint: tensors and plain types, and no code.

    Args:
        path: A file that ``torch.save`` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is cut short, no such file at all, or holds objects of classes.
    """
    path = expand_path(path)
    name = repr(path)
    if not os.path.isfile(path):
        remedy = (
            "It is a folder; give a file in it." if os.path.isdir(path) else "Train the model first, or give another."
        )
        if os.path.isfile(os.path.join(path, ".metadata")):
            remedy = (
                "It is a folder of sharded training, which is read by pickle. If you trust it, make a file of it: "
                "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(folder, file)."
            )
        raise FileNotFoundError(f"No checkpoint at {name} (looked from {os.getcwd()!r}). {remedy}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        with open(path, "rb") as file:
            saved = file.read(2).startswith(SAVED)
        # What torch says of others helps nobody; of a text, that it would be run as code.
        if not saved or not str(error).startswith("Weights only load failed"):
            size = os.path.getsize(path)
            raise ValueError(
                f"The checkpoint {name}, {size} bytes, is damaged, or is no file that torch.save wrote (a text, or a "
                "pointer to a large file that was not fetched?). Copy it again, or give another."
            ) from error
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"an object of {found[1]}" if found else "Python objects"
        raise ValueError(
            f"The checkpoint {name} holds {what}, and is loaded as plain tensors (weights_only=True): what comes in a "
            "file is not run as code. If you trust it, load it yourself, LitTeacher.load_from_checkpoint(...) for one, "
            "and save the network's state_dict."
        ) from error


def peers_in(checkpoint: Any) -> Mapping[str, Mapping[str, Any]]:
    """Returns what a checkpoint holds of a student's peers, by their names: ``{"peer1": {"state_dict": ...}}``."""
    callbacks = checkpoint.get("callbacks", {}) if isinstance(checkpoint, Mapping) else {}
    return next((state["peers"] for state in callbacks.values() if isinstance(state, Mapping) and "peers" in state), {})


def _is_state(content: Any) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether that is what ``state_dict()`` returns."""
    return isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def _misfits(wanted: Mapping[str, Tensor], have: Mapping[str, Tensor]) -> list[str]:
    """Says what keeps the tensors of a file from being a model's."""
    needed = [key for key in wanted if not key.endswith(UNCOUNTED)]
    missing = [f"it lacks {key}" for key in needed if key not in have]
    shapes = [
        f"{key} is {tuple(have[key].shape)} and not {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in have and have[key].shape != value.shape
    ]
    return missing + shapes + [f"it has {key}, which the model has not" for key in have if key not in wanted]
