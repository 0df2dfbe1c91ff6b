"""Taps: named outputs of named modules, captured by forward hooks and cleared on read."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_kd.copying import lend
from lightning_kd.holding import SINGLE, copy_holders
from lightning_kd.overwriting import overwritten, tensors_in, versions_of
from lightning_kd.wiring import OUTPUT, Path, find_module

Record = dict[str, list[Any]]
"""For each tapped path what its module returned, once per call of that module."""


class Taps:
    """Captures the outputs of a model's modules while a record is open.

    Args:
        root: The model.
        paths: Module paths (``Path.module``); ``"output"`` is the model's own output.
        owner: What the model is called in error messages.
        stop_early: Whether ``run`` may leave out the layers behind the deepest tap.

    Raises:
        ValueError: If a path is unknown; the message lists the closest names.
    """

    def __init__(self, root: nn.Module, paths: Iterable[str], owner: str, stop_early: bool = True) -> None:
        self.root = root
        self.stop_early = stop_early
        self.owner = owner
        self._modules = self._found(paths)
        self._record: Record | None = None
        self._captured: list[tuple[str, Any, dict[int, int]]] = []
        self._called_once = False
        self._stop_after: int | None = None
        self._undo: list[Callable[[], None]] = []

    def _found(self, paths: Iterable[str]) -> dict[str, nn.Module]:
        return {
            path: self.root if path == OUTPUT else find_module(self.root, path, self.owner)
            for path in dict.fromkeys(paths)
        }

    def refresh(self) -> None:
        """Goes over to what has taken the place of a module since it was attached: synchronised BatchNorm, for one."""
        found = self._found(self._modules)
        if any(found[path] is not module for path, module in self._modules.items()):
            self.detach()
            self._modules = found
            self.attach()

    def attach(self) -> None:
        """Registers the hooks; what was compiled of the model without them is forgotten."""
        if _has_compiled(self.root):
            torch.compiler.reset()
        for path, module in self._modules.items():
            if path != OUTPUT:
                self._undo += [module.register_forward_hook(self._hook(path, module)).remove, lend(module)]

    def detach(self) -> None:
        """Removes every hook and forgets every tensor."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._record = None
        self.forget()

    def _hook(self, path: str, tapped: nn.Module) -> Any:
        def capture(module: nn.Module, args: Any, output: Any) -> None:
            # A deep copy of the model (weight averaging makes one) carries this hook along: it is not ours.
            if self._record is None or not (module is tapped or _stands_for(module, tapped)):
                return
            self._capture(self._record, path, output)
            if self._stop_after is not None:
                self._stop_after -= 1
                if self._stop_after == 0:
                    raise _AllCapturedError

        return capture

    def _capture(self, record: Record, path: str, output: Any) -> None:
        if torch.compiler.is_compiling():
            if all(leaf is None or isinstance(leaf, (Tensor, *SINGLE)) for leaf in tree_leaves(output)):
                # A graph knows no versions to check: what a later layer overwrites is kept in a copy.
                record[path].append(tree_map_only(Tensor, torch.clone, output))
            else:
                self._capture_eagerly(record, path, output)
            return
        output = copy_holders(output)  # a later layer, or the step, may exchange what is in there
        record[path].append(output)
        self._captured.append((path, output, versions_of(output)))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own gap
    def _capture_eagerly(self, record: Record, path: str, output: Any) -> None:
        self._capture(record, path, output)

    @property
    def recording(self) -> bool:
        """Whether a record is open."""
        return self._record is not None

    def open(self) -> Record:
        """Opens a record, which the hooks fill until it is closed."""
        record: Record = {path: [] for path in self._modules}
        self._record = record
        return record

    def close(self, output: Any = None) -> None:
        """Closes the record, with the model's own output."""
        if self._record is not None and OUTPUT in self._record:
            self._capture(self._record, OUTPUT, output)
        self._record = None

    def forget(self) -> None:
        """Forgets what was captured, after a step that failed."""
        self._captured.clear()

    def check(self, read: Iterable[Path] | None = None) -> None:
        """Refuses captured tensors that a later layer has overwritten, and forgets them.

        Args:
            read: What is read of the captured outputs; everything unless given. A model's user may well overwrite
                what is not: ``out.loss /= 2``.

        Raises:
            RuntimeError: If a tapped output was modified in place after it was captured.
        """
        captured, self._captured = self._captured, []
        for path, output, versions in captured:
            if overwritten(output if read is None else list(_selected(output, path, read)), versions):
                raise RuntimeError(
                    f"The output of {path!r} in {self.owner} was modified in place after it was computed (by an "
                    "activation with inplace=True, for one), so its values are gone. Tap the layer that modifies it "
                    "instead, or make it inplace=False."
                )

    def run(self, *args: Any, **kwargs: Any) -> Record:
        """Calls the model and returns what was captured.

        The model runs only as far as its deepest tapped layer once it is known, from an earlier complete
        run, that each tapped layer is called exactly once and that the model's own output is not asked for.
        """
        record = self.open()
        may_stop = self.stop_early and self._called_once and OUTPUT not in record
        self._stop_after = len(self._modules) if may_stop else None
        output = None
        try:
            output = self.root(*args, **kwargs)
            self._called_once = all(len(calls) == 1 for path, calls in record.items() if path != OUTPUT)
        except _AllCapturedError:
            pass
        except BaseException:
            self.forget()
            raise
        finally:
            self.close(output)
            self._stop_after = None
        self.check()
        return record


def _selected(output: Any, module: str, read: Iterable[Path]) -> Iterator[Tensor]:
    for path in read:
        if path.module == module:
            try:
                yield from tensors_in(path.select(output))
            except KeyError:  # reported with the name of its term when that is computed
                continue


def _stands_for(module: nn.Module, tapped: nn.Module) -> bool:
    """Whether torch.export has put a proxy in a module's place: it has the same attributes, in one dictionary."""
    return torch.compiler.is_exporting() and vars(module) is vars(tapped)


def _has_compiled(model: nn.Module) -> bool:
    """Whether something of the model is compiled: what ran before would never call hooks that came after."""
    return any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in model.modules())


class _AllCapturedError(BaseException):
    """Ends a forward pass whose remaining layers nobody reads; no model's own ``except Exception`` is to catch it."""
