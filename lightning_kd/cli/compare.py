"""``lightning-kd compare``: teacher, student alone and distilled students, on the same data and seeds."""

from __future__ import annotations

import argparse
import importlib.util
import pydoc
import re
import traceback
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

from lightning_kd.cli import costs, examples, plot, report, teacher
from lightning_kd.cli.command import DistillationCLI
from lightning_kd.cli.configs import find
from lightning_kd.cli.errors import UsageError
from lightning_kd.cli.progress import quiet
from lightning_kd.cli.report import Row
from lightning_kd.cli.runs import Settings, Tested, fit, peer_file, refuse_main
from lightning_kd.cli.settings import fingerprint
from lightning_kd.paths import expand_path
from lightning_kd.teachers import load_weights

DESCRIPTION = """\
Train (or load) the teacher, the student alone, and the student distilled by each configuration; measure all of them
on the test data; print and save what was gained. What was trained before is found again, so that an interrupted
comparison goes on where it was. Further options override the configurations, as in `lightning-kd fit`.
"""

STANDING = ("lightning_kd.teachers.Frozen", "lightning_kd.teachers.Ensemble")
"""Teachers that do not learn with the student."""

ROWS = re.compile(r"(teacher|student alone)( \d+)?|.*, (peer \d+( alone)?|teacher of .*)", re.DOTALL)
"""Names of rows, besides those of configurations and files."""


@quiet()  # a banner for each of many runs
def main(arguments: list[str]) -> None:
    """Compare, print the table, and save it with the plot."""
    parser = argparse.ArgumentParser(prog="lightning-kd compare", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "--config", "-c", nargs="+", action="extend", required=True, metavar="NAME_OR_FILE", help="configurations"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the configuration's own seed")
    parser.add_argument("--teacher", metavar="CKPT", type=expand_path, help="take this teacher instead of training one")
    parser.add_argument(
        "--student-ckpt", nargs="+", default=[], type=expand_path, metavar="CKPT", help="measure these students too"
    )
    parser.add_argument("--output", type=expand_path, help="folder for results; default: comparisons/<configuration>")
    options, overrides = parser.parse_known_args(arguments)
    for needed in ("matplotlib", "scipy"):  # now, and not after hours of training
        if importlib.util.find_spec(needed) is None:
            raise UsageError(f'{needed} is not installed: pip install "lightning-kd[classification]"')
    names = [Path(expand_path(name)).stem for name in options.config]
    students = [Path(path) for path in options.student_ckpt]
    weights = [str(path) for path in students]
    for option, given in (("--config", names), ("--seeds", options.seeds or []), ("--student-ckpt", weights)):
        if twice := [each for each in dict.fromkeys(given) if given.count(each) > 1]:
            raise UsageError(f"{option}: expected different ones, received {twice[0]} twice; drop or rename one")
    refuse_names(names, weights)
    if bad := [seed for seed in options.seeds or [] if not 0 <= seed < 2**32]:
        raise UsageError(f"--seeds: expected integers from 0 to 4294967295, received {bad[0]}")
    output = Path(options.output or Path("comparisons", "+".join(names)))
    if output.is_file():
        raise UsageError(f"--output: expected a folder for the results, received the file {output}")
    files = [find(given) for given in options.config]
    clis = [read(file, options.teacher, overrides) for file in files]
    for cli in clis:  # all mistakes are told before the first training
        cli.rehearse()
        refuse_main(cli.model.task, cli.trainer.callback_metrics, "val")
    for path in students:
        load_weights(clis[0].model.student, path)
    output.mkdir(parents=True, exist_ok=True)
    for cli in clis:
        teacher.ensure(cli.plain_config, DistillationCLI)
    configs = {name: settings_of(cli) for name, cli in zip(names, clis, strict=True)}
    tasks = {name: teacher.own_task(cli.own_config) for name, cli in zip(names, clis, strict=True)}
    rows, tested = compare(configs, tasks, options.seeds, students, output)
    text = report.markdown(rows)
    verdict = report.verdict(rows)
    report.save(rows, f"{text}\n\n{verdict}\n", output)
    plot.save(rows, output / "comparison.png")
    print(f"\n{text}\n\n{verdict}\n")
    files = [name for name in ("examples.png", "examples.md") if _draw(rows, tested, output / name)]
    print(f"saved: {', '.join([f'{output}/comparison.md, .csv, .png and runs.csv', *files])}")


def _draw(rows: list[Row], tested: dict[str, Tested], path: Path) -> bool:
    """Whether the examples were drawn, or told; what keeps them from it is said, and no reason to lose a comparison."""
    try:
        return (examples.write if path.suffix == ".md" else examples.save)(rows, tested, path)
    except Exception as error:  # of a task or data of someone's own
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__}, {Path(place.filename).name}, line {place.lineno}"
        print(f"{path.name} is left out: {error} ({where})")
        return False


def read(file: str, teacher_checkpoint: str | None, overrides: list[str]) -> DistillationCLI:
    """One configuration, parsed.

    Raises:
        UsageError: If the configuration does not distil, or the teacher that is given is not there.
    """
    if teacher_checkpoint is not None:
        if not Path(teacher_checkpoint).is_file():
            raise UsageError(f"--teacher: no checkpoint at {teacher_checkpoint}")
        given = ["--teacher_fit", "null", "--model.teacher.init_args.checkpoint", teacher_checkpoint]
        overrides = [*overrides, *given]
    cli = DistillationCLI(["--config", file, *overrides], run=False, make=False)
    settings = settings_of(cli)
    model = settings["model"]
    if (settings["trainer"] or {}).get("fast_dev_run"):
        raise UsageError(
            "compare trains whole runs, and a fast_dev_run would be measured in their place. Each configuration is "
            "tried on one batch first anyway; or take `lightning-kd fit` for it"
        )
    if cli.own_config.get("ckpt_path"):
        raise UsageError(
            f"{file}: ckpt_path is of one run that is gone on with or measured, and compare trains its own; leave it "
            "out, or measure a student's weights beside them: --student-ckpt FILE"
        )
    standing = (model.get("teacher") or {}).get("class_path") in STANDING
    teacher.refuse_untrained(cli.own_config)
    teacher.refuse_schedule(cli.own_config)
    teacher.note_fresh(model)
    if not model.get("terms") or (standing and not teacher.standing(model)):
        raise UsageError(
            f"{file}: compare needs terms, and a teacher: a lightning_kd.teachers.Frozen with a model, an Ensemble of "
            "such, or one that learns with the student"
        )
    refuse_monitors(file, settings)
    return cli


def refuse_names(names: Sequence[str], weights: Sequence[str]) -> None:
    """Refuse files that are called as a row of the table may be: a row is found by its name.

    Args:
        names: Of the configurations.
        weights: Of the files with weights that are measured, too.

    Raises:
        UsageError: If there is one.
    """
    for option, given, others in (("--config", names, ()), ("--student-ckpt", weights, names)):
        if taken := [each for each in given if ROWS.fullmatch(each) or each in others]:
            raise UsageError(
                f"{option}: {taken[0]!r} is what another row of the table is called, or may be; rename the file"
            )


def refuse_monitors(file: str, settings: Settings) -> None:
    """Refuse what watches a term: the student alone, which is trained by the same, would end the comparison.

    Raises:
        UsageError: If a callback does, or the scheduler of the learning rate.
    """
    scheduler = settings["model"].get("lr_scheduler")
    for each in [*(settings["trainer"].get("callbacks") or []), *([scheduler] if scheduler else [])]:
        monitor = teacher.watched_term(each, settings["model"])
        if monitor and not each["class_path"].startswith(teacher.OUR_CALLBACKS):
            raise UsageError(
                f"{file}: {each['class_path'].rpartition('.')[2]} monitors {monitor!r}, a term, and the student alone, "
                "which is trained by the same, has none. Monitor what both have: val/loss, train/task, or a metric of "
                "the task"
            )


def settings_of(cli: DistillationCLI) -> Settings:
    """What decides a run."""
    settings = cli.plain_config
    return {k: v for k, v in settings.items() if k in ("seed_everything", "trainer", "data", "model")}


def compare(
    configs: dict[str, Settings],
    tasks: dict[str, Any],
    seeds: list[int] | None,
    students: list[Path],
    output: Path,
) -> tuple[list[Row], dict[str, Tested]]:
    """Train and measure everything; a row each, with what it costs, and by its name the network of its first seed.

    Args:
        configs: What decides the runs, by the configuration's name.
        tasks: Of each configuration the task of its teacher, where that is another than the student's.
        seeds: Seeds; the configuration's own unless given.
        students: Weights of students to measure, too.
        output: Folder for the runs.
    """
    runs = output / "runs"
    teachers: dict[str, Row] = {}
    alone: dict[tuple[str, str], Row] = {}
    others: list[Row] = []
    tested: dict[str, Tested] = {}

    def row(name: str, role: str, each_seed: dict[int, Tested], baseline: str = "") -> Row:
        assert name not in tested, name  # by which a row is found
        first = tested[name] = next(iter(each_seed.values()))
        metrics = {seed: t.metrics for seed, t in each_seed.items()}
        return Row(name, role, metrics, baseline, main=first.main, higher=first.higher, fraction=first.fraction)

    for name, settings in configs.items():
        standing = teacher.standing(settings["model"])
        for network, checkpoint in ((one["model"], one.get("checkpoint")) for one in standing):
            key = fingerprint({"network": network, "checkpoint": checkpoint, "data": settings["data"]})
            if key not in teachers:
                # At the student's task it is measured in agreement with the ensemble that it may belong to.
                taught = teacher.alone(settings) if tasks[name] else settings
                own = {"student": network, "task": tasks[name] or settings["model"]["task"]}
                taught = taught | {"model": taught["model"] | own}
                title = f"teacher{_number(teachers)}"
                weights = Path(expand_path(checkpoint)) if checkpoint else None
                teachers[key] = row(title, "teacher", {0: Tested(taught, weights, runs)})
                teachers[key].itself = len(standing) == 1
        seeded = seeds or [settings["seed_everything"]]
        single = teacher.alone(settings)
        # What agrees with a teacher is measured with it; teachers that learn with the student are not there any more.
        measuring = settings if standing else single
        kind = pydoc.locate(settings["model"]["task"]["class_path"])
        alone_measuring = single if getattr(kind, "with_teacher", False) else measuring
        networks = [single["model"]["student"], *peers(settings)]
        each_seed = {seed: fit(settings | {"seed_everything": seed}, runs, f"{name}, seed {seed}") for seed in seeded}
        for i, network in enumerate(networks):
            own = single | {"model": single["model"] | {"student": network}}
            measured_by = own if i else alone_measuring
            training = fingerprint(own | {"seed_everything": seeded})
            # Beside another teacher the same networks agree otherwise: they are trained once, and measured again.
            beside = training, fingerprint({"teacher": measured_by["model"].get("teacher")})
            if beside not in alone:
                title = f"{name}, peer {i} alone" if i else f"student alone{_number(alone)}"
                if before := next((row.name for (known, _), row in alone.items() if known == training), None):
                    title = f"{before}, teacher of {name}"
                alone[beside] = row(title, "alone", _train(title, own, measured_by, seeded, runs))
            found = {
                seed: Tested((own if i else measuring) | {"seed_everything": seed}, peer_file(file, i), runs)
                for seed, file in each_seed.items()
            }
            others.append(row(f"{name}, peer {i}" if i else name, "distilled", found, baseline=alone[beside].name))
    first = next(iter(configs.values()))
    for path in students:
        others.append(row(str(path), "given", {0: Tested(first, path, runs)}))
    rows = [*teachers.values(), *alone.values(), *others]
    _add_costs(rows, tested)
    return rows, tested


def peers(settings: Settings) -> list[Any]:
    """Return the networks that learn beside the student."""
    found: list[Any] = (settings["model"]["teacher"].get("init_args") or {}).get("peers") or []
    return found


def _train(name: str, training: Settings, measuring: Settings, seeds: list[int], runs: Path) -> dict[int, Tested]:
    """Train under every seed; measure in agreement with the teacher, which the student alone never met."""
    tested = {}
    for seed in seeds:
        checkpoint = fit(training | {"seed_everything": seed}, runs, f"{name}, seed {seed}")
        tested[seed] = Tested(measuring | {"seed_everything": seed}, checkpoint, runs)
    return tested


def _number(so_far: Sized) -> str:
    return f" {len(so_far) + 1}" if so_far else ""


def _add_costs(rows: list[Row], tested: dict[str, Tested]) -> None:
    """Networks of one architecture share the numbers: measured apart, they would differ by chance."""
    kinds, networks = {}, {}
    for row in rows:
        network, example, recipe = tested[row.name].network()
        kinds[row.name] = kind = fingerprint({"recipe": recipe, "called": costs.architecture(network, example)})
        networks[kind] = network, example
    # What a network is called with is not known if it is no tensors: `student(**batch)`.
    latency = costs.latency_ms({kind: found for kind, found in networks.items() if found[1]})
    for row in rows:
        kind = kinds[row.name]
        row.costs = costs.count(*networks[kind]) | ({"latency_ms": latency[kind]} if kind in latency else {})
