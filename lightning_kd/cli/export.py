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
from lightning_kd.cli.likeness import SAME, Outputs, difference, outputs, unmatched
from lightning_kd.cli.saved import Saved
from lightning_kd.paths import expand_path

UNBOUNDED = 2**31
"""What torch.export gives for the largest size of a dimension is none from here on."""
_OTHERWISE = "; --format state_dict writes any network's weights"
Run = Callable[[tuple[Any, ...]], Outputs]


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
    except UsageError:
        raise
    except Exception as error:  # of whatever a network is
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
            differs = _difference(saved, run) if checked else 0.0
        except (UsageError, OSError):
            raise
        except Exception as error:  # of a network that cannot be written, or cannot be run by what reads the file
            raise UsageError(
                f"--format {options.format}: the network cannot be written so: {_briefly(error.__cause__ or error)} "
                f"(--traceback shows where){'' if options.format == 'state_dict' else _OTHERWISE}"
            ) from error
        if not differs <= options.tolerance:
            raise UsageError(
                f"the exported network differs by {differs:.2g} (--tolerance is {options.tolerance:.2g}); "
                f"nothing was written to {output}"
            )
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    size = output.stat().st_size / 1024
    print(f"{output}: {size:.0f} kB{_takes(saved, options.format)}; {_said(saved, differs)}")


def _takes(saved: Saved, kind: str) -> str:
    """Which sizes are taken, besides those of the training."""
    batch = kind == "onnx" and not saved.takes_lists
    takes = ["batch size"] if batch and saved.largest_batch is None else []
    takes += ["height and width"] if saved.any_size else []
    limit = f"; batches of up to {saved.largest_batch}" if batch and saved.largest_batch is not None else ""
    return limit + (f"; any {', '.join(takes)}" if takes else "")


def _said(saved: Saved, differs: float) -> str:
    """What was found by comparing."""
    if not saved.inputs:
        return "loaded again, and not compared: the checkpoint does not say what the network is given"
    with torch.no_grad():
        compared = outputs(saved.model(*saved.example(1)))
    if not compared:
        return "loaded again, and not compared: there are no tensors in what the network returns"
    return f"largest difference to the network's outputs: {differs:.2g}"


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
        _refuse_no_numbers(expected)
        worst = max(worst, (unmatched if detections(value) else difference)(expected, received))
    return worst


def _refuse_no_numbers(expected: Outputs) -> None:
    """Raises where one of the outputs holds no finite number."""
    if any(each.numel() and not each.isfinite().any() for each in expected):
        raise UsageError(
            "the network's outputs of random inputs are no finite numbers, so there is nothing to compare, and nothing "
            "was written. Are its weights numbers? If it takes positive inputs alone, say, export it by your own code"
        )


def _onnx(saved: Saved, path: Path) -> Run:
    runtime = _late("onnxruntime")
    _late("onnxscript")
    if saved.takes_lists:
        return _onnx_of_one_image(saved, path, runtime)
    if _takes_larger(saved):
        with contextlib.suppress(torch.onnx.OnnxExporterError):
            inferred = torch.export.Dim.AUTO
            run, shapes, largest = _exported(saved, path, runtime, inferred, any_size=True)
            free = all(isinstance(size, str) for shape in shapes for i, size in enumerate(shape) if i != 1)
            if free and not largest.keys() - {0} and _same_at_any_size(saved, run):
                saved.any_size, saved.largest_batch = True, largest.get(0)
                return run
    run, _, largest = _exported(saved, path, runtime, torch.export.Dim("batch"), any_size=False)
    saved.largest_batch = largest.get(0)
    return run


def _exported(
    saved: Saved, path: Path, runtime: Any, batch: Any, any_size: bool
) -> tuple[Run, list[list[int | str]], dict[int, int]]:
    """What runs the file, the shapes that it takes, and the largest sizes, by dimension, where a name is not any."""
    inputs = saved.example(2, larger=any_size)
    # Which sizes a network takes, the exporter finds out: multiples of 32, say.
    dynamic = tuple(dict.fromkeys((0, 2, 3) if each.ndim == 4 and any_size else (0,), batch) for each in inputs)
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
    return _running(session), [each.shape for each in session.get_inputs()], _largest(program.exported_program)


def _largest(program: Any) -> dict[int, int]:
    """Of each dimension of the inputs that may not be of any size the largest one: a network may decide by it."""
    found: dict[int, int] = {}
    for node in program.graph.nodes if program else ():
        if node.name not in program.graph_signature.user_inputs:
            continue
        for i, size in enumerate(node.meta["val"].shape):
            for symbol in [] if isinstance(size, int) else size.node.expr.free_symbols:
                upper = program.range_constraints[symbol].upper
                if upper < UNBOUNDED:
                    found[i] = min(int(upper), found.get(i, UNBOUNDED))
    return found


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
