"""Mutual distillation: several networks learn through one user's ``training_step``, and from each other."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.memory import recursive_detach
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_kd.attachment.attachment import Attachment, attachments_of
from lightning_kd.attachment.batches import batch_of
from lightning_kd.attachment.guest import without_guests
from lightning_kd.attachment.labels import Label
from lightning_kd.attachment.optimizers import adopt, adopt_groups, optimizers_of
from lightning_kd.attachment.peers import ENDS, HOOKS, ArgumentsOf, Peer, arguments_of_all, log_as, tied_parts
from lightning_kd.attachment.pupils import learned_with
from lightning_kd.attachment.random_state import random_numbers_restored
from lightning_kd.attachment.refusals import refuse_forgotten_peer, refuse_uncalled
from lightning_kd.attachment.rehearsal import rehearse
from lightning_kd.attachment.resume import restore, saved
from lightning_kd.copying import own_copy
from lightning_kd.distiller import Distiller
from lightning_kd.schedules import Schedule
from lightning_kd.sharded_copies import shard_as
from lightning_kd.sharding import is_sharded, reshard, sharded_as, whole
from lightning_kd.teachers import Peers
from lightning_kd.teachers.weights import peers_in
from lightning_kd.watching import Call
from lightning_kd.wiring import find_module


class MutualAttachment(Attachment):
    """Lets peers of the student learn through the module's own ``training_step``, each from the others.

    A peer runs in a copy of the user's module, with its network in the student's place, so that it has metrics and
    hooks of its own; what the copy logs has the peer's name in front: ``peer1/val_acc``. The copies last as long as the
    callback. The peers' parameters join the groups of the user's optimizer as the copy's own ``configure_optimizers``
    groups them: learning rate and schedule are the student's.

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
        super().__init__(distiller, student, labels, task_weight, prog_bar)
        self._members: list[Peer] = []
        self._theirs: ArgumentsOf | None = None
        self._mirrors: dict[str, Distiller] = {}
        if distiller.teacher_input is not None or distiller.student_input is not None:
            raise ValueError(
                "teacher_input and student_input are not for peers: every network is called by training_step, and sees "
                "the batch that it is given."
            )
        for name, term in distiller.named_terms():
            if len(self.teacher.peers) > 1 and term.student.text != term.teacher.text:
                raise ValueError(
                    f"Term {name!r}: with more than two networks all compare the same path, and this term has "
                    f"{term.student.text!r} for the student and {term.teacher.text!r} for its peers."
                )

    def _undo_all(self) -> None:
        self._theirs = None
        super()._undo_all()

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
        return {**super().__getstate__(), "_members": [], "_theirs": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wraps the module's methods; where it is only evaluated, so that the peers are evaluated, too."""
        super().setup(trainer, pl_module, stage)
        if stage in ("validate", "test"):
            self._undo_all()
            configure_model = pl_module.configure_model

            def configure_model_and_peers() -> None:
                configure_model()
                self._meet(trainer, pl_module)
                self._host(pl_module, nn.ModuleList([peer.module for peer in self._others]))

            self._patches.replace(pl_module, "configure_model", configure_model_and_peers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses peers that would not learn."""
        super().on_train_start(trainer, pl_module)
        for peer in self._others:
            refuse_forgotten_peer(trainer, peer.name, peer.network, peer.strangers)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        for peer in self._others if self._patches else []:
            peer.module.teardown(stage)
        super().teardown(trainer, pl_module, stage)
        self._undo_all()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores that; of a run that is only evaluated, the peers."""
        if self._others and not self.distiller.attached:
            self._restore_evaluated(state_dict)
        else:
            super().load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that has no weights for the peers."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._others and not trainer.training and self.state_key not in checkpoint.get("callbacks", {}):
            self._restore_evaluated({"peers": peers_in(checkpoint)})

    def state_dict(self) -> dict[str, Any]:
        """Returns what the terms learned, and the peers' modules with what their terms learned."""
        state = super().state_dict()
        if self._pending is None and self._others:
            state["peers"] = {
                peer.name: {"state_dict": whole(peer.module.state_dict()), **saved(peer.distiller)}
                for peer in self._others
            }
            return self._with_freshness(state)
        return state

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore({key: value for key, value in state.items() if key != "peers"})
        self._restore_peers(state)
        for peer in self._others:
            restore(peer.distiller, state["peers"][peer.name])

    def _restore_evaluated(self, state: Mapping[str, Any]) -> None:
        """Restores the peers beside a student that is only evaluated; they are for the fit of no other."""
        self._restore_peers(state)
        learned_with(self._members[0].network, [self])

    def _restore_peers(self, state: Mapping[str, Any]) -> None:
        was = state.get("peers", {})
        if sorted(was) != sorted(peer.name for peer in self._others):
            raise ValueError(
                f"The checkpoint holds {len(was)} peers of the student, and here are {len(self._others)}. Give the "
                "same peers as in the run that is resumed."
            )
        for peer in self._others:
            state_dict = sharded_as(was[peer.name]["state_dict"], peer.module.state_dict())
            peer.module.load_state_dict(state_dict)

    @property
    def _others(self) -> list[Peer]:
        return self._members[1:]

    def _has_parameters(self) -> bool:
        return True

    def _needs_sample(self) -> bool:
        return any(peer.distiller.needs_sample for peer in self._members)

    def _refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._refuse(trainer, pl_module)
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
            self._patches.add(peer.distiller.detach)
        return student

    def _learning(self) -> list[tuple[str, object]]:
        return [*super()._learning(), ("its peers", self)]

    def _learners(self) -> nn.Module:
        return nn.ModuleList([*self._distillers, *(peer.module for peer in self._others)])

    @property
    def _distillers(self) -> list[Distiller]:
        return [peer.distiller for peer in self._members]

    def _build(self, trainer: Trainer, pl_module: LightningModule, student: nn.Module) -> None:
        assert self._own_step is not None
        trainer.precision_plugin.convert_module(pl_module).to(trainer.strategy.root_device)
        found = []
        for peer in self._members:
            step = self._own_step if peer.module is pl_module else peer.module.training_step
            trainer.precision_plugin.convert_module(peer.module).to(trainer.strategy.root_device)
            calls = rehearse(trainer, peer.module, step, peer.network, peer.distiller, self._read)
            refuse_uncalled(calls, self.student, peer.module)
            reshard(peer.module)
            found.append(calls)
        with random_numbers_restored():
            for peer, calls in zip(self._members, self._paired(found), strict=True):
                for name, shapes in peer.distiller.imitated_shapes(calls).items():
                    if len(shapes) > 1 and dict(peer.distiller.named_terms())[name].needs_sample:
                        raise ValueError(
                            f"Term {name!r}: what {peer.name} is to imitate has different shapes, "
                            f"{' and '.join(map(str, sorted(shapes)))}, and a term has one projector. With more than "
                            "two networks compare what has one shape in all of them: logits, for one."
                        )
                peer.distiller.build(calls[0])

    def _meet(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes a module for every peer, and terms for every network; or takes those of an earlier fit."""
        assert trainer.state.fn is not None
        student = find_module(pl_module, self.student, "the LightningModule") if self.student else pl_module
        before = self._members[0] if self._members else None
        known = before is not None and before.module is pl_module and before.network is student
        for module in [peer.module for peer in self._others] if known else self.peers:
            if isinstance(module, LightningModule):  # a new copy is of a module that is ready
                module.trainer = trainer
                module._device_mesh = pl_module._device_mesh
                module.setup(stage=str(trainer.state.fn.value))
                module.configure_model()
        if not known:
            members = [Peer("student", pl_module, student, self.distiller)]
            for i, given in enumerate(self.peers, 1):
                name = f"peer{i}"
                terms = self._mirrors.setdefault(name, self.distiller.mirrored(self.teacher))
                members.append(Peer(name, *self._module_of(name, given, pl_module, student), terms))
            self._members = members
        shared = {id(p) for p in student.parameters()}
        for peer in self._others:
            own = {id(p) for p in peer.network.parameters()}
            if own & shared:
                raise ValueError(f"{peer.name} shares parameters with another of the networks; give each its own.")
            shared |= own
            others = [member.network for member in self._members if member is not peer]
            peer.distiller.set_teacher(Peers(others, self.teacher.imitate))
            peer.module.trainer = trainer
            log_as(peer)

        def part() -> None:
            for peer in self._others:
                peer.distiller.set_teacher(self.teacher)
                peer.begun = peer.ended = None
                vars(peer.module).pop("log", None)
                peer.module.trainer = None
                if not is_sharded(peer.module):
                    peer.module.cpu()  # as Lightning does with the student's

        self._patches.add(part)
        for hook in HOOKS[trainer.state.fn.value]:
            # Each peer has the batch from before, also where the student alone has a hook.
            modules = [peer.module for peer in (self._members if hook.endswith("batch_start") else self._others)]
            if any(is_overridden(hook, module) for module in modules):
                self._patches.replace(pl_module, hook, self._calling_all(getattr(pl_module, hook), hook))

    def _module_of(
        self, name: str, peer: nn.Module, pl_module: LightningModule, student: nn.Module
    ) -> tuple[LightningModule, nn.Module]:
        """Returns the module in which a peer runs, and the network in it."""
        if isinstance(peer, LightningModule):
            network = find_module(peer, self.student, "the peer") if self.student else peer
            shard_as(network, student)
            return peer, network
        if student is pl_module:
            raise ValueError(
                f"The peer {type(peer).__name__} is a plain network, and the student is all of "
                f"{type(pl_module).__name__}. Say where in it the student is, student='model' for one, or give "
                "LightningModules as peers."
            )
        shard_as(peer, student)
        module = own_copy(pl_module, {id(student): peer, id(self): self, **tied_parts(pl_module, student, name, peer)})
        module._metric_attributes = None  # by which Lightning finds the original's metrics
        return module, peer

    def _begin_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._random = _collect_rng_states()
        self._theirs = arguments_of_all(self._others, "training_step", args, kwargs)

    def _total(
        self,
        trainer: Trainer,
        task_loss: Tensor,
        calls: list[Call],
        labels: Callable[[], Mapping[str, Any]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        found, tasks = [calls], [task_loss]
        theirs_of, self._theirs = self._theirs, None
        assert theirs_of is not None
        for peer in self._others:
            own_args, own_kwargs = theirs_of(peer)
            with peer.distiller.watch() as theirs, self._as_the_student(peer, self._random):
                result = peer.module.training_step(*own_args, **own_kwargs)
            loss = result.get("loss") if isinstance(result, Mapping) else result
            if loss is None:  # what one skips, nobody can learn from
                return None
            if not isinstance(loss, Tensor):
                raise ValueError(f"training_step returned a loss for the student and {loss!r} for {peer.name}.")
            output = {**(result if isinstance(result, Mapping) else {}), "loss": loss}
            peer.end("training_step", recursive_detach(output), batch_of(own_args, own_kwargs))
            refuse_uncalled(theirs, self.student, peer.module)
            found.append(theirs)
            tasks.append(loss)
        total: Tensor | None = None
        values: dict[str, Tensor | float] = {}
        for peer, loss, theirs in zip(self._members, tasks, self._paired(found), strict=True):
            prefix = "" if peer is self._members[0] else f"{peer.name}/"
            if prefix:
                self._follow_the_students_terms(peer)
            own, measured = self._weigh(trainer, peer.distiller, loss, theirs, labels, prefix)
            values |= measured
            total = own if total is None else total + own
        assert total is not None
        self._log.values = {**values, "train/loss": total.detach()}
        return total

    def _follow_the_students_terms(self, peer: Peer) -> None:
        """Gives a peer's terms what may be scheduled, or set, from outside."""
        for (_, ours), (_, theirs) in zip(self.distiller.named_terms(), peer.distiller.named_terms(), strict=True):
            theirs.weight, theirs.schedules = ours.weight, ours.schedules
            for own, other in zip(ours.loss.modules(), theirs.loss.modules(), strict=True):
                vars(other).update({name: value for name, value in vars(own).items() if isinstance(value, float)})

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
            with without_guests(self._members[0].module):  # whose parameters would be in the student's groups
                result = configure_optimizers()
            optimizers = list(optimizers_of(result))
            if optimizers:
                for peer in self._others:
                    theirs = list(optimizers_of(peer.module.configure_optimizers()))
                    own = {id(p) for p in peer.module.parameters()}
                    groups = [group["params"] for optimizer in theirs for group in optimizer.param_groups]
                    peer.strangers = any(id(p) not in own for params in groups for p in params)
                    adopt_groups(optimizers, theirs)
                adopt(optimizers, self._learning_parameters())
            return result

        return configure_optimizers_of_all

    def _calling_all(self, own: Callable[..., Any], hook: str) -> Callable[..., Any]:
        """Wraps a hook or a step, so that the peers' modules are called, too."""

        @functools.wraps(own)
        def hook_of_all(*args: Any, **kwargs: Any) -> Any:
            random = _collect_rng_states()
            theirs_of = arguments_of_all(self._others, hook, args, kwargs)
            with without_guests(self._members[0].module):
                result = own(*args, **kwargs)
            for peer in self._others:
                begins = hook.endswith("batch_start")
                if not (begins or is_overridden(hook, peer.module)):
                    continue
                theirs, named = theirs_of(peer)
                with self._as_the_student(peer, random):
                    returned = getattr(peer.module, hook)(*theirs, **named)
                if begins:
                    peer.begun = batch_of(theirs, named)
                elif hook in ENDS:
                    peer.end(hook, returned, batch_of(theirs, named))
            return result

        return hook_of_all

    @contextmanager
    def _as_the_student(self, peer: Peer, random: dict[str, Any]) -> Iterator[None]:
        """Lets a peer log where the student does, and draw the numbers that the student drew: noise, mixup."""
        peer.module._current_fx_name = self._members[0].module._current_fx_name
        with random_numbers_restored():
            _set_rng_states(random)
            yield
