"""The table of a comparison, and the sentence that says what was gained."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

COSTS = {
    "parameters": ("parameters", 1.0, ",.0f"),
    "flops": ("MFLOPs", 1e-6, ",.2f"),
    "latency_ms": ("latency, ms", 1.0, ".2f"),
    "size_bytes": ("size, kB", 1 / 1024, ",.0f"),
}


@dataclass
class Row:
    """One line of the table: the same recipe under several seeds.

    Args:
        name: What it is called.
        role: ``teacher``, ``alone``, ``distilled`` or ``given``.
        metrics: By seed, the test metrics.
        baseline: Name of the row of the same student alone.
        costs: What the network costs: the keys of ``COSTS``.
        main: The metric that counts most; the first unless said, by its name.
        higher: Of metrics, whether more is better; None, or not there, where that is not known.
        fraction: Of metrics, whether they may be fractions by their bounds; likewise.
        itself: Whether the teacher with which it agrees is itself.
    """

    name: str
    role: str
    metrics: dict[int, dict[str, float]]
    baseline: str = ""
    costs: dict[str, float] = field(default_factory=dict)
    main: str = ""
    higher: dict[str, bool | None] = field(default_factory=dict)
    fraction: dict[str, bool | None] = field(default_factory=dict)
    itself: bool = False

    def values(self, metric: str) -> list[float]:
        """The metric under each seed, where it was measured."""
        return [m[metric] for m in self.metrics.values() if metric in m]


def metric_names(rows: Sequence[Row], details: bool = False) -> list[str]:
    """All metrics that were measured, the main one first; the loss, where a task has no metrics.

    Args:
        rows: Where they were measured.
        details: Whether to name those of single classes, too, which have a slash in their name.
    """
    names = [name for row in rows for m in row.metrics.values() for name in m if details or "/" not in name]
    seen = dict.fromkeys([name for name in names if name != "loss"] or names)
    main = next((row.main for row in rows if row.main), "")
    return sorted(seen, key=lambda name: (name != main, name != "agreement")) if main in seen else list(seen)


def higher_is_better(rows: Iterable[Row], metric: str) -> bool | None:
    """Whether more of a metric is better; None where that is not known."""
    return next((row.higher[metric] for row in rows if metric in row.higher), None)


def in_percent(rows: Sequence[Row], metric: str) -> bool:
    """Whether a metric is a fraction of what is right: more is better, and neither bounds nor values say otherwise."""
    if not higher_is_better(rows, metric) or any(row.fraction.get(metric) is False for row in rows):
        return False
    return all(0.0 <= value <= 1.0 for row in rows for value in row.values(metric) if not math.isnan(value))


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; that of one value is not a number, as both are where a value is not.

    Example:
        >>> mean_std([1.0, 3.0])
        (2.0, 1.4142135623730951)
    """
    if any(map(math.isnan, values)):  # what statistics.stdev stumbles over
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def markdown(rows: Sequence[Row]) -> str:
    """The table, aligned for a terminal, in Markdown."""
    names = metric_names(rows)
    percent = {name for name in names if in_percent(rows, name)}
    head = ["", *(f"{n.replace('_', ' ')}{', %' if n in percent else ''}" for n in names)]
    lines = [[*head, *(title for title, _, _ in COSTS.values())]]
    perfect = 0.0 if higher_is_better(rows, "agreement") is False else 1.0
    itself = [row.name for row in rows if row.itself and row.values("agreement") == [perfect]]
    for row in rows:
        metrics = [_spread(row.values(n), 100 if n in percent else 1, 2 if n in percent else 4) for n in names]
        metrics = ["" if n == "agreement" and row.name in itself else m for n, m in zip(names, metrics, strict=True)]
        costs = [format(row.costs[k] * scale, form) if k in row.costs else "" for k, (_, scale, form) in COSTS.items()]
        lines.append([row.name, *metrics, *costs])
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * width[0], *("-" * (w - 1) + ":" for w in width[1:])]
    table = [_line(line, width) for line in (lines[0], rule, *lines[1:])]
    return "\n".join([*table, "", _caption(rows)])


def _line(cells: Sequence[str], width: Sequence[int]) -> str:
    first = cells[0].ljust(width[0])
    return "| " + " | ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], width[1:], strict=True))]) + " |"


def _spread(values: Sequence[float], scale: float, digits: int) -> str:
    if not values:
        return ""
    mean, std = mean_std([scale * v for v in values])
    return f"{mean:.{digits}f}" if math.isnan(std) else f"{mean:.{digits}f} ± {std:.{digits}f}"


def _caption(rows: Sequence[Row]) -> str:
    seeds = max((list(row.metrics) for row in rows), key=len)
    spread = f"mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    agreement = "Agreement: with the teacher. " if "agreement" in metric_names(rows) else ""
    return (
        f"Test data; {spread}. {agreement}MFLOPs: forward pass of one input, a multiply-add is two. "
        "Latency: median of one input on this machine's CPU; compare within this table only."
    )


def verdict(rows: Sequence[Row]) -> str:
    """What distillation gained, per recipe, in one honest sentence each."""
    by_name = {row.name: row for row in rows}
    return "\n".join(_sentence(row, by_name[row.baseline], rows) for row in rows if row.role == "distilled")


def _sentence(row: Row, alone: Row, rows: Sequence[Row]) -> str:
    metric = metric_names([row])[0]
    scale, unit, digits = (100, " points", 2) if in_percent(rows, metric) else (1, "", 4)
    gains = [scale * (row.metrics[s][metric] - alone.metrics[s][metric]) for s in row.metrics if s in alone.metrics]
    mean, std = mean_std(gains)
    said = f"{row.name}: {mean:+.{digits}f}{unit} of {metric} against the {alone.name}"
    if len(gains) == 1:
        return f"{said}, with one seed: whether that is more than chance cannot be told. Try --seeds 0 1 2."
    higher = higher_is_better(rows, metric)
    wins = sum(g > 0 if higher else g < 0 for g in gains)
    better = f"lower in {wins}" if higher is None else f"better in {wins}"
    from scipy import stats  # noqa: PLC0415 - of an extra

    # Student's t of the paired differences: of three seeds, two standard errors would promise too much.
    half = float(stats.t.ppf(0.975, len(gains) - 1)) * std / math.sqrt(len(gains))
    interval = f"95 % interval {mean - half:+.{digits}f} to {mean + half:+.{digits}f}"
    said += f" (± {std:.{digits}f} over {len(gains)} seeds, {better}; {interval})"
    if abs(mean) <= half:
        return f"{said}: no difference is shown, it may be chance."
    if higher is None:
        return f"{said}: a difference."
    return f"{said}: {'a gain' if (mean > 0) == higher else 'a loss'}."


def save(rows: Sequence[Row], text: str, folder: Path) -> None:
    """Write ``comparison.md``, ``comparison.csv`` (a line per row) and ``runs.csv`` (a line per run)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(text, encoding="utf-8")
    names = metric_names(rows, details=True)
    with (folder / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "role", "seeds", *(f"{n}_{part}" for n in names for part in ("mean", "std")), *COSTS])
        for row in rows:
            spread: list[float | str] = []
            for values in map(row.values, names):
                spread.extend(mean_std(values) if values else ("", ""))
            writer.writerow([row.name, row.role, len(row.metrics), *spread, *(row.costs.get(k, "") for k in COSTS)])
    with (folder / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "role", "seed", *names])
        for row in rows:
            for seed, metrics in row.metrics.items():
                writer.writerow([row.name, row.role, seed, *(metrics.get(n, "") for n in names)])
