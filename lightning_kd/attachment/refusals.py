"""What cannot be distilled by a callback, and what to do instead."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_kd.attachment.guest import GUEST
from lightning_kd.distiller import Distiller
from lightning_kd.teachers.copies import CopyTeacher
from lightning_kd.watching import Call

WRAPPING = ("FSDPStrategy", "DeepSpeedStrategy")
"""Strategies that hold parameters in a wrapper; by name, since pytorch_lightning has classes of its own."""

PLAIN = ("SingleDeviceStrategy", "DDPStrategy")
"""Strategies whose optimizers have the module's own parameters."""


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Returns the callbacks of a trainer."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return callbacks


def refuse_manual(pl_module: LightningModule) -> None:
    """Refuses manual optimization."""
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"{type(pl_module).__name__} uses manual optimization: its training_step steps the optimizers before "
            "a callback sees any loss. Call the engine there instead: `with distiller.watch() as calls:` around "
            "the student's forward, and add `distiller.total(distiller(calls, target=...))` to the loss before "
            "manual_backward (lightning_kd.Distiller)."
        )


def refuse_iterator(pl_module: LightningModule) -> None:
    """Refuses a ``training_step(dataloader_iter)``, which takes its batch where nobody else can see it."""
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            f"{type(pl_module).__name__}.training_step takes its batch from a dataloader_iter, so that no label can be "
            "read of it, and no shape before the fit. Let it take the batch: training_step(self, batch, batch_idx)."
        )


def refuse_strategy(trainer: Trainer, reaches_in: bool) -> None:
    """Refuses strategies that wrap, where something learns beside the student or the student is copied."""
    strategy = type(trainer.strategy).__name__
    if strategy in WRAPPING and reaches_in:
        raise ValueError(
            f"{strategy} splits parameters inside of a wrapper, in which there is no place for projectors, peers or "
            "copies of the student. Use ModelParallelStrategy with fully_shard in configure_model, or "
            "strategy='ddp'; a frozen teacher without projectors stays as it is."
        )


def refuse_earlier_average(trainer: Trainer, callback: Callback) -> None:
    """Refuses weight averaging before a callback: it pairs parameters by position in a copy made at its own setup."""
    callbacks = callbacks_of(trainer)
    for earlier in callbacks[: callbacks.index(callback)]:
        if isinstance(earlier, WeightAveraging):
            raise ValueError(
                f"{type(earlier).__name__} comes before {type(callback).__name__} in the Trainer's callbacks, so that "
                "its copy of the module would lack the projectors. Put it after."
            )


def refuse_copy_of_terms(pl_module: LightningModule, callback: Callback, teacher: nn.Module) -> None:
    """Refuses terms that learn, where the student is the whole module and its copy teaches: they would be in it."""
    if isinstance(teacher, CopyTeacher):
        raise ValueError(
            f"{type(callback).__name__}: the student is all of {type(pl_module).__name__}, whose copy teaches, and "
            "terms that learn something would be a part of it. Say which network in it learns: student='model'."
        )


def refuse_two_swaps(trainer: Trainer, evaluated: Sequence[Callback]) -> None:
    """Refuses two averages that take the student's place in validation: each would get the other's weights."""
    averages = [each for each in callbacks_of(trainer) if isinstance(each, WeightAveraging)]
    swapping = [*evaluated, *averages] if evaluated else []
    if len(swapping) > 1:
        raise ValueError(
            f"{' and '.join(type(each).__name__ for each in swapping)} both take the student's place in validation. "
            "Let one of them do it: evaluate=False for the others."
        )


def refuse_same_names(distillers: Sequence[Distiller]) -> None:
    """Refuses terms of one name in several callbacks."""
    names = [name for distiller in distillers for name in distiller.terms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"More than one callback has a term named {', '.join(twice)}; each name is logged once.")


def refuse_shared(distillers: Sequence[Distiller]) -> None:
    """Refuses what several callbacks would bind, teach or schedule at once."""
    owned = [
        {id(part): type(part).__name__ for part in (d.teacher, *(p for _, t in d.named_terms() for p in (t, t.loss)))}
        for d in distillers
    ]
    for i, mine in enumerate(owned):
        for theirs in owned[i + 1 :]:
            shared = [name for part, name in mine.items() if part in theirs]
            if shared:
                raise ValueError(
                    f"Two callbacks have one {' and one '.join(shared)}: what it learns or is bound to for one would "
                    "be for both. Make one for each; Frozen teachers may have one network."
                )


def refuse_forgotten(trainer: Trainer, student: nn.Module) -> None:
    """Refuses a student that no optimizer knows: its terms would teach nothing."""
    if type(trainer.strategy).__name__ not in PLAIN:
        return  # others have parameters of their own
    known = _optimized(trainer)
    learning = [p for p in student.parameters() if p.requires_grad]
    if trainer.optimizers and learning and not any(id(p) in known for p in learning):
        raise ValueError(
            f"None of the student's parameters, those of a {type(student).__name__}, is in an optimizer, so it would "
            "learn nothing. Give them to one in configure_optimizers, or say with student= which module learns."
        )


def refuse_lazy(names: list[str], owner: str = "the student") -> None:
    """Refuses layers without weights yet, where they are to be copied or were called in a rehearsal."""
    if names:
        raise ValueError(
            f"{owner} has lazy layers, which have no weights before their first call ({', '.join(names[:3])}). "
            "Call it once on a sample before the fit, in setup() or configure_model()."
        )


def refuse_forgotten_peer(trainer: Trainer, name: str, peer: nn.Module, strangers: bool) -> None:
    """Refuses a peer of which no optimizer knows anything, or not all where it knows strangers in its place."""
    if type(trainer.strategy).__name__ not in PLAIN or not trainer.optimizers:
        return
    known = _optimized(trainer)
    learning = [key for key, p in peer.named_parameters() if p.requires_grad]
    left = [key for key, p in peer.named_parameters() if p.requires_grad and id(p) not in known]
    if left and (strangers or len(left) == len(learning)):
        raise ValueError(
            f"{len(left)} of the {len(learning)} parameters of {name} are in no optimizer, {left[0]} for one, so that "
            "it would not learn as the student does. A peer runs in a copy of the LightningModule, whose "
            "configure_optimizers is called, too: let that ask self for the parameters, self.model.parameters(), and "
            "not an optimizer, a list or a network from before."
        )


@contextmanager
def waiting(trainer: Trainer, distiller: Distiller) -> Iterator[None]:
    """Lets terms teach nothing whose layer is frozen, where a callback of Lightning's unfreezes layers later."""
    later = _unfreezes_later(trainer)
    frozen = [term for name, term in distiller.named_terms() if later and distiller.is_frozen(name)]
    try:
        for term in frozen:
            term.unfreezes = True
        yield
    finally:
        for term in frozen:
            term.unfreezes = False


def warn_unlearned(trainer: Trainer, distiller: Distiller, losses: Mapping[str, Tensor]) -> None:
    """Warns of a term whose gradient reaches nothing in an optimizer but its own projector."""
    if type(trainer.strategy).__name__ not in PLAIN or not trainer.optimizers:
        return
    own = {id(p) for p in distiller.parameters()}
    known = _optimized(trainer) - own
    later = _unfreezes_later(trainer)
    for name, term in distiller.named_terms():
        reached = _reached(losses[name])
        if not term.current_weight or reached is None:
            continue
        if not later and not reached & known:
            rank_zero_warn(
                f"Term {name!r} teaches nothing: of the parameters that the student's {term.student.text!r} is "
                "computed with none is in an optimizer. Give them to one in configure_optimizers, or name a layer that "
                "learns; if they are added to it later, there is nothing to mind."
            )
        if later and not reached - own:
            rank_zero_warn(
                f"Term {name!r} teaches nothing yet: all that the student's {term.student.text!r} is computed with is "
                "frozen. It begins to when that is unfrozen."
            )


def _reached(loss: Tensor) -> set[int] | None:
    """Returns the ids of the tensors that a gradient gets to; None where functions of others may hide some."""
    found, seen, left = set(), set(), [loss.grad_fn]
    while left:
        node: Any = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        written_in = getattr(getattr(node, "_forward_cls", None), "__module__", "lightning_kd")
        if not written_in.startswith(("lightning_kd", "torch._functorch")):  # a checkpoint, for one
            return None
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        left += [following for following, _ in node.next_functions]
    return found


def _unfreezes_later(trainer: Trainer) -> bool:
    return any(isinstance(each, BaseFinetuning) for each in callbacks_of(trainer))


def _optimized(trainer: Trainer) -> set[int]:
    return {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}


def accumulates_by_schedule(trainer: Trainer) -> bool:
    """Returns whether the number of batches in a step changes over the run."""
    return any(isinstance(each, GradientAccumulationScheduler) for each in callbacks_of(trainer))


def refuse_changing_accumulation(trainer: Trainer) -> None:
    """Refuses a schedule over a run whose length is not known before."""
    if accumulates_by_schedule(trainer):
        raise ValueError(
            "A schedule is over the run, and with GradientAccumulationScheduler its length is not known before. "
            "Accumulate the same number of batches throughout: Trainer(accumulate_grad_batches=...)."
        )


def refuse_uncalled(
    calls: Sequence[Call], student: str | None, pl_module: LightningModule, before: bool = False
) -> None:
    """Refuses a ``training_step`` in which the student was not called, though it may have been in steps before."""
    if calls:
        return
    name = f"{student!r}" if student else f"{type(pl_module).__name__}.forward"
    if before:
        raise RuntimeError(
            f"training_step called the student ({name}) before, and not in step {pl_module.global_step}, epoch "
            f"{pl_module.current_epoch}, or only under no_grad. A step without it may return None, which skips the "
            "batch; where it learns something else, call the engine inside of training_step, in the steps that have "
            "something to distil (lightning_kd.Distiller)."
        )
    children = [
        n
        for n, child in pl_module.named_children()
        if not n.startswith(GUEST) and n != student and any(True for _ in child.parameters())
    ]
    raise RuntimeError(
        f"training_step did not call the student ({name}) with gradients enabled, so there is nothing to distil. "
        f"A call is {'.'.join(filter(None, ('self', student)))}(x): forward(x) and other methods go past the hooks. If "
        "it calls another module, say which: Distillation(student=...), one of "
        f"{', '.join(map(repr, children)) or 'its submodules'}."
    )
