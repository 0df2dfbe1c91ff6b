"""Positions: which samples of the data set a training batch has, noted of the sampler that chose them."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_kd.teachers import Teacher


class Positions:
    """Notes what a trainer's training loader draws, in order; batches arrive in the order in which they were drawn.

    Nothing is noted of data without a length or that makes whole batches, of other loaders than torch's, and of
    several loaders at once.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forgets everything."""
        self.current: list[int] | None = None
        """Those of the batch of now, or None where they are not known."""
        self._drawn: deque[list[int]] = deque()
        self._last: int | None = None
        self._loaders: list[DataLoader[Any]] = []
        self._begun = False

    def watch(self, trainer: Trainer, teacher: Callable[[], Teacher]) -> Callable[[], None]:
        """Watches the loaders that the trainer is about to prepare; returns what ends that.

        Args:
            trainer: The trainer.
            teacher: Gives the teacher of then, which may have a say in the order of the samples.
        """
        strategy = trainer.strategy
        prepare = strategy.process_dataloader
        undone: list[Callable[[], None]] = []

        def prepare_and_note(dataloader: object) -> object:
            made = prepare(dataloader)
            if trainer.training and "position" in teacher().labels:
                undone.append(self._note(made, teacher()))
            return made

        def undo() -> None:
            vars(strategy).pop("process_dataloader", None)
            for each in reversed(undone):
                each()
            self.forget()

        strategy.process_dataloader = prepare_and_note  # type: ignore[method-assign]  # for the length of a fit
        return undo

    def _note(self, loader: object, teacher: Teacher) -> Callable[[], None]:
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:  # its data set makes whole batches
            return _nothing
        if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
            return _nothing
        if self._begun:  # prepared anew, after an epoch
            self._loaders, self._begun = [], False
        self._loaders = [each for each in self._loaders if each is not loader] + [loader]
        before: Any = loader.batch_sampler
        if isinstance(before, _Noted) and before.positions is self:  # a loader that is prepared anew
            before = before.batches
        chosen = teacher.order(loader.dataset, before)
        # A loader refuses such a change by __setattr__, since it may have begun; this one has not.
        object.__setattr__(loader, "batch_sampler", _Noted(chosen, self))
        return lambda: object.__setattr__(loader, "batch_sampler", before)

    def begin(self) -> None:
        """Is told that the sampler begins anew."""
        self._drawn.clear()
        self._last = None
        self._begun = True

    def drew(self, batch: Any) -> None:
        """Is told what the sampler drew."""
        self._drawn.append(list(batch))

    def advance(self, batch_idx: int) -> None:
        """Is told that a batch begins; a batch that was None is skipped, and only counted."""
        steps = 1 if self._last is None else max(batch_idx - self._last, 1)
        self._last = batch_idx
        self.current = None
        for _ in range(min(steps, len(self._drawn))):
            self.current = self._drawn.popleft()
        if len(self._loaders) > 1:
            self.current = None


def _nothing() -> None:
    pass


class _Noted:
    """A sampler whose draws are noted; else it is what it wraps."""

    def __init__(self, batches: Any, positions: Positions) -> None:
        self.batches = batches
        self.positions = positions

    def __iter__(self) -> Iterator[Any]:
        self.positions.begin()
        for batch in self.batches:
            self.positions.drew(batch)
            yield batch

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name == "batches":  # before __init__, when it is unpickled
            raise AttributeError(name)
        return getattr(self.batches, name)
