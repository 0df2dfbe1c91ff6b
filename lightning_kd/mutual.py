"""Mutual distillation: several networks learn through one user's ``training_step``, and from each other."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_kd.attachment import Attachment, Label, attachments_of
from lightning_kd.copying import own_copy
from lightning_kd.distiller import Call, Distiller
from lightning_kd.optimizers import adopt, adopt_groups, optimizers_of
from lightning_kd.rehearsal import rehearse
from lightning_kd.resume import restore, saved
from lightning_kd.schedules import Schedule
from lightning_kd.teachers import Peers
from lightning_kd.wiring import find_module

STEPS = {"fit": ("validation_step",), "validate": ("validation_step",), "test": ("test_step",)}


@dataclass
class Peer:
    """One of the networks that learn: where it runs, and what it learns from the others."""

    name: str
    module: LightningModule
    network: nn.Module
    distiller: Distiller


class MutualAttachment(Attachment):
    """Lets peers of the student learn through the module's own ``training_step``, each from the others.

    A peer runs in a copy of the user's module, with its network in the student's place, so that it has metrics of its
    own; what the copy logs has the peer's name in front: ``peer1/val_acc``. The peers' parameters join the groups of
    the user's optimizer as the copy's own ``configure_optimizers`` groups them.

    Args:
        distiller: The terms, and ``teachers.Peers``. A term's student path is of the student, its teacher path of
            every peer.
        student: Dotted path of the student in the LightningModule; the module itself unless given, and then the
            peers are LightningModules.
        labels: How to get from a batch what losses need, by the name of their argument.
        task_weight: Factor of every network's own loss, or a schedule of it.
        prog_bar: Whether the progress bar shows the terms.
    """

    def __init__(
        self,
        distiller: Distiller,
        student: str | None = None,
        labels: Mapping[str, Label | None] | None = None,
        task_weight: float | Schedule = 1.0,
        prog_bar: bool = False,
    ) -> None:
        super().__init__(distiller, student=student, labels=labels, task_weight=task_weight, prog_bar=prog_bar)
        self._members: list[Peer] = []
        self._mirrors: dict[str, Distiller] = {}
        for name, term in distiller.named_terms():
            if len(self.teacher.peers) > 1 and term.student.text != term.teacher.text:
                raise ValueError(
                    f"Term {name!r}: with more than two networks all compare the same path, and this term has "
                    f"{term.student.text!r} for the student and {term.teacher.text!r} for its peers."
                )

    @property
    def teacher(self) -> Peers:
        """The student's peers."""
        teacher = self.distiller.teacher
        assert isinstance(teacher, Peers)
        return teacher

    @property
    def peers(self) -> tuple[nn.Module, ...]:
        """The networks that learn beside the student; after a fit they are trained."""
        return self.teacher.peers

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_members": []}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets the peers be evaluated, too, each with metrics of its own."""
        super().setup(trainer, pl_module, stage)
        for name in STEPS.get(stage, ()):
            if is_overridden(name, pl_module):
                self._patch(pl_module, name, self._evaluating(pl_module, name))
        if stage in ("validate", "test"):
            self._meet(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        super().teardown(trainer, pl_module, stage)
        self._undo_all()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls the hook of the peers' modules, too."""
        super().on_train_epoch_start(trainer, pl_module)
        self._call("on_train_epoch_start", pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls the hook of the peers' modules, too."""
        self._call("on_train_epoch_end", pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls the hook of the peers' modules, too."""
        self._call("on_validation_epoch_start", pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls the hook of the peers' modules, too."""
        self._call("on_validation_epoch_end", pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls the hook of the peers' modules, too."""
        self._call("on_test_epoch_start", pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls the hook of the peers' modules, too."""
        self._call("on_test_epoch_end", pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Returns what the terms learned, and the peers' modules with what their terms learned."""
        state = super().state_dict()
        if self._pending is None and self._others:
            state["peers"] = {
                peer.name: {"state_dict": peer.module.state_dict(), **saved(peer.distiller)} for peer in self._others
            }
        return state

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore({key: value for key, value in state.items() if key != "peers"})
        was = state.get("peers", {})
        if sorted(was) != sorted(peer.name for peer in self._others):
            raise ValueError(
                f"The checkpoint holds {len(was)} peers of the student, and here are {len(self._others)}. Give the "
                "same peers as in the run that is resumed."
            )
        for peer in self._others:
            peer.module.load_state_dict(was[peer.name]["state_dict"])
            restore(peer.distiller, was[peer.name])

    @property
    def _others(self) -> list[Peer]:
        return self._members[1:]

    def _has_parameters(self) -> bool:
        return True

    def _refuse_what_cannot_work(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._refuse_what_cannot_work(trainer, pl_module)
        if len(attachments_of(trainer)) > 1:
            raise ValueError(
                f"{type(self).__name__} is the only one of the Trainer's callbacks that can distil: the others would "
                "teach the student, and not its peers."
            )

    def _attach(self, pl_module: LightningModule) -> nn.Module:
        self._meet(pl_module.trainer, pl_module)
        student = super()._attach(pl_module)
        for peer in self._others:
            peer.distiller.attach(peer.network)
            self._undo.append(peer.distiller.detach)
        return student

    def _learners(self) -> nn.Module:
        parts = [part for peer in self._others for part in (peer.module, peer.distiller)]
        return nn.ModuleList([self.distiller, *parts])

    def _build(self, trainer: Trainer, pl_module: LightningModule, student: nn.Module) -> None:
        assert self._own_step is not None
        trainer.precision_plugin.convert_module(pl_module).to(trainer.strategy.root_device)
        found = []
        for peer in self._members:
            step = self._own_step if peer.module is pl_module else peer.module.training_step
            trainer.precision_plugin.convert_module(peer.module).to(trainer.strategy.root_device)
            calls = rehearse(trainer, peer.module, step, peer.network, peer.distiller)
            self._check_called(calls, peer.module)
            found.append(calls)
        with isolate_rng():
            for peer, calls in zip(self._members, self._paired(found), strict=True):
                peer.distiller.build(calls[0])

    def _meet(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes a module for every peer, and terms for every network."""
        student = find_module(pl_module, self.student, "the LightningModule") if self.student else pl_module
        self._members = [Peer("student", pl_module, student, self.distiller)]
        networks = [student]
        for i, given in enumerate(self.peers, 1):
            module, network = self._copy_for(given, pl_module, student)
            module.trainer = trainer
            networks.append(network)
            self._members.append(Peer(f"peer{i}", module, network, self.distiller))
        shared = {id(p) for p in student.parameters()}
        for peer in self._others:
            own = {id(p) for p in peer.network.parameters()}
            if own & shared:
                raise ValueError(f"{peer.name} shares parameters with another of the networks; give each its own.")
            shared |= own
            others = Peers([network for network in networks if network is not peer.network], self.teacher.imitate)
            if peer.name not in self._mirrors:
                self._mirrors[peer.name] = self.distiller.mirrored(others)
            peer.distiller = self._mirrors[peer.name]
            peer.distiller.set_teacher(others)
            _log_as(peer, pl_module)

        def part() -> None:
            for peer in self._others:
                vars(peer.module).pop("log", None)
                peer.module.trainer = None
                peer.module.cpu()  # as Lightning does with the student's

        self._undo.append(part)

    def _copy_for(
        self, peer: nn.Module, pl_module: LightningModule, student: nn.Module
    ) -> tuple[LightningModule, nn.Module]:
        if isinstance(peer, LightningModule):
            return peer, find_module(peer, self.student, "the peer") if self.student else peer
        if student is pl_module:
            raise ValueError(
                f"The peer {type(peer).__name__} is a plain network, and the student is all of "
                f"{type(pl_module).__name__}. Say where in it the student is, student='model' for one, or give "
                "LightningModules as peers."
            )
        return own_copy(pl_module, {id(student): peer, id(self): None}), peer

    def _total(
        self, trainer: Trainer, task_loss: Tensor, calls: list[Call], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        found, tasks = [calls], [task_loss]
        for peer in self._others:
            peer.module._current_fx_name = self._members[0].module._current_fx_name
            with peer.distiller.watch() as theirs:
                result = peer.module.training_step(*args, **kwargs)
            loss = result.get("loss") if isinstance(result, Mapping) else result
            if not isinstance(loss, Tensor):
                raise ValueError(f"training_step returned a loss for the student and {loss!r} for {peer.name}.")
            self._check_called(theirs, peer.module)
            found.append(theirs)
            tasks.append(loss)
        batch = args[0] if args else next(iter(kwargs.values()))
        total: Tensor | None = None
        values: dict[str, Tensor | float] = {}
        for peer, loss, theirs in zip(self._members, tasks, self._paired(found), strict=True):
            prefix = "" if peer is self._members[0] else f"{peer.name}/"
            if prefix:
                self._follow_the_students_terms(peer)
            own, measured = self._weigh(trainer, peer.distiller, loss, theirs, batch, prefix)
            values |= measured
            total = own if total is None else total + own
        assert total is not None
        self._values = {**values, "train/loss": total.detach()}
        return total

    def _follow_the_students_terms(self, peer: Peer) -> None:
        """Gives a peer's terms what may be scheduled from outside."""
        for (_, ours), (_, theirs) in zip(self.distiller.named_terms(), peer.distiller.named_terms(), strict=True):
            theirs.weight, theirs.schedules = ours.weight, ours.schedules

    def _paired(self, found: list[list[Call]]) -> list[list[Call]]:
        """Returns for every network its calls, each with what it imitates of the others."""
        if len({len(calls) for calls in found}) != 1:
            counts = ", ".join(f"{p.name} {len(calls)} times" for p, calls in zip(self._members, found, strict=True))
            raise ValueError(f"training_step called {counts}: the calls of the networks cannot be paired.")
        paired = []
        for k, calls in enumerate(found):
            distiller = self._members[k].distiller
            pairs = []
            for i, call in enumerate(calls):
                records = [
                    distiller.as_teacher(found[j][i].student, peer.distiller) for j, peer in enumerate(self._members)
                ]
                own = records.pop(k)
                pairs += [Call(call.student, knowledge) for knowledge in self.teacher.knowledge(own, records)]
            paired.append(pairs)
        return paired

    def _optimizing(self, configure_optimizers: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(configure_optimizers)
        def configure_optimizers_of_all() -> Any:
            result = configure_optimizers()
            optimizers = list(optimizers_of(result))
            if optimizers:
                for peer in self._others:
                    adopt_groups(optimizers, list(optimizers_of(peer.module.configure_optimizers())))
                adopt(optimizers, [p for p in self._learners().parameters() if p.requires_grad])
            return result

        return configure_optimizers_of_all

    def _evaluating(self, pl_module: LightningModule, name: str) -> Callable[..., Any]:
        step = getattr(pl_module, name)

        @functools.wraps(step)
        def step_of_all(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            for peer in self._others:
                peer.module.to(pl_module.device).train(pl_module.training)
                peer.module._current_fx_name = pl_module._current_fx_name
                getattr(peer.module, name)(*args, **kwargs)
            return result

        return step_of_all

    def _call(self, hook: str, pl_module: LightningModule) -> None:
        for peer in self._others:
            peer.module._current_fx_name = pl_module._current_fx_name
            getattr(peer.module, hook)()


def _log_as(peer: Peer, pl_module: LightningModule) -> None:
    """Puts the peer's name in front of what its module logs."""
    log = peer.module.log

    def log_with_name(name: str, *args: Any, **kwargs: Any) -> None:
        log(f"{peer.name}/{name}", *args, **kwargs)

    peer.module.log = log_with_name  # type: ignore[method-assign]
