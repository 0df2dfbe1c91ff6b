"""Peers: networks that learn at the same time teach each other."""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_kd.taps import Record
from lightning_kd.teachers.base import Teacher

Imitate = Literal["each", "ensemble"]


class Peers(Teacher):
    r"""Other networks that learn the same task at the same time, from the data and from each other.

    With networks 1..K, the student among them, each network k learns (``"each"``, deep mutual learning)::

        L_k = task_k + 1 / (K - 1) * sum_{l != k} term(k, l)

    or (``"ensemble"``, like the linear targets of KDCL) from the mean of the outputs of all K, itself included::

        L_k = task_k + term(k, mean_l)

    Nothing flows back into the network that is imitated. The networks run through the user's ``training_step``, once
    each: it takes Lightning, and ``callbacks.MutualDistillation`` or ``DistillationModule``, to do that.

    Args:
        peers: The other networks, of any architecture; or LightningModules, each with its own network.
        imitate: What each network imitates.

    Raises:
        ValueError: If there is no peer, or one is given twice.
        TypeError: If a peer is not a module.

    Source:
        Deep mutual learning: Zhang et al., arXiv 1706.00384, equations 6 and 7; KDCL: Guo et al., Online Knowledge
        Distillation via Collaborative Learning, CVPR 2020.
    """

    def __init__(self, peers: Sequence[nn.Module], imitate: Imitate = "each") -> None:
        super().__init__()
        given: object = peers
        if not isinstance(given, (Sequence, nn.ModuleList)):
            raise TypeError(f"peers is a list of networks, got a {type(given).__name__}: write peers=[network].")
        for peer in peers:
            if not isinstance(peer, nn.Module):
                raise TypeError(f"A peer is a network, an nn.Module; got {peer!r}.")
        if not len(peers) or len({id(peer) for peer in peers}) < len(peers):
            raise ValueError(f"peers are one or more different networks beside the student; got {len(peers)}.")
        if imitate not in ("each", "ensemble"):
            raise ValueError(f"imitate is 'each' or 'ensemble', got {imitate!r}.")
        self.imitate: Imitate = imitate
        self._peers = tuple(peers)  # not submodules: they are trained, moved and saved where they learn

    @property
    def peers(self) -> tuple[nn.Module, ...]:
        """The other networks."""
        return self._peers

    def root(self, student: nn.Module) -> nn.Module:
        """Returns the first of them: all have the paths that terms name."""
        return self.peers[0]

    def bind(self, student: nn.Module, paths: Collection[str]) -> None:
        """Does nothing: what they compute is watched where they learn."""

    def unbind(self) -> None:
        """Does nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Record:
        """Returns nothing yet: the peers' answers are those of their own training steps."""
        return {}

    def knowledge(self, own: Record, others: Sequence[Record]) -> list[Record]:
        """Returns what one network imitates, of what was captured in it and in the others."""
        if self.imitate == "each":
            return list(others)
        return [{path: _mean([record[path] for record in (own, *others)]) for path in own}]


def _mean(values: list[list[Any]]) -> list[Any]:
    def mean(*tensors: Any) -> Any:
        if not all(isinstance(t, Tensor) and t.shape == tensors[0].shape for t in tensors):
            said = ", ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in tensors)
            raise ValueError(
                f"the networks' outputs have no mean: {said}. With imitate='ensemble' all are tensors of one shape; "
                "use imitate='each' for features of different networks."
            )
        return torch.stack([t.detach().float() for t in tensors]).mean(0)

    return [tree_map(mean, *calls) for calls in zip(*values, strict=True)]
