"""Where something is measured, by its name."""

import platform
from pathlib import Path
from typing import Any

import torch


def about() -> dict[str, Any]:
    """Return the GPU, or else the processor and its instructions; the threads; and torch's version."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {"machine": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _processor() -> str:
    told = Path("/proc/cpuinfo")  # of Linux; platform.processor() says nothing there
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return f"{model or platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
