"""``lightning-kd fit|validate|test|predict``: Lightning's own command line around the DistillationModule."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_kd.cli import teacher
from lightning_kd.cli.configs import expand_arguments
from lightning_kd.cli.progress import TermsProgressBar
from lightning_kd.cli.recipe import Recipe, accepts, plain
from lightning_kd.cli.save_recipe import SaveRecipe
from lightning_kd.module import DistillationModule

LINKED_TO_NUM_CLASSES = (
    "model.task.init_args.num_classes",
    "model.student.init_args.num_classes",
    "model.teacher.init_args.num_classes",
    "model.teacher.init_args.model.init_args.num_classes",
)

_STRICT: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}


class DistillationCLI(LightningCLI):
    """Everything in YAML, nothing in code.

    Args:
        arguments: What would stand on the command line.
        run: Whether the first argument is a subcommand to run; else classes are made and nothing is run.
    """

    def __init__(self, arguments: list[str], run: bool = True) -> None:
        super().__init__(
            DistillationModule,
            LightningDataModule,
            save_config_kwargs={"overwrite": True},
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=expand_arguments(arguments),
            run=run,
            # A typo is an error to be told, neither an abbreviation nor an exit.
            parser_kwargs={name: dict(_STRICT) for name in self.subcommands()} | _STRICT,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; Lightning's own would warn that ``sys.argv`` is not empty."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the teacher's training, and write ``num_classes`` once: in the data."""
        parser.add_argument(
            "--teacher_fit", type=teacher.TeacherFit | None, default=None, help=teacher.TeacherFit.__doc__
        )
        for target in LINKED_TO_NUM_CLASSES:
            parser.link_arguments("data.num_classes", target, apply_on="instantiate")

    @property
    def own_config(self) -> Any:
        """The parsed configuration, of the subcommand if there is one."""
        return self.config.get(str(self.subcommand), self.config)

    def before_instantiate_classes(self) -> None:
        """Train the teacher first, if it was not trained before."""
        if self.subcommand == "fit":
            teacher.ensure(self)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with loggers side by side in one folder."""
        config = self._get(self.config_init, "trainer")
        if config.get("logger") in (None, True) and not config.get("fast_dev_run"):
            kwargs["logger"] = self._loggers(Path(config.get("default_root_dir") or "runs"))
        callbacks = list(config.get("callbacks") or [])
        if config.get("enable_progress_bar") is not False:
            callbacks.append(TermsProgressBar())
        kwargs["callbacks"] = [*callbacks, SaveRecipe(self.student_recipe())]
        trainer: Trainer = super().instantiate_trainer(**kwargs)
        return trainer

    def student_recipe(self) -> Recipe:
        """The student's class and arguments, with what was linked filled in."""
        recipe: Recipe = plain(self.own_config["model"]["student"])
        classes = getattr(self.datamodule, "num_classes", None)
        if classes is not None and accepts(recipe["class_path"], "num_classes"):
            recipe["init_args"]["num_classes"] = int(classes)
        return recipe

    def _loggers(self, folder: Path) -> list[Logger]:
        given = self.own_config.get("config") or []
        name = Path(str(given[0])).stem if given else "default"
        csv = CSVLogger(folder, name=name)
        if importlib.util.find_spec("tensorboard") is None:
            return [csv]
        return [TensorBoardLogger(folder, name=name, version=csv.version), csv]

    def after_fit(self) -> None:
        """Say where the student is."""
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if best and self.trainer.is_global_zero:
            print(f"student saved: {best}")
