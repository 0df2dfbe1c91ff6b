"""``lightning-kd fit|validate|test|predict``: Lightning's own command line around the DistillationModule."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from jsonargparse import Namespace
from lightning import LightningDataModule, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_kd.cli import monitors, teacher
from lightning_kd.cli.configs import expand_arguments
from lightning_kd.cli.errors import UsageError
from lightning_kd.cli.lasting import lasting
from lightning_kd.cli.linked import LINKED, LinkedParser
from lightning_kd.cli.progress import progress, quiet
from lightning_kd.cli.recipe import KEY, UNLIKE, Recipe, accepts, plain, read, recipe_of, whole_of
from lightning_kd.cli.save_predictions import SavePredictions
from lightning_kd.cli.save_recipe import SaveRecipe, tell_unlike
from lightning_kd.cli.settings import TrainedOtherwiseError
from lightning_kd.cli.terms import name_term, terms_in
from lightning_kd.module import DistillationModule
from lightning_kd.paths import expand_path
from lightning_kd.teachers import Peers

SWITCHES = {
    "enable_checkpointing": Checkpoint,
    "enable_progress_bar": ProgressBar,
    "enable_model_summary": ModelSummary,
}
"""Callbacks that the Trainer refuses when they are switched off; they go."""

BY_NAME = ("best", "last", "hpc")
"""Checkpoints that the Trainer finds by itself; what was the best or the last, a fit alone knows."""

FRESH = (
    "note: without --ckpt_path the student has the weights that it is made with, random ones unless its class loads "
    "others"
)

_STRICT: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}


OF_A_COMMAND = ("ckpt_path", "weights_only", "verbose", "return_predictions", "output")
"""What else stands in the configuration that a command prints or a run writes."""


class DistillationCLI(LightningCLI):
    """Everything in YAML, nothing in code.

    Args:
        arguments: What would stand on the command line.
        run: Whether the first argument is a subcommand to run; else classes are made and nothing is run.
        make: Whether to make the classes, too; else what was given is only parsed.
    """

    def __init__(self, arguments: list[str], run: bool = True, make: bool = True) -> None:
        self._make = make
        self._run = run
        super().__init__(
            DistillationModule,
            LightningDataModule,
            save_config_kwargs={"overwrite": True},
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=LinkedParser,
            args=expand_arguments(arguments),
            run=run,
            # A typo is an error to be told, neither an abbreviation nor an exit.
            parser_kwargs={name: dict(_STRICT) for name in self.subcommands()} | _STRICT,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; Lightning's own would warn that ``sys.argv`` is not empty, and unpickle any checkpoint."""
        try:
            self.config = parser.parse_args(args)
        except Exception as error:
            name_term(error, terms_in(args))
            raise
        trainer = self.config.get(str(self.config.get("subcommand")), self.config)["trainer"]
        if isinstance(trainer.get("callbacks"), Namespace):  # one alone, which the Trainer takes, too
            trainer["callbacks"] = [trainer["callbacks"]]
        if trainer.get("default_root_dir"):
            trainer["default_root_dir"] = expand_path(trainer["default_root_dir"])
        path = self.config.get(f"{self.config.get('subcommand')}.ckpt_path")
        if path in ("best", "last") and self.config.get("subcommand") != "fit":
            raise UsageError(
                f"--ckpt_path: {path!r} is what a fit has seen itself, and this command has none; give the path that "
                "`lightning-kd fit` printed when it ended"
            )
        if path in (None, *BY_NAME) or re.match("registry|[a-z0-9]+://", path):
            return
        path = self.config[f"{self.config.get('subcommand')}.ckpt_path"] = expand_path(path)
        content = read(path)
        if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= content.keys():
            raise UsageError(f"--ckpt_path: {path} is no checkpoint of a run; give one that `lightning-kd fit` wrote")
        if content.get("hyper_parameters") and KEY not in content:  # which would be merged into the configuration
            raise UsageError(
                f"--ckpt_path: {path} does not say which network it holds: give a .ckpt that `lightning-kd fit` wrote"
            )
        if self.config.get("subcommand") == "fit" and "optimizer_states" not in content:
            raise UsageError(
                f"--ckpt_path: {path} holds weights alone, and going on with a run takes the optimizer's state, too; "
                "give a checkpoint that was not saved with save_weights_only"
            )
        output = self.config.get(f"{self.config.get('subcommand')}.output")
        if output and Path(expand_path(output)).resolve() == Path(path).resolve():
            raise UsageError(f"--output: {output} is the checkpoint itself; name another file for the predictions")

    def setup_parser(self, *args: Any) -> None:
        """Add what only one command has."""
        super().setup_parser(*args)
        if parsers := getattr(self, "_subcommand_parsers", None):
            told = "Where to write predictions; without an ending, as the task has them saved; null: write none."
            parsers["predict"].add_argument("--output", type=str | None, default="predictions", help=told)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the teacher's training, and write ``num_classes`` and its like once: in the data."""
        parser.add_argument(
            "--teacher_fit", type=teacher.TeacherFit | None, default=None, help=teacher.TeacherFit.__doc__
        )
        for name in () if self._run else OF_A_COMMAND:  # which a run has written down, too
            parser.add_argument(f"--{name}", default=None)
        assert isinstance(parser, LinkedParser)
        parser.add_links()

    @property
    def own_config(self) -> Any:
        """The parsed configuration, of the subcommand if there is one."""
        return self.config.get(str(self.subcommand), self.config)

    @property
    def plain_config(self) -> dict[str, Any]:
        """The same as plain types, whole: what is null may override a default (`encoder_weights` downloads nothing).

        Raises:
            UsageError: If an argument would be read again as something else, and is not as its class has it anyway.
        """
        parser = self._parser(self.subcommand)
        # With what is linked, too: data that do not say a number of classes leave the one that was given.
        whole = {"skip_unset" if "skip_unset" in inspect.signature(parser.dump).parameters else "skip_none": False}
        dumped = parser.dump(
            lasting(self.own_config, strict=True), format="json", skip_validation=True, skip_link_targets=False, **whole
        )
        loaded: dict[str, Any] = json.loads(dumped)
        return loaded

    def before_instantiate_classes(self) -> None:
        """Train the teacher first, if it was not trained before; what is predicted is written, and not kept."""
        teacher.refuse_untrained(self.own_config)
        if self.subcommand == "predict" and self.own_config.get("output"):
            self.own_config["return_predictions"] = False
        if self.subcommand != "fit":
            if self.subcommand and not self.own_config.get("ckpt_path"):
                _tell(f"lightning-kd: {FRESH}", sys.stderr)
            return
        teacher.note_fresh(self.own_config["model"])
        missing = bool(teacher.missing(self.own_config))
        teacher.refuse_schedule(self.own_config)
        if missing and self.own_config["trainer"].get("fast_dev_run"):
            print("teacher: not trained yet; in this fast_dev_run an untrained one stands in")
            self.config = self._with_stand_in()
        else:
            if missing:
                self.rehearse()
                # What cannot be written is told before the teacher is trained.
                Path(self.own_config["trainer"].get("default_root_dir") or "runs").mkdir(parents=True, exist_ok=True)
            try:
                if self.own_config.get("teacher_fit"):
                    teacher.ensure(self.plain_config, DistillationCLI)
            except TrainedOtherwiseError:
                self._make_untrained()
                raise
        if missing:
            self._set_seed()  # the student starts alike, whether or not its teacher was trained before it

    def instantiate_classes(self) -> None:
        """Make data, model and trainer."""
        if self._make:
            self._make_classes()

    def _make_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:
            name_term(error, self.own_config["model"].get("terms"))
            raise

    def rehearse(self) -> None:
        """Train for one batch, with an untrained teacher if there is no other: mistakes are told before a long run."""
        config, self.config = self.config, self._with_stand_in()
        kept = self.save_config_callback
        trainer = self.own_config["trainer"]
        trainer.fast_dev_run, trainer.barebones = True, False
        trainer.enable_checkpointing = trainer.enable_model_summary = trainer.enable_progress_bar = False
        try:
            with quiet(), contextlib.suppress(FloatingPointError):  # an untrained teacher may say anything
                self._make_classes()
                self.trainer.fit(self.model, datamodule=self.datamodule)
                own = config.get(str(self.subcommand), config)
                monitors.refuse(own, self.model.task, self.trainer.callback_metrics)
            stop_if_told(self.trainer)
        finally:
            self.config, self.save_config_callback = config, kept

    def _with_stand_in(self, all_untrained: bool = False) -> Any:
        """The configuration, with no checkpoint for a teacher that was not trained yet; or for any."""
        config = self.config.clone()
        own = config.get(str(self.subcommand), config)
        for one in teacher.trained(own["model"]) if all_untrained else teacher.missing(own):
            one["checkpoint"] = None
        return config

    def _make_untrained(self) -> None:
        """Make all classes, without the teachers' weights: what cannot be made, of a mistyped name, is told as that."""
        config, self.config = self.config, self._with_stand_in(all_untrained=True)
        try:
            with quiet():
                self._make_classes()
        finally:
            self.config = config

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer: a fit keeps its logs side by side in one folder, what only measures keeps nothing."""
        config = dict(self._get(self.config_init, "trainer")) | kwargs
        callbacks = list(config.get("callbacks") or [])
        if config.get("barebones"):  # for which everything else is switched off
            config |= {"logger": False, "log_every_n_steps": 0} | dict.fromkeys(SWITCHES, False)
        if self.subcommand in ("validate", "test", "predict"):
            config |= {"logger": config.get("logger") or False, "enable_checkpointing": False}
            self.save_config_callback = None
        elif config.get("logger") in (None, True) and not config.get("fast_dev_run"):
            config["logger"] = self._loggers(Path(config.get("default_root_dir") or "runs"))
        for option, kind in SWITCHES.items():
            if config.get(option) is False:
                callbacks = [each for each in callbacks if not isinstance(each, kind)]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            shown = progress()
            config["enable_progress_bar"] = isinstance(shown, ProgressBar)
            callbacks.append(shown)
        keeps = config.get("logger", True)
        # The configuration would land in the folder one stands in.
        if not keeps or isinstance(keeps, DummyLogger) or config.get("fast_dev_run"):
            self.save_config_callback = None
        saves = config.get("enable_checkpointing") is not False
        if self.subcommand == "fit" and saves and not any(isinstance(each, Checkpoint) for each in callbacks):
            # Lightning's own saves where it validates: with check_val_every_n_epoch=5, of 8 epochs the first five.
            callbacks.append(ModelCheckpoint(save_on_train_epoch_end=True))
        if (output := self.own_config.get("output")) and config.get("fast_dev_run"):
            print(f"predictions: of a fast_dev_run none are written to {output}")
        elif output:
            callbacks.append(SavePredictions(Path(expand_path(output))))
        nothing_is_kept = config.get("fast_dev_run") or self.subcommand in ("validate", "test", "predict")
        self.recipe_saver = SaveRecipe({}) if nothing_is_kept else self._saver()
        kwargs = config | {"callbacks": [*callbacks, self.recipe_saver]}
        trainer: Trainer = super().instantiate_trainer(**kwargs)
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise UsageError(
                f"--trainer.strategy: {config['strategy']!r} trains in copies of this process, of which it would not "
                "hear what was learned; take ddp, which starts the command once more for each"
            )
        return trainer

    def _saver(self) -> SaveRecipe:
        """What saves the student's class and arguments, with what was linked filled in, and those of its peers."""
        model = self.own_config["model"]
        learning = self.model.teacher.peers if isinstance(self.model.teacher, Peers) else ()
        configs = model.get("teacher.init_args.peers") or []
        fill = partial(self._linked, prefix="student.init_args.")
        recipes, whole = [recipe_of(self.model.student, model["student"], fill)], [whole_of(model["student"], fill)]
        for peer, config in zip(learning, configs, strict=True):
            recipes.append(recipe_of(peer, config))
            whole.append(whole_of(config))
        for i, recipe in enumerate(recipes):
            if UNLIKE in recipe:
                tell_unlike(i, recipe)
        return SaveRecipe(recipes[0], recipes[1:], self.deployed(), whole)

    def _linked(self, recipe: Recipe, prefix: str) -> Recipe:
        """A recipe with what was linked filled in."""
        for said, targets in LINKED.items():
            value = plain(getattr(self.datamodule, said, None))
            names = [target.removeprefix(prefix) for target in targets if target.startswith(prefix)]
            own = [name for name in names if "." not in name]  # not what is inside of an argument
            if value is not None and own:
                accepted = filter(partial(accepts, recipe["class_path"]), own)
                recipe.setdefault("init_args", {}).update(dict.fromkeys(accepted, value))  # a class may have none
        return recipe

    def deployed(self) -> dict[str, Recipe | None] | None:
        """Recipes of what the task makes of student and teacher in the end; None, where the student alone runs."""
        if self.model.task.deployed(self.model.student) is self.model.student:
            return None
        model = self.own_config["model"]
        parts = {name: plain(model.get(name), initial=True) for name in ("task", "teacher", "teacher_input")}
        self._linked(parts["task"], "task.init_args.")
        for name in self.model.task.only_trains:
            parts["task"].get("init_args", {}).pop(name, None)
        network = (parts["teacher"].get("init_args") or {}).get("model")
        self._linked(network or parts["teacher"], f"teacher.init_args.{'model.init_args.' if network else ''}")
        return parts

    def _loggers(self, folder: Path) -> list[Logger]:
        given = self.own_config.get("config") or []
        name = Path(str(given[0])).stem if given else "default"
        csv = CSVLogger(folder, name=name)
        if importlib.util.find_spec("tensorboard") is None:
            return [csv]
        return [TensorBoardLogger(folder, name=name, version=csv.version), csv]

    def after_fit(self) -> None:
        """Say where the student is, if there was anything to learn from."""
        if not self.trainer.global_step:
            raise UsageError(
                "the fit made no step: expected training data of at least one batch, received none. Lower "
                "--data.init_args.batch_size, or see --trainer.limit_train_batches and max_epochs"
            )
        if not self.recipe_saver.trained:
            raise UsageError(
                f"--ckpt_path: that run was over, and nothing was trained: it has made {self.trainer.global_step} "
                f"steps, and max_epochs is {self.trainer.max_epochs}, max_steps {self.trainer.max_steps}. Raise "
                "--trainer.max_epochs to go on with it"
            )
        self.recipe_saver.compare(self.trainer, self.model)
        if self.saved and self.trainer.is_global_zero:
            self.note_saved()
        stop_if_told(self.trainer)

    @property
    def saved(self) -> str:
        """The checkpoint that a fit ends with: the best where something is monitored, else the last; empty if none."""
        return getattr(self.trainer.checkpoint_callback, "best_model_path", "")

    def note_saved(self) -> None:
        """Say where the student is."""
        print(f"student saved: {self.saved}")


def stop_if_told(trainer: Trainer) -> None:
    """End what would go on with another run: Lightning leaves a SIGTERM of the last batch to whoever asks for it."""
    if trainer.received_sigterm:
        raise SIGTERMException


@rank_zero_only
def _tell(what: str, file: TextIO | None = None) -> None:
    print(what, file=file)
