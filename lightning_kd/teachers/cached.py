"""Cached: a teacher that is asked once, and whose answers are read from disk."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler

from lightning_kd.caching.checks import checksum, differing, fingerprint, is_random
from lightning_kd.caching.packing import checked_storage, pack, put_together, take_apart, unpack
from lightning_kd.caching.shards import MOST, Shards, clean, in_words, kind_of, refuse_full, write_text
from lightning_kd.paths import expand_path
from lightning_kd.schedules import Moment
from lightning_kd.taps import Record
from lightning_kd.teachers.base import Teacher
from lightning_kd.teachers.ensemble import Ensemble
from lightning_kd.teachers.frozen import Frozen
from lightning_kd.wiring import describe

FORMAT = 1
FILE = "cache.json"
INPUT = "input"  # the checksums' name among the tensors; those of answers begin with a path and "#"


class AnsweredError(Exception):
    """Ends a step that was made for the teacher's answer alone."""


class Cached(Teacher):
    """A trained teacher that is asked once per sample; from then on its answers are read from disk.

    With a ``teacher`` the cache fills while the student learns: what is not there yet is asked of it, and written.
    Without one everything must be there, and no network is run, or even made. Answers are kept by the sample's position
    in the training data. So each sample must look the same in every epoch: where images are augmented at random, wrap
    the data set in ``lightning_kd.data.Replayed``. Once per epoch the inputs of a batch are compared with those that
    the teacher saw.

    A run is the same whether its answers were there or not: they are given as they are stored, in the first epoch too.

    Args:
        folder: Where the answers are, or will be; ``~`` and environment variables are filled in.
        teacher: The trained model, plain or LightningModule, or a ``Frozen`` or an ``Ensemble``.
        storage: How tensors are stored: ``"float16"``, ``"bfloat16"`` or ``"float32"``; ``"top20"`` keeps the 20
            largest log-probabilities of logits (B, C, ...) and spreads the rest evenly over the other classes. Or a
            dict of them by path, ``{"output": "top20"}``; other paths are float16.
        shard_size: Bytes of answers that are gathered before they are written, in one file.

    Raises:
        TypeError: If the teacher is none that stands still.
        ValueError: If an argument is out of range; when it is bound, if the cache is of another teacher, lacks a path
            or is damaged; in training, if the inputs are not those that the teacher saw.
        FileNotFoundError: When it is bound, if there is neither a cache nor a teacher.

    Source:
        To store what the teacher says of every crop, and read it in training: Shen and Xing, FKD, arXiv 2112.01528,
        as read in the authors' code (szq0214/FKD). There the crop's coordinates are stored beside it; here its seed
        follows from its position.

    Example:
        >>> import tempfile
        >>> teacher = Cached(tempfile.mkdtemp(), teacher=nn.Linear(4, 3), storage="float32")
        >>> teacher.bind(nn.Linear(4, 3), ["output"])
        >>> teacher.begin()
        >>> teacher.look({"position": [7, 3]})
        >>> teacher(torch.zeros(2, 4))["output"][0].shape
        torch.Size([2, 3])
    """

    labels: Mapping[str, bool] = {"position": False, "index": False}

    def __init__(
        self,
        folder: str | os.PathLike[str],
        teacher: nn.Module | None = None,
        storage: str | Mapping[str, str] = "float16",
        shard_size: int = 128 * 2**20,
    ) -> None:
        super().__init__()
        given: object = teacher  # what a caller without a type checker may pass
        if given is not None and not isinstance(given, nn.Module):
            raise TypeError(f"teacher is a trained model or None, got {describe(given)}.")
        if teacher is not None and not isinstance(teacher, Teacher):
            teacher = Frozen(teacher)
        still = isinstance(teacher, Frozen) and teacher.mode == "eval"
        if not (teacher is None or still or (isinstance(teacher, Ensemble) and teacher.learner is None)):
            raise TypeError(
                "A cache keeps what does not change: a trained model, teachers.Frozen in its mode 'eval' or an "
                f"Ensemble without a router; got {type(teacher).__name__}."
            )
        if shard_size <= 0:
            raise ValueError(f"shard_size is a number of bytes, got {shard_size!r}.")
        self.folder = Path(expand_path(folder))
        self.teacher = teacher
        self.storage = {k: checked_storage(v) for k, v in storage.items()} if isinstance(storage, Mapping) else {}
        self.default = "float16" if isinstance(storage, Mapping) else checked_storage(storage)
        self.shard_size = shard_size
        self.answers_only = False
        """Whether steps are made for the teacher's answers alone: the student does not run."""
        self._paths: list[str] = []
        self._samples = 0
        self._forget()

    def _forget(self) -> None:
        self._said: dict[str, Any] = {}
        self._shards: Shards | None = None
        self._labels: Mapping[str, Any] | None = None
        self._seen: Mapping[str, Any] | None = None
        self._pending: list[dict[str, Tensor]] = []
        self._begun = False
        self._unchecked = True
        self._stamp: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # as Frozen: what stands still needs no copy

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_paths": [], "_shards": None, "_labels": None, "_seen": None, "_pending": []}

    @property
    def still(self) -> nn.Module | None:
        """That of the teacher, if there is one."""
        return self.teacher.still if isinstance(self.teacher, Teacher) else None

    def root(self, student: nn.Module) -> nn.Module | None:
        """Returns the model of the teacher, if there is one."""
        return self.teacher.root(student) if isinstance(self.teacher, Teacher) else None

    def bind(self, student: nn.Module, paths: Collection[str]) -> None:
        """Opens the cache, and checks that it is of this teacher and has these paths."""
        self.unbind()
        self._paths = sorted(paths)
        if isinstance(self.teacher, Teacher):
            self.teacher.bind(student, paths)
        self._open()

    def unbind(self) -> None:
        """Writes what is not written yet, and closes the cache."""
        self._flush()
        if isinstance(self.teacher, Teacher):
            self.teacher.unbind()
        self._forget()

    def begin(self) -> None:
        """Is told that training begins: what was asked before was a rehearsal."""
        self._begun = True

    def begin_epoch(self, moment: Moment) -> None:
        """Writes what is not written yet, and reads what others have written."""
        self._flush()
        if self._shards is not None:
            self._shards.refresh()
        self._unchecked = True

    def end(self) -> None:
        """Writes what is not written yet."""
        self._flush()

    def look(self, labels: Mapping[str, Any]) -> None:
        """Learns which samples it will be asked of."""
        self._labels = labels

    def order(self, dataset: Any, batches: Any) -> Any:
        """Learns of the training data; where only answers are made, those that lack come in their order."""
        if self._shards is None:  # asked before it is bound, for the length of the run
            self._open(is_bound=bool(self._paths))
        self._samples = len(dataset)
        lacking = self.lacking(self._samples)
        if self.teacher is None and lacking:
            raise ValueError(
                f"The cache in {str(self.folder)!r} lacks {len(lacking)} of the {self._samples} training samples, "
                f"sample {lacking[0]} for one. Make the rest: `lightning-kd cache`, or Cached(folder, teacher=...)."
            )
        if lacking and is_random(dataset):
            raise ValueError(
                "The training data give another sample each time they are asked for the same one, so what the teacher "
                "says of it cannot be kept. Wrap the data set: lightning_kd.data.Replayed(dataset, views=4) fixes four "
                "views of each sample."
            )
        if not self.answers_only:
            return batches
        return BatchSampler(lacking or [0], batches.batch_size, drop_last=False)  # no data at all would be warned of

    def lacking(self, samples: int) -> list[int]:
        """Returns which of the first so many samples are not in the cache."""
        keys = torch.arange(samples)
        return keys.tolist() if self._shards is None else keys[~self._shards.has(keys)].tolist()

    def forward(self, *args: Any, **kwargs: Any) -> Record:
        """Returns the answers of the samples that ``look`` was told: from disk, or else of the teacher."""
        if not self._paths:
            raise RuntimeError("The teacher is not bound: call bind(student, paths) first.")
        device = next((x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), torch.device("cpu"))
        keys = self._keys()
        if keys is None:  # a rehearsal, of which only the shapes are read
            count = next((len(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim), 1)
            if self.teacher is not None or self._shards is None:
                return self._ask(args, kwargs)
            return self._read(self._shards.some(count), device)
        there = self._shards.has(keys) if self._shards is not None else torch.zeros(len(keys), dtype=torch.bool)
        if not bool(there.all()):
            return self._answer(keys, there, args, kwargs, device)
        if self.answers_only:
            raise AnsweredError
        if self._unchecked:
            self._refuse_other_inputs(keys, args, kwargs)
        return self._read(keys, device)

    def _ask(self, args: Any, kwargs: Any) -> Record:
        if self.teacher is None:
            raise ValueError(
                f"The cache in {str(self.folder)!r} lacks samples that this batch has. Make the rest: `lightning-kd "
                "cache`, or Cached(folder, teacher=...)."
            )
        with torch.no_grad():
            record: Record = self.teacher(*args, **kwargs)
        return record

    def _keys(self) -> Tensor | None:
        labels, self._labels = self._labels or {}, None
        found = labels.get("position")
        found = labels.get("index") if found is None else found
        if not self._begun:
            return None
        if found is None:
            raise ValueError(
                "teachers.Cached needs to know which samples a batch has. It is told by a DataLoader over a data set "
                "with a length; of other data the batch has to say it: Distillation(index=...), a function of the "
                "batch, its key or its index, or TaskAdapter.index."
            )
        if labels is self._seen:
            raise ValueError(
                "The student was called twice in one step, and the cache has one answer for each sample. Let the "
                "teacher run: it cannot be cached here."
            )
        self._seen = labels
        keys = torch.as_tensor(found)
        if keys.ndim != 1 or keys.is_floating_point() or keys.dtype == torch.bool or not len(keys):
            raise ValueError(f"The samples of a batch are whole numbers (B,), got {keys.dtype} {tuple(keys.shape)}.")
        keys = keys.cpu().long()
        if int(keys.min()) < 0 or int(keys.max()) >= MOST:
            raise ValueError(f"The numbers of samples are from 0 to {MOST - 1}, got {int(keys.min())} to {keys.max()}.")
        return keys

    def _answer(self, keys: Tensor, there: Tensor, args: Any, kwargs: Any, device: torch.device) -> Record:
        """Asks the teacher, and keeps what it said of samples that are not there."""
        record = self._ask(args, kwargs)
        said, rows = self._stored(record, len(keys))
        rows[INPUT] = checksum((args, kwargs), len(keys))
        if not self._said:
            self._create(said, rows)
        if {**self._said, **said} != self._said or self._kinds(rows) != self._said["rows"]:
            raise ValueError(
                "The teacher's answers have not one shape: "
                f"{self._said['rows']} before, {self._kinds(rows)} now. A cache keeps samples of equal shape: bring "
                "the images to one size in the data set, tap a layer that is pooled, or let the teacher run."
            )
        new = ~there
        self._pending.append({"keys": keys[new], **{name: row.cpu()[new] for name, row in rows.items()}})
        if sum(row.nbytes for rows in self._pending for row in rows.values()) >= self.shard_size:
            self._flush()
        if self.answers_only:
            raise AnsweredError
        return self._made(rows, device)

    def _stored(self, record: Record, count: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns what is said of a record in the cache's file, and its tensors as they are stored."""
        forms: dict[str, Any] = {}
        specs: dict[str, Any] = {}
        rows: dict[str, Tensor] = {}
        for path in self._paths:
            found: dict[str, Tensor] = {}
            forms[path] = take_apart(record[path], f"{path}#", found)
            storage = self.storage.get(path, self.default)
            for name, tensor in found.items():
                if not tensor.ndim or len(tensor) != count:
                    raise ValueError(
                        f"The teacher's {path!r} is {tuple(tensor.shape)} and the batch has {count} samples: a cache "
                        "keeps what has the samples in its first dimension. Tap another module, or let the teacher run."
                    )
                dtype = str(tensor.dtype).removeprefix("torch.")
                specs[name] = {"storage": storage, "shape": list(tensor.shape[1:]), "dtype": dtype}
                rows |= {name + suffix: part.contiguous() for suffix, part in pack(tensor, storage, path).items()}
        return {"forms": forms, "tensors": specs}, rows

    def _made(self, rows: Mapping[str, Tensor], device: torch.device) -> Record:
        """Returns the record of rows as they are stored."""

        def tensor(name: str) -> Tensor:
            spec = self._said["tensors"][name]
            parts = {key: rows[name + key] for key in ("", ".top", ".class", ".tail") if name + key in rows}
            moved = {key: part.to(device, non_blocking=True) for key, part in parts.items()}
            return unpack(moved, spec["storage"], spec)

        return {path: put_together(self._said["forms"][path], tensor) for path in self._paths}

    def _read(self, keys: Tensor, device: torch.device) -> Record:
        assert self._shards is not None
        of_paths = tuple(f"{path}#" for path in self._paths)  # the cache may have more
        tapped = [name for name in self._shards.rows if name.startswith(of_paths)]
        return self._made(self._shards.read(keys, tapped, pinned=device.type == "cuda"), device)

    def _kinds(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: list(kind_of(tensor)) for name, tensor in sorted(rows.items())}

    def _refuse_other_inputs(self, keys: Tensor, args: Any, kwargs: Any) -> None:
        assert self._shards is not None
        self._unchecked = False
        now = checksum((args, kwargs), len(keys))
        differ = differing(now, self._shards.read(keys, [INPUT])[INPUT])
        if bool(differ.any()):
            raise ValueError(
                f"Sample {int(keys[differ][0])}, and {int(differ.sum()) - 1} more of the {len(keys)} samples in this "
                f"batch, are not what the teacher saw when the cache in {str(self.folder)!r} was made. The data or "
                "their preprocessing changed: make another cache. Or they are augmented at random: wrap the data set "
                "in lightning_kd.data.Replayed, and augment nothing after it, on the device or by mixing samples."
            )

    # The files.

    def _fingerprint(self) -> str:
        assert self.teacher is not None
        self._stamp = self._stamp or fingerprint(self.teacher)
        return self._stamp

    def _open(self, is_bound: bool = True) -> None:
        file = self.folder / FILE
        if not file.is_file():
            if self.teacher is None:
                raise FileNotFoundError(
                    f"No cache of a teacher in {str(self.folder)!r} (looked from {os.getcwd()!r}). Make it: "
                    "`lightning-kd cache`, or Cached(folder, teacher=...), which fills it while the student learns."
                )
            return
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            written = said["format"]
            of, has = said["teacher"], said["forms"]
            rows = {name: (shape, dtype) for name, (shape, dtype) in said["rows"].items()}
            stored = {path: _storages(said["tensors"], path) for path in has}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}): delete the folder, and make the cache again.") from error
        if written != FORMAT:
            raise ValueError(
                f"The cache in {str(self.folder)!r} has format {written!r}, and this version reads {FORMAT}."
            )
        if is_bound and self.teacher is not None and of != self._fingerprint():
            raise ValueError(
                f"The cache in {str(self.folder)!r} is of another teacher: weights, layers or settings differ. Name "
                "another folder, or delete this one."
            )
        absent = [path for path in self._paths if path not in has]
        if absent:
            raise ValueError(
                f"The cache in {str(self.folder)!r} has no {absent[0]!r}; it has {', '.join(map(repr, has))}. A cache "
                "keeps what is tapped when it is made: make another, with this term."
            )
        other = [p for p in self._paths if not stored[p] <= {self.storage.get(p, self.default)}]
        if self.teacher is not None and other:
            raise ValueError(
                f"The cache in {str(self.folder)!r} stores {other[0]!r} as {', '.join(stored[other[0]])}, and not as "
                f"{self.storage.get(other[0], self.default)!r}. Name another folder, or delete this one."
            )
        self._said = said
        self._shards = Shards(self.folder, of, rows)

    def _create(self, said: dict[str, Any], rows: Mapping[str, Tensor]) -> None:
        assert self.teacher is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        clean(self.folder)
        size = 8 + sum(tensor.nbytes / len(tensor) for tensor in rows.values())  # with the sample's number
        if self._samples:
            refuse_full(self.folder, size * self._samples)
            print(f"teacher cache: {self._samples} samples of {in_words(size)} each, {in_words(size * self._samples)}")
        about = {"format": FORMAT, "teacher": self._fingerprint(), **said, "rows": self._kinds(rows)}
        if not (self.folder / FILE).is_file():
            write_text(self.folder / FILE, json.dumps(about, indent=1))
        self._open()  # another process may have been faster

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if pending and self._shards is not None:
            names = [name for name in pending[0] if name != "keys"]
            rows = {name: torch.cat([each[name] for each in pending]) for name in names}
            self._shards.write(torch.cat([each["keys"] for each in pending]), rows)


def _storages(tensors: Mapping[str, Any], path: str) -> set[str]:
    return {spec["storage"] for name, spec in tensors.items() if name.startswith(f"{path}#")}
