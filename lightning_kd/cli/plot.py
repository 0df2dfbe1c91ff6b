"""The picture of a comparison: how good against how costly, and every seed's result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_kd.cli.report import Row, higher_is_better, in_percent, mean_std, metric_names

COLOURS = {"teacher": "#3b4252", "alone": "#9aa5b1", "given": "#b48ead"}
DISTILLED = ("#2a78b5", "#2f9e6e", "#d0782a", "#a2497b", "#7a6ff0")


def save(rows: Sequence[Row], path: Path) -> None:
    """Draw the main metric of every row: one dot per seed, a bar for the mean, the teacher as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - of an extra
    from matplotlib.figure import Figure  # noqa: PLC0415

    panels = metric_names(rows)[:3]
    students = [row for row in rows if row.role != "teacher"]
    figure = Figure(figsize=(4.2 * len(panels) + 0.4, 1.7 + 0.55 * len(students)), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, panels, strict=True):
        _panel(axis, rows, students, metric)
    labels = [f"{row.name}\n{_short(row.costs.get('parameters', 0))} parameters" for row in students]
    axes[0].set_yticks(range(len(students)), labels)
    figure.suptitle("Teacher, student alone, and distilled", x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.savefig(path)


def _panel(axis: Any, rows: Sequence[Row], students: Sequence[Row], metric: str) -> None:
    scale = 100 if in_percent(rows, metric) else 1
    colours = iter(DISTILLED * len(students))
    for height, row in enumerate(students):
        colour = COLOURS.get(row.role) or next(colours)
        values = [scale * v for v in row.values(metric)]
        if not values:
            continue
        mean, _ = mean_std(values)
        axis.plot([mean, mean], [height - 0.28, height + 0.28], color=colour, linewidth=3.5, solid_capstyle="round")
        axis.scatter(values, [height] * len(values), s=34, color=colour, alpha=0.55, linewidths=0, zorder=3)
        axis.annotate(
            f"{mean:.1f}" if scale == 100 else f"{mean:.3f}",
            (mean, height - 0.3), textcoords="offset points", xytext=(0, 3), ha="center", fontsize=8.5, color=colour,
        )  # fmt: skip
    for teacher in rows:
        values = teacher.values(metric)
        if teacher.role == "teacher" and values and metric != "agreement":
            line = scale * mean_std(values)[0]
            axis.axvline(line, color=COLOURS["teacher"], linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
            axis.annotate(
                f" {teacher.name}", (line, 1.0), xycoords=("data", "axes fraction"), textcoords="offset points",
                xytext=(0, 3), ha="center", fontsize=8, color=COLOURS["teacher"],
            )  # fmt: skip
    axis.set_ylim(len(students) - 0.4, -0.65)
    axis.margins(x=0.12)
    better = {True: "  (higher is better)", False: "  (lower is better)", None: ""}[higher_is_better(rows, metric)]
    name = metric.replace("_", " ") + (" with the teacher" if metric == "agreement" else "")
    unit = ", %" if scale == 100 else ""
    axis.set_xlabel(f"{name}{unit}{better}", fontsize=9)
    axis.grid(axis="x", color="#e6e9ee", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=9)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#c9ced6")


def _short(number: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.0f}"
