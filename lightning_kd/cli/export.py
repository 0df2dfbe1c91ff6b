"""``lightning-kd export``: what runs in the end, in a format that needs neither a training nor this library."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_kd.boxes import detections
from lightning_kd.cli.errors import UsageError
from lightning_kd.cli.saved import Saved
from lightning_kd.paths import expand_path

FAILURES = (RuntimeError, torch.onnx.OnnxExporterError, torch.jit.TracingCheckError)  # type: ignore[attr-defined]  # torch's own gap
"""What a network raises that cannot be written."""

Outputs = list[Tensor]
Run = Callable[[tuple[Any, ...]], Outputs]
TINY = 1e-6
"""Differences are relative to the largest value of an output, or to this, where that is smaller."""
SAME = 1e-3
"""Largest difference at another image size, relative; else only the size of the training is offered."""


def main(arguments: list[str]) -> None:
    """Export a checkpoint and check what was written against the network in Python."""
    parser = argparse.ArgumentParser(
        prog="lightning-kd export",
        allow_abbrev=False,
        description="Write the student of a checkpoint, or what its task makes of it and of its teacher (a detector of "
        "anomalies that is their difference), read it back, and compare its outputs with the network's.",
    )
    parser.add_argument("checkpoint", type=expand_path, help="a .ckpt file that `lightning-kd fit` wrote")
    parser.add_argument(
        "--format",
        required=True,
        metavar="FORMAT",
        help="onnx (any batch size, any image size where the network can; of a detector one image; checked with "
        "onnxruntime), torchscript (PyTorch has deprecated it; for old runtimes), or state_dict (weights only, for "
        "the plain class)",
    )
    parser.add_argument(
        "--output", type=expand_path, help="file to write; default: the checkpoint's name with a new ending"
    )
    parser.add_argument("--peer", type=int, default=0, metavar="N", help="write the student's N-th peer instead of it")
    parser.add_argument(
        "--teacher", metavar="CKPT", help="the teacher's checkpoint, where it is part of what runs and was moved"
    )
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference allowed")
    options = parser.parse_args(arguments)
    if options.format not in FORMATS:
        raise UsageError(f"--format: expected one of {', '.join(FORMATS)}, received {options.format!r}")
    if not options.tolerance >= 0:
        raise UsageError(f"--tolerance: expected a number that is not negative, received {options.tolerance}")
    ending, write = FORMATS[options.format]
    saved = Saved(options.checkpoint, options.peer, options.teacher)
    checked = saved.inputs or options.format != "state_dict"  # weights can be written of any network
    try:
        if checked:
            saved.model(*saved.example(2))
    except RuntimeError as error:
        raise UsageError(f"the network does not take the inputs that {options.checkpoint} names: {error}") from error
    ending = f".peer{options.peer}{ending}" if options.peer else ending
    output = Path(options.output or Path(options.checkpoint).with_suffix(ending))
    if output.is_dir():
        raise UsageError(f"--output: expected a file for the network, received the folder {output}")
    if output.resolve() == Path(options.checkpoint).resolve():
        raise UsageError(f"--output is the checkpoint itself ({output}); name another file")
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.part{ending}")
    try:
        part.touch()  # where nothing can be written, torch would not say it as an OSError
        try:
            run = write(saved, part)
            difference = _difference(saved, run) if checked else 0.0
        except FAILURES as error:
            raise UsageError(
                f"--format {options.format}: the network cannot be written so: {_briefly(error.__cause__ or error)} "
                "(--traceback shows where); --format state_dict writes any network's weights"
            ) from error
        if not difference <= options.tolerance:
            raise UsageError(
                f"the exported network differs by {difference:.2g} (--tolerance is {options.tolerance:.2g}); "
                f"nothing was written to {output}"
            )
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    size = output.stat().st_size / 1024
    takes = ["batch size"] if ending.endswith(".onnx") and not saved.takes_lists else []
    takes += ["height and width"] if saved.any_size else []
    sizes = f"; any {', '.join(takes)}" if takes else ""
    said = f"largest difference to the network's outputs: {difference:.2g}"
    said = said if checked else "loaded again, and not compared: the checkpoint does not say what the network is given"
    print(f"{output}: {size:.0f} kB{sizes}; {said}")


def _briefly(error: BaseException) -> str:
    """The first line of what an error says, or its class."""
    return next(filter(None, str(error).splitlines()), type(error).__name__)


def _difference(saved: Saved, run: Run) -> float:
    """Largest difference of the outputs relative to their size: for two batches, of two image sizes if any will do."""
    other = saved.example(1 if saved.takes_lists else 3, larger=saved.any_size)
    return _worst(saved, run, [saved.example(1), other])


def _worst(saved: Saved, run: Run, examples: Iterable[tuple[Any, ...]]) -> float:
    worst = 0.0
    for inputs in examples:
        with torch.no_grad():
            value = saved.model(*inputs)
            try:
                received = run(inputs)
            except Exception as error:
                raise RuntimeError(
                    f"what was written does not take a batch of {len(inputs[0])}: {_briefly(error)}"
                ) from None
        expected = outputs(value)
        if detections(value):
            worst = max(worst, _unmatched(expected, received))
            continue
        if [e.shape for e in expected] != [r.shape for r in received]:
            return float("inf")
        worst = max([worst, *map(_distance, expected, received)])
    return worst


def _distance(expected: Tensor, received: Tensor) -> float:
    """Largest difference relative to the largest value; infinity, where one is no number and the other not the same."""
    expected, received = expected.double(), received.double()  # also what was decided, True and False
    numbers = expected.isfinite()
    if expected.numel() and not numbers.any():
        raise UsageError(
            "the network's outputs of random inputs are no finite numbers, so there is nothing to compare, and nothing "
            "was written. Are its weights numbers? If it takes positive inputs alone, say, export it by your own code"
        )
    if not torch.allclose(expected[~numbers], received[~numbers], rtol=0, atol=0, equal_nan=True):
        return float("inf")
    difference = (expected - received)[numbers].abs().nan_to_num(nan=float("inf"))
    return float(difference.amax() / expected[numbers].abs().amax().clamp(min=TINY)) if len(difference) else 0.0


def _unmatched(expected: Outputs, received: Outputs) -> float:
    """Largest distance of something found to the next that the other found: equal scores may come in any order."""
    mine, theirs = (torch.cat([each.flatten(1) if each.ndim > 1 else each[:, None] for each in found], dim=1).double()
                    for found in (expected, received))  # fmt: skip
    if not len(mine) or not len(theirs):
        return 0.0 if len(mine) == len(theirs) else float("inf")
    scale = torch.cat([mine, theirs]).abs().amax(0).clamp(min=1.0)
    distance = torch.cdist(mine / scale, theirs / scale, p=float("inf")).nan_to_num(nan=float("inf"))
    return float(torch.maximum(distance.amin(0).amax(), distance.amin(1).amax()))


def outputs(value: Any) -> Outputs:
    """All tensors in what a network returned, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _onnx(saved: Saved, path: Path) -> Run:
    runtime = _late("onnxruntime")
    _late("onnxscript")
    if saved.takes_lists:
        return _onnx_of_one_image(saved, path, runtime)
    if _takes_larger(saved):
        with contextlib.suppress(torch.onnx.OnnxExporterError):
            run, shapes = _exported(saved, path, runtime, any_size=True)
            free = all(isinstance(size, str) for shape in shapes for i, size in enumerate(shape) if i != 1)
            if free and _same_at_any_size(saved, run):
                saved.any_size = True
                return run
    return _exported(saved, path, runtime, any_size=False)[0]


def _exported(saved: Saved, path: Path, runtime: Any, any_size: bool) -> tuple[Run, list[list[int | str]]]:
    """What runs the file, and the shapes that it takes: names stand for any number."""
    inputs = saved.example(2, larger=any_size)
    batch, inferred = torch.export.Dim("batch"), torch.export.Dim.AUTO
    # Which sizes a network takes, the exporter finds out: multiples of 32, say.
    dynamic = tuple(
        dict.fromkeys((0, 2, 3) if each.ndim == 4 else (0,), inferred) if any_size else {0: batch} for each in inputs
    )
    with torch.no_grad():
        names = _names(saved.model(*inputs))
    program = torch.onnx.export(
        saved.model, inputs, dynamo=True, dynamic_shapes=dynamic, verbose=False, output_names=names
    )
    assert program is not None
    program.save(path, external_data=False)
    options = runtime.SessionOptions()
    if any_size:
        options.log_severity_level = 4  # an attempt: that it fails at another size is no news
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return _running(session), [each.shape for each in session.get_inputs()]


def _names(value: Any) -> list[str] | None:
    """What the network calls its outputs, if it says it: the keys of a dict of tensors, the fields of a tuple."""
    named = value._asdict() if hasattr(value, "_asdict") else value
    fit = isinstance(named, Mapping) and all(isinstance(each, Tensor) for each in named.values())
    return [*map(str, named)] if fit else None


def _same_at_any_size(saved: Saved, run: Run) -> bool:
    try:
        return _worst(saved, run, [saved.example(1), saved.example(3, larger=True)]) <= SAME
    except Exception:  # onnxruntime's, of a graph into which a size was written
        return False


def _takes_larger(saved: Saved) -> bool:
    """Whether the network takes images of another size than it was trained on."""
    if not any(len(shape) == 3 for shape, _ in saved.inputs):
        return False
    try:
        with torch.no_grad():
            saved.model(*saved.example(1, larger=True))
    except Exception:  # whatever a network raises of a size that it does not take
        return False
    return True


def _running(session: Any) -> Run:
    names = [each.name for each in session.get_inputs()]

    def run(inputs: tuple[Tensor, ...]) -> Outputs:
        fed = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
        return [torch.from_numpy(each) for each in session.run(None, fed)]

    return run


def _onnx_of_one_image(saved: Saved, path: Path, runtime: Any) -> Run:
    """Traced for a list of one image of any size: how many boxes are found torch.export cannot follow."""
    with torch.no_grad():
        names = ["image", *saved.model(*saved.example(1))[0]]  # boxes, scores and labels, in the network's order
    any_size = {"image": {1: "height", 2: "width"}} | {name: {0: "found"} for name in names[1:]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a tracer that PyTorch has deprecated, about constants of torchvision
        torch.onnx.export(
            saved.model, saved.example(1), str(path), dynamo=False, opset_version=17,
            input_names=names[:1], output_names=names[1:], dynamic_axes=any_size,
        )  # fmt: skip
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    saved.any_size = True
    return lambda inputs: [torch.from_numpy(each) for each in session.run(None, {"image": inputs[0][0].numpy()})]


def _torchscript(saved: Saved, path: Path) -> Run:
    if saved.takes_lists:
        raise UsageError("--format torchscript: a network that takes lists of images cannot be traced; use onnx")
    with warnings.catch_warnings():
        # Said in --help, and asked for all the same.
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=FutureWarning)
        # What a trace takes for constant is compared at another batch size.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]  # torch's own gap
        inputs = saved.example(2)
        with torch.no_grad():
            strict = not isinstance(saved.model(*inputs), dict)
        if not strict:  # the tracer warns that its keys may change
            warnings.filterwarnings("ignore", message="Encountering a dict")
        traced = torch.jit.trace(saved.model, inputs, strict=strict)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, str(path))
        loaded = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return lambda inputs: outputs(loaded(*inputs))


def _state_dict(saved: Saved, path: Path) -> Run:
    torch.save(saved.state, path)
    fresh = saved.fresh()
    fresh.load_state_dict(torch.load(path, weights_only=True))
    return lambda inputs: outputs(fresh(*inputs))


def _late(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(f'{module} is not installed: pip install "lightning-kd[export]"') from error


FORMATS: dict[str, tuple[str, Callable[[Saved, Path], Run]]] = {
    "onnx": (".onnx", _onnx),
    "torchscript": (".torchscript.pt", _torchscript),
    "state_dict": (".state_dict.pt", _state_dict),
}
