"""What a step costs through each door, against the same losses by hand and in torchdistill's training box.

The same student learns from the same teacher, on one random batch, in each of these ways: alone, in a plain PyTorch
loop and in a plain LightningModule with the losses written by hand, with the `Distillation` callback, in a
`DistillationModule`, and by torchdistill. All ways train in turn, in one process, so that the machine's moods meet them
all; told are medians, and ratios to the LightningModule by hand with their range over the rounds. The time of a step is
that between two steps' ends: on a CPU the process's own, which other processes disturb less than the clock, on a GPU
the clock's, between synchronisations. Peak memory is what the GPU's allocator says; on a CPU, the highest sum of bytes
in tensors, by torch's profiler.

    python benchmarks/step_cost.py --output benchmarks/results/step_cost
"""

import argparse
import itertools
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _machine import about
from _peak import cpu_peak
from _ways import BY_HAND, WAYS
from _work import CASES, Work

WARM_UP = 3
"""Steps that are not counted."""

Row = dict[str, float]


class Clock:
    """Notes when steps end; by the clock where a process waits for others, or for a GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.now = time.perf_counter if self.cuda or "WORLD_SIZE" in os.environ else time.process_time
        self.times: list[float] = []

    def tick(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.times.append(self.now())

    def step(self) -> float:
        """The median of the steps' times."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.times[WARM_UP - 1 :]))


def peak(way: str, work: Work, bf16: bool) -> float:
    def few() -> None:
        WAYS[way](work, WARM_UP, bf16, lambda: None)

    if work.device == "cpu":
        return cpu_peak(few)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    few()
    return float(torch.cuda.max_memory_allocated())


def measure(
    work: Work, bf16: bool, steps: int, rounds: int, ways: Sequence[str] = (*WAYS,), against: str = BY_HAND
) -> dict[str, Row]:
    """Of each way its seconds for a step and its peak memory, and their ratios to one of the ways."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            clock = Clock(work.device)
            WAYS[way](work, steps + WARM_UP, bf16, clock.tick)
            seconds[way].append(clock.step())
    peaks = {way: peak(way, work, bf16) for way in ways}
    found = {}
    for way in ways:
        ratios = [a / b for a, b in zip(seconds[way], seconds[against], strict=True)]
        found[way] = {
            "seconds": statistics.median(seconds[way]),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "peak_bytes": peaks[way],
            "peak_ratio": peaks[way] / peaks[against],
        }
    return found


def table(case: str, rows: dict[str, Row]) -> str:
    lines = [f"{case}:", "", "| way | step | x by hand (range) | peak memory | x by hand |", "|---|---|---|---|---|"]
    for way, row in rows.items():
        spread = f"{row['ratio']:.3f} ({row['ratio_min']:.3f} to {row['ratio_max']:.3f})"
        memory = f"{row['peak_bytes'] / 2**20:.0f} MiB | {row['peak_ratio']:.3f}"
        lines.append(f"| {way} | {row['seconds'] * 1e3:.1f} ms | {spread} | {memory} |")
    return "\n".join(lines)


def plot(cases: dict[str, dict[str, Row]], file: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415 - where a plot is drawn

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - behind the backend

    figure, axes = plt.subplots(figsize=(7, 0.9 * len(cases) + 1.2), layout="constrained")
    shown = [way for way in WAYS if way != BY_HAND]
    for i, way in enumerate(shown):
        there = [(j, rows[way]) for j, rows in enumerate(cases.values()) if way in rows]
        places = [j + (i - len(shown) / 2 + 0.5) * 0.15 for j, _ in there]
        ratios = [row["ratio"] for _, row in there]
        ends = [
            [row["ratio"] - row["ratio_min"] for _, row in there],
            [row["ratio_max"] - row["ratio"] for _, row in there],
        ]
        axes.errorbar(ratios, places, xerr=ends, fmt="o", markersize=4, capsize=2, label=way)
    axes.axvline(1.0, color="grey", linewidth=1)
    axes.set_yticks(range(len(cases)), list(cases))
    axes.invert_yaxis()
    axes.set_xlabel("time of a step, as a multiple of the LightningModule by hand")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def save(here: dict[str, Any], cases: dict[str, dict[str, Row]], output: Path) -> None:
    text = "\n\n".join(table(title, rows) for title, rows in cases.items())
    output.with_suffix(".json").write_text(json.dumps(here | {"cases": cases}, indent=1) + "\n")
    output.with_suffix(".md").write_text(f"# Cost of a step\n\n{here}\n\n{text}\n")
    plot(cases, output.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES], metavar="CASE", help="all by default")
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bf16"], default=["float32", "bf16"])
    parser.add_argument("--steps", type=int, default=6, help=f"steps per round, behind {WARM_UP} that are not counted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="path of the figures, to which .json, .md and .png are added")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    here = about() | {"steps": options.steps, "rounds": options.rounds}
    print(here)
    found: dict[str, dict[str, Row]] = {}
    for case, precision in itertools.product(options.cases, options.precisions):
        torch.manual_seed(0)
        work = CASES[case]()
        title, bf16 = f"{case}, {precision}", precision == "bf16"
        ways = [way for way in WAYS if not (bf16 and way == "torchdistill")]  # which casts by another library alone
        found[title] = measure(work, bf16, options.steps, options.rounds, ways)
        print(f"\n{table(title, found[title])}", flush=True)
        if options.output:  # so far: a long run may be stopped
            save(here, found, options.output)


if __name__ == "__main__":
    main()
