"""Sequences: which tensors of three dimensions are (B, C, L), as one-dimensional convolutions return them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.GroupNorm)
_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)
_POOLS = (nn.MaxPool1d, nn.AvgPool1d, nn.LPPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d)


@dataclass(frozen=True)
class Layout:
    """What is known of how the output of a module is laid out, of the layers in it; nothing, unless said.

    Args:
        certain: Whether it is a layer that has its channels in dimension 1.
        channels: How many channels such layers in it have.
        others: The sizes of the parameters of all other layers in it.
    """

    certain: bool = False
    channels: frozenset[int] = frozenset()
    others: frozenset[int] = frozenset()

    @classmethod
    def of(cls, module: nn.Module, root: nn.Module) -> Layout:
        """Returns that of a module, by the layers of the model that it is in where it has no parameters itself."""
        certain = isinstance(module, _CONVOLUTIONS + _NORMS + _POOLS)
        channels, others = set(), set()
        for part in (module if next(module.parameters(), None) is not None else root).modules():
            if isinstance(part, _CONVOLUTIONS):
                channels.add(part.out_channels)
            elif isinstance(part, _NORMS):
                channels.add(part.num_channels if isinstance(part, nn.GroupNorm) else part.num_features)
            else:
                made = (weight for weight in part.parameters(recurse=False) if not is_lazy(weight))
                others |= {size for weight in made for size in weight.shape}
        return cls(certain, frozenset(channels), frozenset(others))

    def tell(self, x: Tensor) -> bool:
        """Tells whether a tensor is (B, C, L); not, where it may be tokens (B, N, C) as well."""
        if x.ndim != 3 or self.certain:
            return x.ndim == 3
        return x.shape[1] in self.channels and x.shape[2] not in self.channels | self.others


def between(student: Tensor, teacher: Tensor, align: str) -> str:
    """Returns how a projector is written that brings a sequence to the length (and the channels) of another."""
    steps = []
    (_, channels_in, length_in), (_, channels_out, length_out) = student.shape, teacher.shape
    if length_in > length_out:
        steps.append(f"nn.AdaptiveAvgPool1d({length_out})")
    if align == "shape" and channels_in != channels_out:
        steps.append(f"nn.Conv1d({channels_in}, {channels_out}, 1)")
    if length_in < length_out:
        steps.append(f"nn.Upsample({length_out}, mode='linear')")
    return f"nn.Sequential({', '.join(steps)})" if len(steps) > 1 else (steps or ["nn.Identity()"])[0]
