"""The command line: ``lightning-kd fit|validate|test|predict|cache|list|export|compare``."""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import warnings

from lightning_kd import __version__
from lightning_kd.cli.errors import UsageError, alternatives, closest_argument, expected, unknown

OWN = {"cache": "cache", "list": "listing", "export": "export", "compare": "compare"}
LIGHTNING = ("fit", "validate", "test", "predict")

HELP = """\
usage: lightning-kd COMMAND [--config NAME_OR_FILE] [options]

Task-specific knowledge distillation: everything in YAML, nothing in code.

  fit        train a student (and its teacher first, if it was never trained)
  validate   measure a student on the validation data
  test       measure a student on the test data
  predict    predict with a student
  cache      ask a teacher once for all, and write down what it says
  compare    train teacher, student alone and distilled student; say what was gained
  export     write a student as ONNX, TorchScript or a plain state dict
  list       name the losses, teachers, tasks, models, data, callbacks, schedules, projectors, configs

  lightning-kd COMMAND --help says more. First steps: lightning-kd compare --config digits_kd
  --traceback, with any command: show where in the code an error arose
  --version
"""

HELP_RUN = """\
usage: lightning-kd {command} --config NAME_OR_FILE [--KEY VALUE ...]

  --config NAME_OR_FILE       a YAML file or a shipped configuration (lightning-kd list configs); a later one overrides
  --KEY VALUE                 any value of the configuration by its path: --trainer.max_epochs 20
                              --model.terms.kd.weight 0.5 --data.init_args.batch_size 32
{own}
  --print_config              print the whole configuration, defaults included, and run nothing: all keys there are
  --model.student.help CLASS  the arguments of a class; likewise model.teacher, model.task, data
  --help_all                  every option with its description (some 2,000 lines)
"""
CKPT = "  --ckpt_path FILE            {}"
FUNCTION = (
    "class_path names a function, expected a class: lightning_kd.models.Timm or Torchvision, or one of your own "
    "that calls the function"
)
ONE_VALUE = (
    "an argument, and no class for it. Give both in one value: '{class_path: StepLR, init_args: {step_size: 2}}'"
)
NO_LAST = r".*there is no last checkpoint available"
OWN_OPTIONS = {
    "fit": CKPT.format("go on with this run"),
    "predict": CKPT.format("the student")
    + "\n  --output PATH               write here; default: predictions, as the task has them saved",
}

INTERRUPTED = {
    "fit": "interrupted; --ckpt_path goes on from a checkpoint that was written",
    "compare": "interrupted; what was finished stays, and the same command goes on from there",
}
"""What is said where a signal has ended a command."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What stands on the command line after the program's name; default: ``sys.argv[1:]``.

    Returns:
        0, or 2 after an error that its message explains in one line; 130 after Ctrl-C, and 143 after SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    traceback = "--traceback" in arguments
    if traceback:
        arguments.remove("--traceback")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"lightning-kd {__version__}")
        return 0
    # A configuration may name classes of the folder one stands in, wherever its own file lies: while that is read, its
    # folder is the current one, and "" would mean that.
    here = os.getcwd()
    sys.path[:] = [here, *(each for each in sys.path if each != here)]
    try:
        with warnings.catch_warnings():
            # Lightning 2.6 calls torch's pytree (torch >= 2.9) and jsonargparse (>= 4.49) by their older names.
            warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*", category=FutureWarning)
            renamed = r"(?s).*(instantiate_classes|skip_none).*was deprecated in v4\.49"
            warnings.filterwarnings("ignore", message=renamed, category=DeprecationWarning)
            # About one number in the printed summary, the size in memory.
            warnings.filterwarnings("ignore", message=r"Precision .* is not supported by the model summary")
            # Of a student that is only measured: nothing is going to be saved or learned.
            needed = r"Be aware that when using `ckpt_path`"
            if arguments[0] == "fit":
                needed += r".*: \[\"ModelCheckpoint[^\"]*\"\]\.$"
            warnings.filterwarnings("ignore", message=needed)
            # TensorBoard and CSV lie side by side on purpose.
            warnings.filterwarnings("ignore", message=r"Experiment logs directory .* exists and is not empty")
            if arguments[0] != "fit":  # a fresh student would be measured
                warnings.filterwarnings("error", message=NO_LAST)
            _run(arguments[0], arguments[1:])
    except (KeyboardInterrupt, SystemExit) as error:
        if (code := _interrupted(error)) is None:
            raise
        print(f"lightning-kd: {INTERRUPTED.get(arguments[0], 'interrupted')}", file=sys.stderr)
        return code
    except BrokenPipeError:  # of `| head`, which has read enough; Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if traceback or not _explains_itself(error):
            raise
        told = _told(error, arguments[0])
        if arguments[0] in LIGHTNING and "is required" in told and not _names_configuration(arguments):
            told = f"expected --config NAME_OR_FILE, one of `lightning-kd list configs` or your own; got none. {told}"
        print(f"lightning-kd: error: {told}", file=sys.stderr)
        return 2
    return 0


def _run(command: str, arguments: list[str]) -> None:
    if command in OWN:
        importlib.import_module(f"lightning_kd.cli.{OWN[command]}").main(arguments)
    elif command in LIGHTNING and {"-h", "--help"} & {*arguments}:
        print(HELP_RUN.format(command=command, own=OWN_OPTIONS.get(command, CKPT.format("the student"))), end="")
    elif command in LIGHTNING:
        from lightning_kd.cli.command import DistillationCLI  # noqa: PLC0415 - `list` should not wait for torch

        DistillationCLI([command, *("--help" if each == "--help_all" else each for each in arguments)])
    else:
        raise unknown("command", command, [*LIGHTNING, *OWN])


def _explains_itself(error: Exception) -> bool:
    """Whether an error was raised to tell someone what to change, rather than by a defect."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: PLC0415

    # OSError: a file or folder that cannot be read or written; FloatingPointError: a term that is not finite.
    told = (UsageError, MisconfigurationException, OSError, ModuleNotFoundError, ValueError, TypeError)
    if type(error) is RuntimeError:  # torch's, of a checkpoint of another network, Lightning's, and what has our notes
        told_by_others = ("Error(s) in loading state_dict", "Early stopping conditioned on metric")
        return str(error).startswith(told_by_others) or bool(getattr(error, "__notes__", ()))
    if isinstance(error, UserWarning):
        return re.match(NO_LAST, str(error)) is not None
    return isinstance(error, (*told, FloatingPointError)) or type(error).__name__ == "ArgumentError"


def _interrupted(error: BaseException) -> int | None:
    """The exit code of what was ended by a signal; None for what ended by itself."""
    # While a Trainer runs, Lightning makes SystemExit(1) of Ctrl-C, and of SIGTERM one without a code, as of success.
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 128 + signal.SIGTERM if type(error).__name__ == "SIGTERMException" else None


def _names_configuration(arguments: list[str]) -> bool:
    return any(each.partition("=")[0] in ("--config", "-c") for each in arguments)


def _told(error: BaseException, command: str) -> str:
    """What a class that was being built complained of, and where, in one line, without the types that were tried."""
    where, outermost = "", error
    if misfits := re.match(r"Error\(s\) in loading state_dict.*?\n\t(.*?)\.?(\n|$)", str(error)):
        return f"the checkpoint is of another network: {misfits[1]}"
    if "'linked_targets'" in str(error):  # jsonargparse's own mistake
        key = re.match(r'Parser key "([^"]+)"', str(error))
        return f"{key[1] if key else 'model'}: {FUNCTION}"
    if isinstance(error, FileNotFoundError) and error.filename and not os.path.isabs(error.filename):
        return f"{error} (looked from {os.getcwd()!r})"
    if "its parent's `batch_size=...`" in str(error):  # Lightning's, of its own remake of a DataLoader
        return (
            "Lightning makes the DataLoader of a prediction anew, which fails if its batch size is given by position: "
            "in your predict_dataloader give batch_size= by name"
        )
    if str(error).startswith("Call to compute_fn of link") and isinstance(error.__cause__, UsageError):
        error = error.__cause__
    # The cause is what the first type complained of: null or a number says nothing of a class. All are in the text.
    plain = "Expected a <class '"
    while "Union subtypes" in str(error) and error.__cause__ and not str(error.__cause__).startswith(plain):
        key = re.match(r'Parser key "([^"]+)"', str(error))
        where = where or (f"{key[1]}: " if key else "")
        error = error.__cause__
    told = " ".join([str(error), *getattr(error, "__notes__", ())])
    while tried := alternatives(told):
        for key in re.findall(r'Parser key "([^"]+)"', told.partition("Errors:")[0]):
            where += "" if f"{key}: " in where else f"{key}: "
        deeper = [each for each in tried if not re.match("Expected (a )?(<|typing|dot import)", each)]
        told = deeper[0] if deeper else expected(told)
    if "class_path='typing.Union'" in told:  # jsonargparse has lost the class, which is not whole without arguments
        return f"{where}{ONE_VALUE}"
    shown = f"{where}{told}".partition("\nSubclass types expect one of")[0].strip()
    missing = re.search(r"No such file or directory: '([^']+)'$", shown)  # of data that are made of their arguments
    missing = missing or re.search(r"class_path '(\w+)\.[^']+':\s+No module named '\1'$", shown)
    if missing and not os.path.isabs(missing[1]):
        shown += f" (looked from {os.getcwd()!r})"
    line = re.sub(r"\s*\n\s*", " ", shown) + closest_argument(told, command)
    notes = [note for note in getattr(outermost, "__notes__", ()) if note not in line]
    return " ".join([line if line.endswith((".", "?")) or not notes else f"{line}.", *notes])
