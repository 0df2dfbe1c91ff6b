"""Lint, format, types and the strict build of the documentation: `python -m pytest` is the whole truth."""

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("ruff check --no-cache .", id="lint"),
        pytest.param("ruff format --no-cache --check .", id="format"),
        pytest.param("mypy", id="types", marks=pytest.mark.slow),
        pytest.param("mkdocs build --quiet --strict --site-dir {tmp}", id="docs", marks=pytest.mark.slow),
    ],
)
def test_quality(command: str, tmp_path: Path) -> None:
    args = [part.format(tmp=tmp_path) for part in command.split()]
    done = subprocess.run(
        [sys.executable, "-m", *args], cwd=REPO, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
