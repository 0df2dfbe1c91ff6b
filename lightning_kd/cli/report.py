"""The table of a comparison, and the sentence that says what was gained."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MAIN = "accuracy"
PERCENT = ("accuracy", "agreement")
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
    """

    name: str
    role: str
    metrics: dict[int, dict[str, float]]
    baseline: str = ""
    costs: dict[str, float] = field(default_factory=dict)

    def values(self, metric: str) -> list[float]:
        """The metric under each seed, where it was measured."""
        return [m[metric] for m in self.metrics.values() if metric in m]


def metric_names(rows: Iterable[Row]) -> list[str]:
    """All metrics that were measured, the main one first; the loss, where a task has no metrics."""
    names = [name for row in rows for m in row.metrics.values() for name in m]
    seen = dict.fromkeys([name for name in names if name != "loss"] or names)
    return sorted(seen, key=lambda name: (name != MAIN, PERCENT.index(name) if name in PERCENT else len(PERCENT)))


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; that of one value is not a number.

    Example:
        >>> mean_std([1.0, 3.0])
        (2.0, 1.4142135623730951)
    """
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def markdown(rows: Sequence[Row]) -> str:
    """The table, aligned for a terminal, in Markdown."""
    names = metric_names(rows)
    head = ["", *(f"{n.replace('_', ' ')}{', %' if n in PERCENT else ''}" for n in names)]
    lines = [[*head, *(title for title, _, _ in COSTS.values())]]
    for row in rows:
        metrics = [_spread(row.values(n), 100 if n in PERCENT else 1, 2 if n in PERCENT else 4) for n in names]
        with_itself = "agreement" if row.role == "teacher" and row.values("agreement") == [1.0] else None
        metrics = ["" if n == with_itself else m for n, m in zip(names, metrics, strict=True)]
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
    return "\n".join(_sentence(row, by_name[row.baseline]) for row in rows if row.role == "distilled")


def _sentence(row: Row, alone: Row) -> str:
    metric = metric_names([row])[0]
    scale, unit = (100, " points") if metric in PERCENT else (1, "")
    gains = [scale * (row.metrics[s][metric] - alone.metrics[s][metric]) for s in row.metrics if s in alone.metrics]
    mean, std = mean_std(gains)
    said = f"{row.name}: {mean:+.2f}{unit} of {metric} against the {alone.name}"
    if len(gains) == 1:
        return f"{said}, with one seed: whether that is more than chance cannot be told. Try --seeds 0 1 2."
    higher = metric in PERCENT  # of other tasks' metrics it is not known which way is better
    better = f"better in {sum(g > 0 for g in gains)}" if higher else f"lower in {sum(g < 0 for g in gains)}"
    from scipy import stats  # noqa: PLC0415 - of an extra

    # Student's t of the paired differences: of three seeds, two standard errors would promise too much.
    half = float(stats.t.ppf(0.975, len(gains) - 1)) * std / math.sqrt(len(gains))
    interval = f"95 % interval {mean - half:+.2f} to {mean + half:+.2f}"
    said += f" (± {std:.2f} over {len(gains)} seeds, {better}; {interval})"
    if abs(mean) <= half:
        return f"{said}: no difference is shown, it may be chance."
    return f"{said}: {('a gain' if mean > 0 else 'a loss') if higher else 'a difference'}."


def save(rows: Sequence[Row], text: str, folder: Path) -> None:
    """Write ``comparison.md``, ``comparison.csv`` (a line per row) and ``runs.csv`` (a line per run)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(text, encoding="utf-8")
    names = metric_names(rows)
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
