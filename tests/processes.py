"""Runs scripts in processes of their own: forks of one that has imported everything once, which takes most of a run."""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.multiprocessing

IMPORTED = [
    "lightning_kd.callbacks",
    "lightning_kd.cli.command",
    "lightning_kd.data",
    "lightning_kd.models",
    "lightning_kd.tasks",
    "hypothesis",
    "pytest",
    "segmentation_models_pytorch",
    "sklearn.datasets",
    "torchmetrics.detection",
]


def run_script(script: str, *arguments: str, folder: Path, ranks: int | None = None, timeout: int = 300) -> str:
    """Runs a script, with ``folder`` as the working directory, and returns what it wrote.

    Args:
        script: Its text.
        arguments: Of its command line.
        folder: Where it runs.
        ranks: Run so many of it, as ``torchrun`` does; one process that knows nothing of others unless given.
        timeout: Seconds after which it has failed.

    Raises:
        AssertionError: If one of the processes does not end with 0.
    """
    file = folder / "script.py"
    file.write_text(script)
    multiprocessing.set_forkserver_preload(IMPORTED)
    context = multiprocessing.get_context("forkserver")
    logs = [folder / f"rank{rank}.log" for rank in range(ranks or 1)]
    environments = [{}] if ranks is None else [*_as_torchrun(ranks)]
    processes = [
        context.Process(target=_run, args=(file, arguments, log, environment))
        for log, environment in zip(logs, environments, strict=True)
    ]
    with ExitStack() as stack:
        for process in processes:
            process.start()
            stack.callback(process.kill)
        for process in processes:
            process.join(timeout)
    said = "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in logs if log.exists())
    assert [process.exitcode for process in processes] == [0] * len(processes), said
    return said


def _as_torchrun(ranks: int) -> Iterator[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(ranks):
        found = {
            "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "ROLE_RANK": rank,
            "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "ROLE_WORLD_SIZE": ranks, "GROUP_WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": port,
        }  # fmt: skip
        yield {key: str(value) for key, value in found.items()}


def _run(file: Path, arguments: tuple[str, ...], log: Path, environment: dict[str, str]) -> None:
    with log.open("w") as written:
        for stream in (1, 2):
            os.dup2(written.fileno(), stream)
    multiprocessing.set_forkserver_preload(IMPORTED)
    start_processes = torch.multiprocessing.start_processes

    def fork(*given: Any, start_method: str, **others: Any) -> Any:  # what is spawned, too; as before it is pickled
        return start_processes(*given, start_method="forkserver", **others)

    torch.multiprocessing.start_processes = fork
    os.environ.update(environment)
    os.chdir(file.parent)
    sys.argv = [str(file), *arguments]
    runpy.run_path(str(file), run_name="__main__")
