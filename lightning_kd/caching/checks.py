"""Checks that a cache is of this teacher, and of these inputs."""

import hashlib
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

TOLERANCE = 0.02
"""How far the checksums of equal inputs may be apart, in units of the input's own size: bf16 rounds by less."""


def fingerprint(teacher: nn.Module) -> str:
    """Returns what two teachers share only if their layers, weights and settings are equal.

    Example:
        >>> fingerprint(nn.ReLU()) == fingerprint(nn.ReLU()), fingerprint(nn.ReLU()) == fingerprint(nn.Tanh())
        (True, False)
    """
    found = hashlib.sha256()
    settings = {k: v for k, v in vars(teacher).items() if k[0] != "_" and isinstance(v, (str, int, float, tuple))}
    for only_speed in ("training", "channels_last", "compile_options"):
        settings.pop(only_speed, None)
    found.update(repr(sorted(settings.items())).encode())
    for name, module in teacher.named_modules():
        found.update(f"{name}:{type(module).__qualname__};".encode())
    for name, tensor in teacher.state_dict().items():
        if isinstance(tensor, Tensor):
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # which is not sharded
            found.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            found.update(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def checksum(arguments: Any, count: int) -> Tensor:
    """Returns two numbers of each sample of a call's arguments, (B, 2): of what is in it, and how large that is.

    The first is a sum with signs that look random, so that a flip or a shift of an image changes it by about the
    second, its norm. Zeros at the end change neither: a text is padded to the longest of its batch.

    Args:
        arguments: Tensors ``(B, ...)``, or lists of B tensors, anywhere in containers; all else is left out.
        count: B.
    """
    samples = [leaf for leaf in _of_samples(arguments, count) if leaf[0].numel()]
    if not samples:
        return torch.zeros(count, 2)
    return torch.stack([_sums(leaf) for leaf in samples]).sum(0).cpu()


def _of_samples(arguments: Any, count: int) -> list[list[Tensor] | Tensor]:
    if isinstance(arguments, Tensor):
        return [arguments] if arguments.ndim and len(arguments) == count else []
    if isinstance(arguments, list) and len(arguments) == count and all(isinstance(x, Tensor) for x in arguments):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    if isinstance(arguments, (list, tuple)):
        return [found for item in arguments for found in _of_samples(item, count)]
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count]


def _sums(samples: list[Tensor] | Tensor) -> Tensor:
    if isinstance(samples, list):
        return torch.cat([_sums(sample.unsqueeze(0)) for sample in samples])
    values = samples.detach().flatten(1) if samples.ndim > 1 else samples.detach().unsqueeze(1)
    values = values.float()
    return torch.stack([values @ _signs(values.shape[1], values.device), values.norm(dim=1)], dim=1)


def _signs(count: int, device: torch.device) -> Tensor:
    mixed = torch.arange(1, count + 1, device=device)
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return 1.0 - 2.0 * ((mixed >> 16) & 1).float()


def differing(now: Tensor, then: Tensor) -> Tensor:
    """Returns which samples' inputs are not those that the checksums were made of."""
    size = torch.maximum(now[:, 1], then[:, 1])
    return (now - then).abs().amax(1) > TOLERANCE * size + 1e-6


def is_random(dataset: Any) -> bool:
    """Whether a data set gives another first sample when it is asked again: it is augmented at random."""
    with isolate_rng():
        first = tree_leaves(dataset[0])
        return any(not _equal(first, tree_leaves(dataset[0])) for _ in range(6))


def _equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if hasattr(one, "tobytes"):  # an array, or an image of PIL
        return bool(one.tobytes() == other.tobytes())
    return not isinstance(one, (int, float, str, bytes)) or one == other
