"""Attaches a distiller to any LightningModule for the length of a fit, and takes it off again."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_kd.attachment.batches import batch_of
from lightning_kd.attachment.guest import GUEST, Guest, without_guests
from lightning_kd.attachment.labels import Label, Labels
from lightning_kd.attachment.log import Log
from lightning_kd.attachment.moments import Moments
from lightning_kd.attachment.optimizers import adopt, forget_names, keep_names, optimizers_of
from lightning_kd.attachment.patches import Patches
from lightning_kd.attachment.positions import Positions
from lightning_kd.attachment.pupils import has_learned, learned_elsewhere, learned_with, learns
from lightning_kd.attachment.random_state import KEY, random_numbers_restored, random_state, set_random_state
from lightning_kd.attachment.refusals import (
    callbacks_of,
    refuse_copy_of_terms,
    refuse_earlier_average,
    refuse_forgotten,
    refuse_iterator,
    refuse_lazy,
    refuse_manual,
    refuse_same_names,
    refuse_shared,
    refuse_strategy,
    refuse_two_swaps,
    refuse_uncalled,
    waiting,
    warn_unlearned,
)
from lightning_kd.attachment.rehearsal import rehearse
from lightning_kd.attachment.resume import refuse_other_order, refuse_other_run, restore, saved, state_of
from lightning_kd.copying import unshare
from lightning_kd.distiller import Distiller
from lightning_kd.finite import FiniteCheck
from lightning_kd.schedules import Schedule
from lightning_kd.schedules.base import factor
from lightning_kd.sharding import is_sharded, reshard, shard_like, whole
from lightning_kd.teachers.copies import CopyTeacher
from lightning_kd.teachers.stillness import remember_modes
from lightning_kd.watching import Call, LabelsOf
from lightning_kd.wiring import find_module, lazy_in


class Attachment(Callback):
    """Watches a module's own ``training_step`` and adds the terms to the loss that it returns.

    The module's class is not touched: a few methods of the instance are wrapped when a fit begins
    and restored when it ends. What the terms learn (projectors) is a submodule of the module meanwhile, so that
    every strategy treats it like the module's own parameters, but no state dict shows it; it is saved as the
    callback's state.

    Args:
        distiller: The terms and the teacher.
        student: Dotted path of the student in the LightningModule; the module itself unless given.
        labels: How to get from a batch what losses need, by the name of their argument.
        task_weight: Factor of the module's own loss, or a schedule of it.
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
        super().__init__()
        path: object = student  # what a caller without a type checker may pass
        if not (path is None or isinstance(path, str)):
            raise TypeError(
                f"student is the dotted path of a module inside of the LightningModule, such as 'model', got "
                f"{type(path).__name__}. The student is the one that training_step calls."
            )
        self.distiller = distiller
        self.student = student
        self.labels = Labels(labels or {})
        self.task_weight = factor("task_weight", task_weight)
        if self.task_weight == 0 and not any(term.weight for _, term in distiller.named_terms()):
            raise ValueError("task_weight and every term's weight are 0: nothing would be learned.")
        self._all: list[Attachment] = [self]
        self._own_step: Callable[..., Any] | None = None
        self._pending: dict[str, Any] | None = None
        self._learned: list[nn.Parameter] = []
        self._put_modes_back: Callable[[], None] | None = None
        self._steps_done = 0
        self._ready = False
        self._was_called = False
        self._taught = False
        self._log = Log(prog_bar)
        self._moment = Moments()
        self._check = FiniteCheck()
        self._positions = Positions()
        self._patches = Patches()

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"_log": Log(self._log.prog_bar), "_positions": Positions(), "_patches": Patches()}
        of_a_fit = {"_ready": False, "_all": [], "_own_step": None, "_learned": [], "_put_modes_back": None}
        return {**self.__dict__, **fresh, **of_a_fit}

    @property
    def state_key(self) -> str:
        """What its state is called in a checkpoint; by its terms, so that a Trainer may have two of a kind."""
        return self._generate_state_key(terms=list(self.distiller.terms))

    # The hooks, in the order in which Lightning calls them.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wraps the module's methods, before its own ``setup`` and ``configure_model``."""
        if stage != "fit":
            return
        self._undo_all()
        if self is attachments_of(trainer)[0]:
            for name in [name for name in pl_module._modules if name.startswith(GUEST)]:
                delattr(pl_module, name)  # of the fit in which this copy of a module was taken
        forget_names(trainer.strategy)
        self._refuse(trainer, pl_module)
        self._all = attachments_of(trainer)
        training_step = pl_module.training_step
        # The user's own, whoever else is attached.
        self._own_step = training_step if self is self._all[0] else self._all[0]._own_step
        self._patches.replace(pl_module, "training_step", self._distilling(trainer, pl_module, training_step))
        if self.distiller.teacher.evaluated:  # for checkpoints of weights alone Lightning asks no callback
            self._patches.replace(pl_module, "on_save_checkpoint", self._saving(pl_module.on_save_checkpoint))
        self._patches.add(self._positions.watch(trainer, lambda: self.distiller.teacher))
        if self._has_parameters():
            # Made here, since the optimizer and the strategy's wrapper are made next. Not functools.wraps: Lightning
            # follows __wrapped__ and would find that the user's class has no configure_model.
            configure_model = pl_module.configure_model

            def configure_model_and_terms() -> None:
                configure_model()
                self._enter(trainer, pl_module)

            self._patches.replace(pl_module, "configure_model", configure_model_and_terms)
            self._patches.replace(pl_module, "configure_optimizers", self._optimizing(pl_module.configure_optimizers))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches terms that have no parameters, and brings the teacher to the student's device."""
        self._get_ready(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learns how long the run is, if a schedule has to know, and tells the teacher that it begins."""
        self._measure_run(trainer)
        student = self._student_in(pl_module)
        refuse_forgotten(trainer, student)
        learned = [name for name, part in self._learning() if learned_elsewhere(student, part)]
        if learned:
            raise ValueError(
                f"{type(self).__name__}: what the fit of another student taught {', '.join(dict.fromkeys(learned))} "
                "would be what this one begins with. Make new losses and terms, and a new callback or module of them, "
                "for each student and for each seed."
            )
        self._steps_done = trainer.global_step
        self._taught = False
        self.distiller.teacher.begin()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells the teacher, which may take turns or copies."""
        self.distiller.teacher.begin_epoch(self._moment(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Learns which samples the batch has."""
        self._positions.advance(batch_idx)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Lets the teacher follow the student once per optimizer step."""
        if trainer.global_step != self._steps_done:
            self._steps_done = trainer.global_step
            if not self._taught:
                self._taught = True
                self._note_pupil(self._student_in(pl_module))
            self.distiller.teacher.update(self._moment(trainer))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Logs the losses of the step; in a hook in which few modules log, and a name is logged once in each."""
        self._log.write(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets a teacher that is to be evaluated take the student's place."""
        if self.distiller.attached:
            self.distiller.teacher.swap()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the student its place back."""
        if self.distiller.attached:
            self.distiller.teacher.swap()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the student the weights that were evaluated."""
        self.distiller.teacher.end()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the weights that are evaluated into the checkpoint, and where the random numbers are."""
        self._put_weights(checkpoint)
        if trainer.world_size == 1:  # one process saves, and each has random numbers of its own
            checkpoint[KEY] = random_state()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        if stage == "fit":
            self._check.finish()
            self.leave(trainer)
        else:  # what was tested is not what the next fit begins with
            self._pending = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the module as it was after an interrupted fit, too; what was loaded for it is no other's."""
        self.leave(trainer)
        self._pending = None

    def state_dict(self) -> dict[str, Any]:
        """Returns what the terms learned and what the teacher remembers; nothing of a frozen one."""
        return self._with_freshness(saved(self.distiller)) if self._pending is None else self._pending

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores that, as soon as what it is restored to exists."""
        if self.distiller.attached and not self._needs_sample():
            self._restore(state_dict)
        else:
            self._pending = state_dict

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses to resume what cannot be resumed."""
        if not trainer.training:
            return
        if KEY in checkpoint and trainer.world_size == 1:
            # Now: a learning-rate schedule over the run asks for the data next, whose order is drawn then.
            set_random_state(checkpoint[KEY])
        keys = [each.state_key for each in attachments_of(trainer)]
        states = checkpoint.get("callbacks", {})
        refuse_other_order(states, keys)
        state = state_of(states, self.state_key, keys)
        refuse_other_run(self.distiller, state, type(self).__name__)
        if state and self.state_key not in states:  # other terms than then: Lightning would not find it
            self.load_state_dict(dict(state))

    # What they do.

    def _put_weights(self, checkpoint: dict[str, Any]) -> None:
        prefix = f"{self.student}." if self.student else ""
        weights = self.distiller.teacher.weights()
        if not any(isinstance(value, DTensor) for value in checkpoint["state_dict"].values()):
            weights = whole(weights)  # the strategy gathers what it writes into one file
        checkpoint["state_dict"].update({prefix + key: value for key, value in weights.items()})

    def _saving(self, on_save_checkpoint: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
        @functools.wraps(on_save_checkpoint)
        def save_what_is_evaluated(checkpoint: dict[str, Any]) -> None:
            self._put_weights(checkpoint)
            on_save_checkpoint(checkpoint)

        return save_what_is_evaluated

    def _refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses what cannot work, before anything is changed."""
        refuse_manual(pl_module)
        if self._has_parameters() or any(self.distiller.labels.values()):
            refuse_iterator(pl_module)
        refuse_strategy(trainer, self._has_parameters() or isinstance(self.distiller.teacher, CopyTeacher))
        if self._has_parameters():
            refuse_earlier_average(trainer, self)
            if self.student is None:
                refuse_copy_of_terms(pl_module, self, self.distiller.teacher)
        attached = attachments_of(trainer)
        refuse_two_swaps(trainer, [each for each in attached if each.distiller.teacher.evaluated])
        distillers = [each.distiller for each in attached]
        refuse_same_names(distillers)
        refuse_shared(distillers)
        if self is not attached[0] and self.task_weight != 1.0:
            raise ValueError(
                f"task_weight={self.task_weight} of {type(self).__name__}: the module's own loss has one weight, which "
                f"is for the first of the Trainer's callbacks that distil, {type(attached[0]).__name__}, to give."
            )

    def _get_ready(self, pl_module: LightningModule) -> None:
        if not self._ready:
            if not self.distiller.attached:  # as it is since configure_model, where a term had to see a sample
                self._attach(pl_module)
            for distiller in self._distillers:  # since then the strategy may have replaced layers (sync_batchnorm)
                distiller.refresh()
            self._move_parts(pl_module.device)
            self._ready = True

    def _measure_run(self, trainer: Trainer) -> None:
        self._moment.measure(trainer, self.distiller.needs_end or isinstance(self.task_weight, Schedule))

    def _needs_sample(self) -> bool:
        return self.distiller.needs_sample

    def _has_parameters(self) -> bool:
        return self._needs_sample() or any(True for _ in self.distiller.parameters())

    def _undo_all(self) -> None:
        self._ready = self._was_called = False
        self._learning_parameters().clear()
        self._patches.undo()

    def leave(self, trainer: Trainer) -> None:
        """Takes off what is attached, the outermost first."""
        for attachment in reversed(attachments_of(trainer)):
            attachment._undo_all()

    def _student_in(self, pl_module: LightningModule) -> nn.Module:
        return find_module(pl_module, self.student, "the LightningModule") if self.student else pl_module

    def _attach(self, pl_module: LightningModule) -> nn.Module:
        student = self._student_in(pl_module)
        if isinstance(self.distiller.teacher, CopyTeacher):
            refuse_lazy(lazy_in(student))
        self.distiller.attach(student)
        self._patches.add(self.distiller.detach)
        self._log.clear()
        if not self._needs_sample():
            self._restore_pending()
        return student

    def _restore_pending(self) -> None:
        if self._pending is not None:
            state, self._pending = self._pending, None
            self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        restore(self.distiller, state)
        self._note_pupil(None if state.get("fresh") else self.distiller.student)

    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        guest = f"{GUEST}_{self._all.index(self)}" if self is not self._all[0] else GUEST
        if hasattr(pl_module, guest):  # configure_model may be called more than once
            return
        student = self._attach(pl_module)
        if self._needs_sample():
            self._build(trainer, pl_module, student)
            self._restore_pending()
        learners = self._learners()
        refuse_lazy(lazy_in(learners), "what a term learns with, or student_input,")
        unshare(learners)
        shard_like(student, [part for distiller in self._distillers for part in distiller.parts()])
        self._host(pl_module, learners, guest)
        parameters = (p for distiller in self._distillers for p in distiller.parameters())
        self._learned = [p for p in parameters if p.requires_grad]
        self._put_modes_back = remember_modes(part for distiller in self._distillers for part in distiller.modules())
        if is_sharded(student):
            hosted = pl_module.get_submodule(guest)
            self._patches.add(lambda: keep_names(trainer.strategy, pl_module, guest, hosted))

    def _host(self, pl_module: LightningModule, learners: nn.Module, guest: str = GUEST) -> None:
        pl_module.add_module(guest, Guest(learners))
        self._patches.add(lambda: delattr(pl_module, guest))

    @property
    def _distillers(self) -> list[Distiller]:
        """What computes terms: one, unless several networks learn."""
        return [self.distiller]

    def _note_pupil(self, student: nn.Module | None) -> None:
        learned_with(student, [part for _, part in self._learning()])

    def _with_freshness(self, state: dict[str, Any]) -> dict[str, Any]:
        """Says in a state that is saved before the first step, by the tuner for one, that nothing was learned yet."""
        if state and not any(has_learned(part) for _, part in self._learning()):
            state["fresh"] = True
        return state

    def _learning(self) -> list[tuple[str, object]]:
        """Returns what a fit changes, by what it is called in a message."""
        return [*learns(self.distiller)]

    def _learners(self) -> nn.Module:
        """Returns what is trained with the module."""
        return self.distiller

    def _build(self, trainer: Trainer, pl_module: LightningModule, student: nn.Module) -> None:
        """Makes the terms' parameters from the shapes of two samples."""
        device = trainer.strategy.root_device
        # What the strategy does right after this, and what the rehearsal needs done before.
        trainer.precision_plugin.convert_module(pl_module).to(device)
        trainer.precision_plugin.convert_module(self.distiller)  # of which student_input is called, too
        self._move_parts(device)
        assert self._own_step is not None
        lazy = lazy_in(pl_module)
        calls = rehearse(trainer, pl_module, self._own_step, student, self.distiller, self._read)
        refuse_lazy(sorted({*lazy} - {*lazy_in(pl_module)}, key=lazy.index))
        refuse_uncalled(calls, self.student, pl_module)
        reshard(pl_module)  # no backward does it
        with random_numbers_restored():  # data order and dropout are those of the student trained alone
            self.distiller.build(calls[0])

    def _distilling(
        self, trainer: Trainer, pl_module: LightningModule, training_step: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Wraps ``training_step``."""

        @functools.wraps(training_step)
        def training_step_and_terms(*args: Any, **kwargs: Any) -> Any:
            if not trainer.training:  # many a validation_step calls training_step
                return training_step(*args, **kwargs)
            refuse_manual(pl_module)  # again: some say so in setup() or configure_optimizers() only
            if not self._ready:  # the tuner trains inside of another callback's on_fit_start, and calls no hooks
                self._get_ready(pl_module)
                self._measure_run(trainer)
            if not self._was_called:
                self._learning_parameters()
            self._begin_step(args, kwargs)
            of_batch = self._read(batch_of(args, kwargs))
            labels = functools.cache(lambda: of_batch(self.distiller.labels_of_losses))
            with self.distiller.watch(of_batch) as calls, without_guests(pl_module):
                result = training_step(*args, **kwargs)
            task_loss = result.get("loss") if isinstance(result, Mapping) else result
            if not isinstance(task_loss, Tensor):  # the module skips this batch, or Lightning says what is wrong
                return result
            if task_loss.numel() != 1:
                raise ValueError(
                    f"training_step returned a loss of shape {tuple(task_loss.shape)}, and a loss is one number: "
                    "reduce it, with .mean() for one."
                )
            refuse_uncalled(calls, self.student, pl_module, self._was_called)
            total = self._total(trainer, task_loss, calls, labels, args, kwargs)
            self._was_called = True
            if total is None:
                return None
            return {**result, "loss": total} if isinstance(result, Mapping) else total

        return training_step_and_terms

    def _read(self, batch: Any) -> LabelsOf:
        return self.labels.of(batch, self.distiller.labels, self._positions.current)

    def _total(
        self,
        trainer: Trainer,
        task_loss: Tensor,
        calls: list[Call],
        labels: Callable[[], Mapping[str, Any]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """Returns what a training step returns, the module's own loss and the terms; None skips the batch."""
        total, values = self._weigh(trainer, self.distiller, task_loss, calls, labels)
        if self is not self._all[0]:
            del values["train/task"]
        if self is self._all[-1]:
            values["train/loss"] = total.detach()
        self._log.values = values
        return total

    def _begin_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Is called before the module's own step, with its arguments."""

    def _weigh(
        self,
        trainer: Trainer,
        distiller: Distiller,
        task_loss: Tensor,
        calls: list[Call],
        labels: Callable[[], Mapping[str, Any]],
        name: str = "",
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Returns the total of the losses of one network, and what is logged of them."""
        moment = self._moment(trainer)
        distiller.at(moment)
        with waiting(trainer, distiller):
            losses = distiller(calls, **labels())
        if not self._was_called:
            warn_unlearned(trainer, distiller, losses)
        named = {name + key: loss for key, loss in losses.items()}
        self._check(trainer.global_step, named, lambda key: distiller.ranges(calls, key.removeprefix(name)), task_loss)
        weight = self.task_weight.at(moment) if isinstance(self.task_weight, Schedule) else self.task_weight
        if weight and not task_loss.requires_grad and bool(task_loss):  # 0 says that there is nothing to learn
            raise ValueError(
                "training_step returned a loss without a gradient, from which nothing is learned: something in it "
                "detaches, counts or compares. If the student is to learn from the teacher alone, say task_weight=0."
            )
        values: dict[str, Tensor | float] = {"task": task_loss, **losses, **distiller.values()}
        if isinstance(self.task_weight, Schedule):
            values["task/weight"] = weight
        logged = {f"{name}train/{key}": v.detach() if isinstance(v, Tensor) else v for key, v in values.items()}
        return weight * task_loss + distiller.total(losses), logged

    def _optimizing(self, configure_optimizers: Callable[[], Any]) -> Callable[[], Any]:
        """Wraps ``configure_optimizers`` so that the terms' parameters are optimized, however it is written."""

        @functools.wraps(configure_optimizers)
        def configure_optimizers_and_terms() -> Any:
            result = configure_optimizers()
            optimizers = list(optimizers_of(result))
            if optimizers:
                adopt(optimizers, self._learning_parameters())
            return result

        return configure_optimizers_and_terms

    def _learning_parameters(self) -> list[nn.Parameter]:
        """Returns what the terms learn, also where the module was frozen as a whole since they are in it."""
        if self._put_modes_back and any(not parameter.requires_grad for parameter in self._learned):
            self._put_modes_back()  # as they were before module.freeze()
        for parameter in self._learned:
            parameter.requires_grad_(True)
        return self._learned

    def _move_parts(self, device: torch.device) -> None:
        """Brings what computes beside the student to its device: what is in no module that Lightning moves."""
        for part in (*self.distiller.teaching(), *self._distillers):
            self._move(part, device)

    def _move(self, part: nn.Module, device: torch.device) -> None:
        # Of what it shares with the student, the student has moved its part.
        home = next((t.device for t in [*part.parameters(), *part.buffers()] if t.device != device), device)
        if home.type == "meta":
            raise ValueError(
                "the teacher has no weights: it is on the meta device. Load them first: model.to_empty(device='cpu'), "
                "then model.load_state_dict(...)."
            )
        if home != device:
            part.to(device)

            def undo() -> None:
                part.to(home)

            self._patches.add(undo)


def attachments_of(trainer: Trainer) -> list[Attachment]:
    """Returns what is attached to the module that a trainer trains, in the order of the callbacks."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, Attachment)]
