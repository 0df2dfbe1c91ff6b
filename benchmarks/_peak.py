"""Peak memory on the CPU, as torch sees it."""

import gc
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def cpu_peak(run: Callable[[], Any]) -> float:
    """Return the highest sum of bytes that torch allocated during a run and had not freed yet."""
    gc.collect()  # what was left before must not be freed, and counted, in it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]  # set while it recorded
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return float(peak)
