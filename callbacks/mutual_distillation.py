"""Mutual distillation in a LightningModule that knows nothing of it."""

from collections.abc import Mapping, Sequence

from torch import nn

from lightning_kd.attachment import Label, label_sources, refuse_unasked
from lightning_kd.attachment.mutual import MutualAttachment
from lightning_kd.distiller import Distiller
from lightning_kd.schedules import Schedule
from lightning_kd.teachers import Peers
from lightning_kd.teachers.peers import Imitate
from lightning_kd.term import Term


class MutualDistillation(MutualAttachment):
    """Lets several networks learn the same task at once, from the data and from each other (deep mutual learning).

    Every network runs once per batch through the module's own ``training_step``: the student in the module, each peer
    in a copy of it. Their losses are summed; nothing flows back into the network that is imitated. What the copies log
    has the peer's name in front, ``peer1/val_acc``; their weights are in the checkpoint of the run.

    Args:
        peers: The other networks, of any architecture; LightningModules where the student is the module itself.
        terms: What each learns from the others, by name; a term's student path is of the student, its teacher path
            of the peers.
        student: Dotted path of the student inside the LightningModule; the module itself unless given.
        imitate: What each network imitates: ``"each"`` of the others, or the ``"ensemble"``, the mean of all outputs.
        target: How to get the labels for losses that need them; ``batch[1]`` unless given.
        task_weight: Factor of each network's own loss, or a schedule of it.
        index: How to get the samples' indices in the data set, for losses with a memory of it.
        labels: How to get what else losses ask for by name, ``{"mask": lambda batch: batch[1] != 255}`` say.
        prog_bar: Whether the progress bar shows the terms.

    Raises:
        ValueError: If an argument is out of range, or networks share parameters.
        TypeError: If a peer is not a module.

    Source:
        See ``teachers.Peers``.

    Example:
        >>> from lightning_kd import losses
        >>> peer = nn.Linear(4, 3)
        >>> callback = MutualDistillation([peer], {"kd": Term(losses.KD(temperature=1.0))}, student="model")
        >>> callback.peers == (peer,)
        True
    """

    def __init__(
        self,
        peers: Sequence[nn.Module],
        terms: Mapping[str, Term],
        student: str | None = None,
        imitate: Imitate = "each",
        target: Label | None = None,
        task_weight: float | Schedule = 1.0,
        index: Label | None = None,
        prog_bar: bool = False,
        labels: Mapping[str, Label] | None = None,
    ) -> None:
        super().__init__(
            Distiller(terms, Peers(peers, imitate)),
            student=student,
            labels=label_sources(target, index, labels),
            task_weight=task_weight,
            prog_bar=prog_bar,
        )
        refuse_unasked(labels or {}, self.distiller.labels)
