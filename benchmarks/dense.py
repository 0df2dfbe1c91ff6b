"""What the divergence of two maps costs, forward and backward, against the chain of torch's own functions.

The chain is what one writes by hand: ``kl_div(log_softmax(s / T), log_softmax(t / T), log_target=True)``. Both are run
in turn; medians, and ratios of each pair, are printed. Time is processor time on the CPU, wall time between
synchronisations on a GPU. Memory is the peak of what is allocated beside the two maps. On a GPU both ways are measured,
block by block and Triton's kernels, and the share of the memory's bandwidth that is used: what a map is copied with,
against reading both maps twice and writing the gradient once.

    python benchmarks/dense.py --rounds 15
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _machine import about
from _peak import cpu_peak
from torch import Tensor
from torch.nn import functional as F

from lightning_kd import functional

TEMPERATURE = 4.0
SHAPES = {"cpu": [(2, 19, 256, 512), (1, 150, 256, 256)], "cuda": [(8, 19, 512, 1024), (8, 150, 512, 512)]}


def kd_by_hand(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = ((x.float() / TEMPERATURE).log_softmax(1) for x in (student, teacher))
    positions = student.numel() // student.shape[1]
    return TEMPERATURE**2 * F.kl_div(s, t, reduction="sum", log_target=True) / positions


def cwd_by_hand(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = ((x.float() / TEMPERATURE).flatten(2).log_softmax(2) for x in (student, teacher))
    return TEMPERATURE**2 * F.kl_div(s, t, reduction="sum", log_target=True) / student.shape[:2].numel()


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "KD": (lambda s, t: functional.kd(s, t, TEMPERATURE), kd_by_hand),
    "CWD": (lambda s, t: functional.cwd(s, t, TEMPERATURE), cwd_by_hand),
}


def seconds(run: Callable[[], None], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    now = time.perf_counter if cuda else time.process_time
    started = now()
    run()
    if cuda:
        torch.cuda.synchronize()
    return now() - started


def peak(run: Callable[[], None], cuda: bool) -> float:
    if not cuda:
        return cpu_peak(run)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return float(torch.cuda.max_memory_allocated() - before)


def copied_per_second(x: Tensor) -> float:
    """Return how many bytes a GPU moves each second, read or written."""
    to, run = torch.empty_like(x), []
    for _ in range(12):
        run.append(seconds(lambda: to.copy_(x), cuda=True))
    return 2 * x.numel() * x.element_size() / statistics.median(run[2:])


def compare(loss: str, shape: tuple[int, ...], dtype: torch.dtype, rounds: int, device: str) -> dict[str, Any]:
    student = torch.randn(shape, device=device).to(dtype).requires_grad_()
    teacher = torch.randn(shape, device=device).to(dtype)

    def runner(function: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            student.grad = None
            function(student, teacher).backward()

        return run

    ours, theirs = map(runner, CASES[loss])
    cuda = device == "cuda"
    times = [(seconds(ours, cuda), seconds(theirs, cuda)) for _ in range(rounds + 2)][2:]
    student.grad = None
    peaks = [peak(run, cuda) for run in (ours, theirs)]
    moved = 5 * student.numel() * student.element_size()
    took = statistics.median(a for a, _ in times)
    share = moved / took / copied_per_second(student.detach()) if cuda else None
    ratios = sorted(b / a for a, b in times)
    return {
        "loss": loss,
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": took,
        "share_of_bandwidth": share,
        "times_faster": statistics.median(ratios),
        "times_faster_min": ratios[0],
        "times_faster_max": ratios[-1],
        "peak_bytes": peaks[0],
        "times_less_memory": peaks[1] / peaks[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{about()}\n")
    columns = "loss", "way", "logits", "type", "forward + backward", "times faster (min .. max)", "memory", "times less"
    print(f"| {' | '.join(columns)} | bandwidth |\n|{'---|' * 9}")
    rows = []
    ways = {"blocks": "0", "kernels": "1"} if device == "cuda" else {"blocks": "0"}
    for loss, shape, dtype, way in itertools.product(CASES, SHAPES[device], (torch.float32, torch.bfloat16), ways):
        os.environ["LIGHTNING_KD_TRITON"] = ways[way]
        row = compare(loss, shape, dtype, options.rounds, device) | {"way": way}
        rows.append(row)
        size = " x ".join(map(str, shape))
        spread = f"{row['times_faster']:.2f} ({row['times_faster_min']:.2f} .. {row['times_faster_max']:.2f})"
        share = row["share_of_bandwidth"]
        print(
            f"| {loss} | {way} | {size} | {row['dtype']} | {row['seconds'] * 1e3:.1f} ms | {spread} "
            f"| {row['peak_bytes'] / 2**20:.0f} MiB | {row['times_less_memory']:.2f} "
            f"| {'' if share is None else f'{100 * share:.0f} %'} |"
        )
    if options.output:
        options.output.write_text(json.dumps(about() | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
