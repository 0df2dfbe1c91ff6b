"""Networks that each know some of the joints, as one that knows them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_kd.keypoints import Said, said


class PartExperts(nn.Module):
    """Several networks for parts of a pose, body, hands and face say, as one teacher of the whole.

    Each sees the whole image. What more than one says of a joint is averaged (of bins the logits); what nobody knows is
    not a number. :class:`lightning_kd.tasks.Pose` leaves the joints that nobody knows out of every term; elsewhere say
    so with ``labels={"joints": ...}``, or the run stops at a term that is no number.

    Args:
        experts: Pairs of a network and the joints that its own joints are in the whole, in their order.
        num_keypoints: Number of joints of the whole.

    Raises:
        ValueError: If a joint is not of the whole, or given twice by one expert, or an expert says something of another
            number of joints, or experts say different things.

    Example:
        >>> from lightning_kd.models import PoseNet
        >>> body, hand = (PoseNet("resnet10t", n, (32, 32), stride=8) for n in (4, 3))
        >>> experts = PartExperts([(body, [0, 1, 2, 3]), (hand, [3, 4, 6])], num_keypoints=7)
        >>> experts(torch.rand(2, 3, 32, 32)).simcc_x.shape
        torch.Size([2, 7, 64])
        >>> experts.known.tolist()
        [True, True, True, True, True, False, True]

    Source: Weinzaepfel et al., DOPE: Distillation Of Part Experts for whole-body 3D pose estimation in the wild,
    arXiv 2008.09457; this is the idea, for the three kinds of output that there are here, not their detector.
    """

    known: Tensor

    def __init__(self, experts: Sequence[tuple[nn.Module, Sequence[int]]], num_keypoints: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(network for network, _ in experts)
        self.num_keypoints = num_keypoints
        for i, (_, joints) in enumerate(experts):
            if len(set(joints)) < len(joints) or not all(0 <= joint < num_keypoints for joint in joints):
                raise ValueError(
                    f"the joints of an expert are different numbers from 0 to {num_keypoints - 1}; got {list(joints)}."
                )
            self.register_buffer(f"joints{i}", torch.tensor(list(joints)), persistent=False)
        known = torch.zeros(num_keypoints, dtype=torch.bool)
        for _, joints in experts:
            known[list(joints)] = True
        self.register_buffer("known", known, persistent=False)

    def forward(self, images: Tensor) -> Said:
        """Asks every expert."""
        each = [said(expert(images)) for expert in self.experts]
        kind = type(each[0])
        shapes = {tuple(field.shape[2:] for field in found) for found in each}
        if any(type(found) is not kind for found in each) or len(shapes) > 1:
            kinds = ", ".join(f"{type(found).__name__} {tuple(found[0].shape)}" for found in each)
            raise ValueError(
                f"the experts say different things, {kinds}: give them one kind of head and one resolution."
            )
        return kind(*(self._merged(fields) for fields in zip(*each, strict=True)))

    def _merged(self, fields: tuple[Tensor, ...]) -> Tensor:
        whole = fields[0].new_zeros(len(fields[0]), self.num_keypoints, *fields[0].shape[2:])
        voices = whole.new_zeros(self.num_keypoints)
        for i, field in enumerate(fields):
            joints: Tensor = self.get_buffer(f"joints{i}")
            if len(joints) != field.shape[1]:
                raise ValueError(f"expert {i} says something of {field.shape[1]} joints, and {len(joints)} are given.")
            whole = whole.index_add(1, joints, field)
            voices = voices.index_add(0, joints, torch.ones_like(joints, dtype=voices.dtype))
        return whole / voices.view(-1, *[1] * (whole.ndim - 2))  # 0 / 0 of what nobody knows
