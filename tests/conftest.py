"""What every test shares: threads, seeds, the real data, and the rule that nothing is skipped in CI."""

import os
from collections.abc import Generator
from pathlib import Path

# Before torch is imported, and inherited by the processes that tests start.
WORKER = "PYTEST_XDIST_WORKER" in os.environ  # it has what its parent set
THREADS = "1" if WORKER else os.environ.get("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
os.environ["OMP_NUM_THREADS"] = THREADS
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that downloads is a mistake

import pytest
import torch

pytest_plugins = ["pytester"]

REPO = Path(__file__).parents[1]
CI = os.environ.get("CI", "").lower() in {"1", "true"}

torch.set_num_threads(int(THREADS))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Give the folder of the real data: `LIGHTNING_KD_DATA`, or `../shared/data` beside the repository."""
    folder = Path(os.environ.get("LIGHTNING_KD_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"No real data in {folder}: set LIGHTNING_KD_DATA to the folder that holds it.")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"With CI=true only tests marked `gpu` may skip. {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not item.get_closest_marker("gpu"):
        _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield  # a module that skips itself, as with `importorskip`
    _fail_if_skipped(report)
    return report
