"""mmdet's detectors by their configuration files: what a configuration of this library can write."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_kd.extras import late_import
from lightning_kd.models import mmcv_ext
from lightning_kd.paths import expand_path
from lightning_kd.teachers.weights import load_weights


class MMDetModel(nn.Module):
    """Makes a detector of mmdet 3 from one of its configuration files: mmdet's own class, a plain module.

    Of the file only ``model`` is read; data, schedules and hooks are Lightning's, and so is synchronised batch norm,
    ``Trainer(sync_batchnorm=True)``: what the file has of it is made plain. Nothing is downloaded: a backbone
    whose file asks for pretrained weights starts from random ones, and is then neither frozen nor in evaluation mode,
    unless ``weights`` or ``pretrained`` say otherwise.

    Args:
        config: The file, a path or a name in mmdet's wheel: ``retinanet/retinanet_r18_fpn_1x_coco``. It is Python, and
            runs as such.
        num_classes: Number of classes, set in every head; as the file has it unless given.
        overrides: What differs from the file, by dotted name below ``model``: ``{"backbone.depth": 18}``.
        weights: File with the weights to start from: a state dict, or a checkpoint of mmengine or Lightning. Read as
            data, never as code.
        pretrained: Whether mmengine may download the weights that the file asks for.

    Raises:
        ModuleNotFoundError: Without mmdet.
        ValueError: If there is no such file, or it has no detector, or an override names code.

    Example:
        >>> model = MMDetModel("retinanet/retinanet_r18_fpn_1x_coco", num_classes=3)
        >>> type(model).__module__, model.bbox_head.num_classes
        ('mmdet.models.detectors.retinanet', 3)

    Source: Chen et al., MMDetection, arXiv 1906.07155.
    """

    def __new__(  # type: ignore[misc]  # noqa: D102 - what is made is mmdet's
        cls,
        config: str,
        num_classes: int | None = None,
        overrides: dict[str, Any] | None = None,
        weights: str | None = None,
        pretrained: bool = False,
    ) -> nn.Module:
        mmcv_ext.install()
        mmdet = late_import("mmdet", "mmdet", "detection")
        late_import("mmdet.models", "mmdet", "detection")
        path = _find(config, Path(mmdet.__file__).parent / ".mim" / "configs")
        content = late_import("mmengine.config", "mmdet", "detection").Config.fromfile(path)
        if "model" not in content:
            raise ValueError(f"{path} has no `model`, so it makes no detector. Give the file of a whole one.")
        _refuse_code(overrides or {})
        content.merge_from_dict({f"model.{name}": value for name, value in (overrides or {}).items()})
        _local_batch_norm(content.model)
        if not pretrained:
            _without_downloads(content.model, frozen=weights is not None)
        if num_classes is not None and not _set_classes(content.model, num_classes):
            raise ValueError(f"{path} has no head with num_classes; leave it out, and set what there is by overrides.")
        registry = late_import("mmengine.registry", "mmdet", "detection")
        with registry.DefaultScope.overwrite_default_scope("mmdet"), _quiet():
            model: nn.Module = registry.MODELS.build(content.model)
            model.init_weights()  # type: ignore[operator]  # of mmengine's modules
        if weights is not None:
            with torch.serialization.safe_globals(_unread()):
                load_weights(model, weights)
        model.train()  # by which mmdet puts what is frozen into evaluation mode; Lightning does not call it
        return model


def _find(config: str, shipped: Path) -> Path:
    """Returns the file: a path, a name in mmdet's wheel, or the last part of one."""
    names = (config, config if config.endswith(".py") else f"{config}.py")
    for name in names:
        for path in (Path(expand_path(name)), shipped / name):
            if path.is_file():
                return path
    known = {path.stem: path for path in shipped.glob("*/*.py")}
    stem = Path(names[1]).stem
    if names[1] == f"{stem}.py" and stem in known:
        return known[stem]
    close = [f"{known[name].parent.name}/{name}" for name in difflib.get_close_matches(stem, known, n=5, cutoff=0.3)]
    raise ValueError(
        f"There is no configuration {config!r}, neither as a file (looked from {os.getcwd()!r}) nor in mmdet's wheel. "
        f"Closest there: {', '.join(close) or 'none'}."
    )


def _refuse_code(value: Any) -> None:
    """Refuses types by their import path: overrides reach checkpoints, whose readers do not expect to run code."""
    if isinstance(value, (list, tuple)):
        for item in value:
            _refuse_code(item)
    for name, item in value.items() if isinstance(value, Mapping) else ():
        if str(name).rpartition(".")[2] in ("type", "_scope_") and "." in str(item):
            raise ValueError(
                f"overrides={{{name!r}: {item!r}}} would import that: name a type that mmdet has registered, or write "
                "a configuration file of your own with custom_imports."
            )
        _refuse_code(item)


def _without_downloads(part: Any, frozen: bool) -> None:
    """Takes out what would be downloaded; what has random weights then has to learn, too."""
    for item in part if isinstance(part, (list, tuple)) else part.values() if isinstance(part, dict) else ():
        _without_downloads(item, frozen)
    if not isinstance(part, dict):
        return
    init = part.get("init_cfg")
    several = init if isinstance(init, (list, tuple)) else [init]
    kept = [each for each in several if not (isinstance(each, dict) and each.get("type") == "Pretrained")]
    if len(kept) < len(several):
        part["init_cfg"] = kept or None
        if not frozen:
            part.update({name: value for name, value in (("frozen_stages", -1), ("norm_eval", False)) if name in part})


def _local_batch_norm(part: Any) -> None:
    """Makes synchronised batch norm, which needs several GPUs, plain; weights keep their names."""
    if isinstance(part, dict) and part.get("type") == "SyncBN":
        part["type"] = "BN"
    for item in part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ():
        _local_batch_norm(item)


def _set_classes(model: Any, num_classes: int) -> bool:
    """Sets the number of classes in every head but the RPN's, which tells things from background."""
    parts = [model[name] for name in model if name.endswith("_head") and name != "rpn_head"]
    found = False
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            parts += part.values()
            if "num_classes" in part:
                part["num_classes"] = num_classes
                found = True
        elif isinstance(part, (list, tuple)):
            parts += part
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps mmengine from telling how each parameter was initialised, three lines for each."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        yield
    finally:
        logging.disable(before)


class _Unread:
    """Stands for what a checkpoint of mmengine holds beside weights: the history of logged numbers, as numpy arrays."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _unread() -> list[Any]:
    """Returns what the unpickler is to take for each name in such a history: nothing of it is called."""
    arrays = ("multiarray._reconstruct", "multiarray.scalar")
    names = [f"numpy.{core}.{name}" for core in ("core", "_core") for name in arrays]
    names += ["numpy.ndarray", "numpy.dtype", "mmengine.logging.history_buffer.HistoryBuffer"]
    return [(_Unread, name) for name in (*names, "builtins.getattr", "__builtin__.getattr")]
