"""A rehearsal: the shapes that projectors have to bridge, from the student's first call on two samples."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torchmetrics import Metric

from lightning_kd.attachment.random_state import random_numbers_restored
from lightning_kd.distiller import Distiller
from lightning_kd.teachers.stillness import remember_modes
from lightning_kd.watching import Call, LabelsOf


def rehearse(
    trainer: Trainer,
    pl_module: LightningModule,
    training_step: Callable[..., Any],
    student: nn.Module,
    distiller: Distiller,
    labels: Callable[[Any], LabelsOf],
) -> list[Call]:
    """Runs ``training_step`` on two samples until the student has returned; nothing is changed by it.

    Random numbers, buffers, training modes and logs are as before, and the rest of the step never runs.

    Args:
        trainer: The trainer of the fit that is about to begin.
        pl_module: The user's module, on its device.
        training_step: The module's own.
        student: The student inside of it, to which the distiller is attached.
        distiller: The distiller.
        labels: Gives what there is of a batch, by name, when asked.

    Returns:
        The student's first call, or none if the step made none.
    """

    def first_call() -> list[Call]:
        calls: list[Call] = []
        with ExitStack() as stack:
            stack.enter_context(random_numbers_restored())
            stack.enter_context(state_restored(pl_module))
            stack.enter_context(state_restored(distiller.teacher))  # which may be in training mode
            stack.enter_context(state_restored(distiller))  # in which student_input is
            stack.enter_context(_silent(pl_module))
            # Hooks that a compiled module meets only later would never fire.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(student.register_forward_hook(_end_rehearsal).remove)
            loader = training_data(trainer)
            batch = first_samples(trainer, pl_module, loader)
            stack.enter_context(_data_told(trainer, loader))
            stack.enter_context(trainer.precision_plugin.train_step_context())
            calls = stack.enter_context(distiller.watch(labels(batch)))
            with_index = is_param_in_hook_signature(training_step, "batch_idx", min_args=2)
            with suppress(_RehearsalEndedError):
                training_step(batch, *([0] if with_index else []))
        return calls

    with suppress(Exception):
        return first_call()
    try:
        with _optimizers(trainer):  # some steps ask for them before they call the student
            return first_call()
    except Exception as error:
        error.add_note(
            "This happened in a rehearsal of training_step on two samples, made to learn the shapes that "
            "projectors have to bridge. A term whose projector= is given needs none."
        )
        raise


@contextmanager
def _data_told(trainer: Trainer, loader: Any) -> Iterator[None]:
    """Tells a step that asks how long the run is; to have the loop prepare its data now would take random numbers."""
    loop, limit = trainer.fit_loop, trainer.limit_train_batches
    before = loop._combined_loader, loop.max_batches
    combined = loader if hasattr(loader, "flattened") else CombinedLoader(loader, "max_size_cycle")
    lengths = [_length(trainer, each) for each in combined.flattened]
    batches = min(lengths) if combined._mode == "min_size" else max(lengths)
    if isinstance(limit, int):
        batches = min(batches, limit)
    elif batches < math.inf:
        batches = int(batches * limit)
    try:
        loop._combined_loader, loop.max_batches = combined, batches
        yield
    finally:
        loop._combined_loader, loop.max_batches = before


def _length(trainer: Trainer, loader: Any) -> float:
    """Returns how many batches a loader gives, in each process; infinitely many where nobody knows."""
    length = sized_len(loader)
    if length is None:
        return math.inf
    if not isinstance(loader, DataLoader) or not loader.batch_size:
        return length
    if not trainer._data_connector._requires_distributed_sampler(loader):
        return length
    sampler: Any = loader.sampler
    samples = math.ceil(len(sampler) / trainer.world_size)  # each process gets as many
    return samples // loader.batch_size if loader.drop_last else math.ceil(samples / loader.batch_size)


@contextmanager
def _optimizers(trainer: Trainer) -> Iterator[None]:
    """Makes the optimizers and schedulers for a while, as Lightning does after this."""
    strategy = trainer.strategy
    before = strategy.optimizers, strategy.lr_scheduler_configs
    try:
        strategy.setup_optimizers(trainer)
        yield
    finally:
        strategy.optimizers, strategy.lr_scheduler_configs = before


def training_data(trainer: Trainer) -> Any:
    """Returns the training data as the user gave them."""
    # The one place where Lightning keeps the loader before the loop makes it, whichever way it was given.
    return trainer.fit_loop._data_source.dataloader()


def first_samples(trainer: Trainer, pl_module: LightningModule, loader: Any) -> Any:
    """Returns a small training batch on the student's device, in the format of the module's own batches.

    No worker is started, and no sampler of torch's that counts is asked; others are asked for one batch, and their
    generators put back. An iterable data set gives its first batch.
    """
    batch = trainer.precision_plugin.convert_input(_small_batch(loader))
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _small_batch(loader: Any) -> Any:
    if isinstance(loader, CombinedLoader):
        return _small_batch(loader.iterables)
    if isinstance(loader, Mapping):
        return {key: _small_batch(value) for key, value in loader.items()}
    if isinstance(loader, (list, tuple)):
        return [_small_batch(value) for value in loader]
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return _of_indices(loader)
    if isinstance(loader, Iterator):
        raise ValueError(
            "The training data is an iterator, which can be read only once, and projectors need a batch of it before "
            "the fit: it would be lost. Pass a DataLoader or another iterable that can be read again, or give the "
            "terms their projector=."
        )
    return next(iter(loader))


def _of_indices(loader: DataLoader[Any]) -> Any:
    """Returns a batch of a data set that is asked for samples, in this process."""
    dataset: Any = loader.dataset
    if isinstance(loader.sampler, (SequentialSampler, RandomSampler, DistributedSampler)) and (
        type(loader.batch_sampler) is BatchSampler
    ):
        keys: Any = list(range(min(2, len(dataset))))
        if not keys:
            raise ValueError("The training data is empty, so that nothing can be learned.")
    else:  # which may give keys of any kind
        sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        with _generators_restored(loader, loader.sampler, sampler, getattr(sampler, "sampler", None)):
            keys = next(iter(sampler))
    if loader.batch_sampler is None:
        return loader.collate_fn(dataset[keys])
    many = getattr(dataset, "__getitems__", None)
    return loader.collate_fn(many(keys) if many else [dataset[key] for key in keys])


@contextmanager
def _generators_restored(*owners: Any) -> Iterator[None]:
    """Puts back the random numbers of samplers that have generators of their own."""
    generators = [g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class _RehearsalEndedError(Exception):
    """Ends the rehearsal once the student has returned."""


def _end_rehearsal(module: nn.Module, args: Any, output: Any) -> None:
    if torch.is_grad_enabled():
        raise _RehearsalEndedError


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    pass


@contextmanager
def _silent(pl_module: LightningModule) -> Iterator[None]:
    """Lets a module's ``log`` calls do nothing."""
    names = ("log", "log_dict")
    own = {name: vars(pl_module)[name] for name in names if name in vars(pl_module)}
    for name in names:
        setattr(pl_module, name, _log_nothing)
    try:
        yield
    finally:
        for name in names:
            delattr(pl_module, name)
        vars(pl_module).update(own)


@contextmanager
def state_restored(module: nn.Module) -> Iterator[None]:
    """Puts BatchNorm statistics and other buffers back, training modes, and what metrics have counted."""
    restore_modes = remember_modes(module.modules())  # some networks freeze a part in their forward
    buffers_of = [part._buffers for part in module.modules() if isinstance(part._buffers, dict)]  # not TorchScript's
    held = [(buffers, dict(buffers)) for buffers in buffers_of]
    saved = [(buffer, buffer.detach().clone()) for buffer in module.buffers() if not is_lazy(buffer)]
    metrics = [(part, _counted(part)) for part in module.modules() if isinstance(part, Metric)]
    try:
        yield
    finally:
        restore_modes()
        for metric, counted in metrics:
            for name, value in counted.items():
                setattr(metric, name, value)
        with torch.no_grad():
            for buffer, value in saved:
                if buffer.shape != value.shape:  # observers of quantization grow with their first input
                    buffer.resize_(value.shape)
                if _differ(buffer, value):  # some cannot be written into: expanded ones, and those of a file
                    buffer.copy_(value)
        for buffers, before in held:
            buffers.update(before)  # of which a forward may have made others


def _differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    try:
        return not torch.equal(a, b)
    except (NotImplementedError, RuntimeError):  # sparse ones and complex32, for some, are not compared
        return True


def _counted(metric: Metric) -> dict[str, Any]:
    own = [name for name, value in vars(metric).items() if isinstance(value, torch.Tensor)]  # of some wrappers
    names = (*metric._defaults, *own, "_update_count", "_computed")
    return {name: copy.deepcopy(getattr(metric, name)) for name in names}
