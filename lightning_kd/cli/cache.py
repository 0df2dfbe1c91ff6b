"""``lightning-kd cache``: what the teacher of a configuration says of its training data, written to disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar

from lightning_kd.attachment.caching import Caching
from lightning_kd.cli.command import DistillationCLI
from lightning_kd.cli.errors import UsageError
from lightning_kd.paths import expand_path

EPILOG = """\
All else is as for `lightning-kd fit`: --trainer.accelerator gpu, --data.init_args.batch_size 512. Then read it with
  --trainer.callbacks+=lightning_kd.callbacks.TeacherCache --trainer.callbacks.folder FOLDER   and the same --config,
or with a teacher of the class lightning_kd.teachers.Cached and its argument folder, which needs no network.
"""

ONE_PASS: dict[str, Any] = {
    "max_epochs": 1,
    "max_steps": -1,
    "max_time": None,
    "overfit_batches": 0.0,
    "limit_train_batches": None,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


class FillingCLI(DistillationCLI):
    """Runs a configuration for its teacher's answers alone.

    Args:
        arguments: What would stand after ``lightning-kd fit``.
        folder: Where to write; as the configuration's ``TeacherCache`` says, unless given.
        storage: How to store, likewise.
    """

    def __init__(self, arguments: list[str], folder: Path | None, storage: Any) -> None:
        self.folder = folder
        self.storage = storage
        super().__init__(["fit", *arguments])

    def before_instantiate_classes(self) -> None:
        """Refuse what would leave samples out, before all that is told of a training."""
        if self.own_config["trainer"].get("fast_dev_run"):
            raise UsageError("--trainer.fast_dev_run: a cache is of all training data; leave it out")
        super().before_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with a callback that fills the cache and without those of the training."""
        given = list(self._get(self.config_init, "trainer").get("callbacks") or [])
        said = next((each for each in given if isinstance(each, Caching)), None)
        folder = self.folder or (said.folder if said else "teacher_cache")
        storage = self.storage or (said.storage if said else "float16")
        if Path(expand_path(folder)).is_file():
            raise UsageError(f"--output: expected a folder for the cache, received the file {folder}")
        self.filling = Caching(folder, storage, fill_only=True)
        shown = [each for each in given if isinstance(each, ProgressBar)]
        return super().instantiate_trainer(**ONE_PASS, callbacks=[*shown, self.filling], **kwargs)

    def after_fit(self) -> None:
        """Say where it is."""
        size = sum(path.stat().st_size for path in Path(expand_path(self.filling.folder)).iterdir())
        print(f"teacher cache: complete, {size / 1e6:.3g} MB in {self.filling.folder}")


def main(arguments: list[str]) -> None:
    """Write what the teacher says of each training sample; what is there already is not asked again."""
    parser = argparse.ArgumentParser(
        prog="lightning-kd cache",
        usage="lightning-kd cache --config NAME_OR_FILE [--output FOLDER] [--storage STORAGE] [--KEY VALUE ...]",
        allow_abbrev=False,
        description="Ask the teacher once for each training sample, and write its answers: training then reads them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", action="append", required=True, metavar="NAME_OR_FILE", help="as for fit")
    parser.add_argument("--output", type=Path, help="folder to write; default: the TeacherCache's, or teacher_cache")
    parser.add_argument(
        "--storage", type=yaml.safe_load, help="float16 (default), bfloat16, float32, top20; '{output: top20}' by path"
    )
    options, others = parser.parse_known_args(arguments)
    FillingCLI([*(f"--config={each}" for each in options.config), *others], options.output, options.storage)
