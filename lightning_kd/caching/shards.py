"""Shards: rows of tensors by key, in files that are complete or absent."""

import os
import shutil
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEYS = "keys"
ENDING = ".safetensors"
PART = ".part"
STALE = 3600.0
"""After so many seconds what a killed writer left is deleted; no shard takes as long to write."""

MOST = 2**31
"""Keys are below this: positions are kept in a table as long as the largest key."""


class Shards:
    """A folder of shards, each a file of safetensors with a tensor ``keys`` and others with as many rows.

    A shard is written beside its place and then moved there, so that it is complete or absent whatever happens to the
    writer. Any number of processes may write: their shards have names of their own, and of a key that is in two
    shards either is taken. Files are mapped into memory: only rows that are read are loaded.

    Args:
        folder: Where they are.
        stamp: What every shard says of itself; another one's is refused.
        rows: Of each tensor that is asked for, the shape of a row and the type, as safetensors name it.
    """

    def __init__(self, folder: Path, stamp: str, rows: Mapping[str, tuple[Sequence[int], str]]) -> None:
        self.folder = folder
        self.stamp = stamp
        self.rows = dict(rows)
        self._open: list[dict[str, Tensor]] = []
        self._names: set[str] = set()
        self._shard = torch.empty(0, dtype=torch.int32)
        self._row = torch.empty(0, dtype=torch.int32)
        self.refresh()

    def refresh(self) -> None:
        """Opens the shards that came since.

        Raises:
            ValueError: If a shard is damaged, or belongs to another cache.
        """
        for path in sorted(self.folder.glob(f"*{ENDING}")):
            if path.name not in self._names:
                self._add(path)
                self._names.add(path.name)

    def _add(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                stamp = (file.metadata() or {}).get("stamp")
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
                shapes = {name: (rows.get_shape(), rows.get_dtype()) for name, rows in slices.items()}
                count = shapes[KEYS][0][0]
                wanted = {name: ([count, *shape], dtype) for name, (shape, dtype) in self.rows.items()}
                wrong = [name for name in wanted if shapes.get(name) != wanted[name]]
                if stamp != self.stamp or wrong:
                    why = (
                        f"{wrong[0]!r} is {shapes.get(wrong[0])} and not {wanted[wrong[0]]}" if wrong else "its teacher"
                    )
                    raise ValueError(
                        f"The shard {path} belongs to another cache ({why}). Move it away: its samples are then asked "
                        "of the teacher again."
                    )
                tensors = {name: file.get_tensor(name) for name in (KEYS, *self.rows)}
        except (SafetensorError, KeyError, IndexError, OSError) as error:
            raise ValueError(
                f"The shard {path}, {path.stat().st_size} bytes, is damaged ({error}): the disk lost something, or a "
                "copy of the folder was cut short. Delete it: its samples are then asked of the teacher again."
            ) from error
        keys = tensors.pop(KEYS)
        self._grow(int(keys.max()) + 1 if len(keys) else 0)
        self._shard[keys] = len(self._open)
        self._row[keys] = torch.arange(len(keys), dtype=torch.int32)
        self._open.append(tensors)

    def _grow(self, size: int) -> None:
        more = size - len(self._shard)
        if more > 0:
            self._shard = torch.cat([self._shard, torch.full((more,), -1, dtype=torch.int32)])
            self._row = torch.cat([self._row, torch.zeros(more, dtype=torch.int32)])

    def has(self, keys: Tensor) -> Tensor:
        """Returns which of the keys are there."""
        known = keys < len(self._shard)
        return known & (self._shard[keys.where(known, 0)] >= 0) if len(self._shard) else known

    def __len__(self) -> int:
        return int((self._shard >= 0).sum())

    def some(self, count: int) -> Tensor:
        """Returns so many keys that are there, of which any may be the same.

        Raises:
            ValueError: If none is there.
        """
        if not len(self):
            raise ValueError(
                f"The cache in {str(self.folder)!r} is empty: no sample was written before it was stopped."
            )
        return (self._shard >= 0).nonzero().squeeze(1)[:1].expand(count)

    def read(self, keys: Tensor, names: Collection[str] | None = None, pinned: bool = False) -> dict[str, Tensor]:
        """Returns the rows of keys that are there, in their order.

        Args:
            keys: The keys.
            names: Of which tensors; of all unless given.
            pinned: Whether the rows are to be in pinned memory, from which a GPU fetches them while the host goes on.
        """
        shards, rows = self._shard[keys], self._row[keys].long()
        found = [(number, (shards == number).nonzero().squeeze(1)) for number in set(shards.tolist())]
        made = {}
        for name in self.rows if names is None else names:
            first = self._open[found[0][0]][name]
            made[name] = first.new_empty((len(keys), *first.shape[1:]), pin_memory=pinned)
            for number, places in found:
                tensor = self._open[number][name]
                if len(found) == 1:  # no second copy; and it takes half the time of tensor[rows]
                    torch.index_select(tensor, 0, rows, out=made[name])
                else:
                    made[name].index_copy_(0, places, tensor.index_select(0, rows[places]))
        return made

    def write(self, keys: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Writes a shard, and opens it.

        Raises:
            OSError: If the disk is full; nothing is left of the shard.
        """
        path = self.folder / f"{uuid.uuid4().hex}{ENDING}"
        part = path.with_suffix(PART)
        refuse_full(self.folder, sum(tensor.nbytes for tensor in rows.values()))
        part.touch()
        mode = part.stat().st_mode  # as the user's umask has it; safetensors lets nobody else read
        try:
            save_file({KEYS: keys, **rows}, part, metadata={"stamp": self.stamp})
            part.chmod(mode)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        self.refresh()


def refuse_full(folder: Path, size: float) -> None:
    """Raises ``OSError`` where there is no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            f"The teacher's cache needs {in_words(size)} more in {str(folder)!r}, and {in_words(free)} are free there. "
            "Store less (storage='float16', 'top20' for logits, fewer taps), or name a folder on another disk."
        )


def in_words(size: float) -> str:
    """Returns a number of bytes as text.

    Example:
        >>> in_words(1_500_000)
        '1.5 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def clean(folder: Path) -> None:
    """Deletes what killed writers left."""
    for part in folder.glob(f"*{PART}"):
        try:
            if time.time() - part.stat().st_mtime > STALE:
                part.unlink()
        except FileNotFoundError:  # another process was faster
            continue


def write_text(path: Path, text: str) -> None:
    """Writes a small file, complete or not at all."""
    part = path.with_name(f"{uuid.uuid4().hex}{PART}")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def kind_of(tensor: Tensor) -> tuple[list[int], str]:
    """Returns the shape of a row and the type of a tensor, as safetensors name it."""
    return list(tensor.shape[1:]), _NAMES[tensor.dtype]


_NAMES: dict[Any, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
