"""The rule that nothing is skipped in CI, on a small test run of its own."""

from pathlib import Path

import pytest

SOURCE = """
import pytest

def test_runs():
    pass

def test_real_data(data_dir):
    pass

@pytest.mark.skip(reason="not today")
def test_marked():
    pass

def test_skips_itself():
    pytest.skip("not here")

@pytest.mark.xfail(reason="known")
def test_known_failure():
    assert False

@pytest.mark.gpu
def test_gpu():
    pytest.skip("no device")
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("LIGHTNING_KD_DATA", str(pytester.path / "absent"))
    pytester.makeini("[pytest]\nmarkers = gpu: needs a device\n")
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile(SOURCE)
    return pytester


def test_skips_are_allowed_outside_ci(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    result = suite.runpytest_subprocess("-rs")
    result.assert_outcomes(passed=1, skipped=4, xfailed=1)
    result.stdout.fnmatch_lines(["*No real data in*absent*LIGHTNING_KD_DATA*"])


def test_skips_fail_in_ci_unless_a_gpu_is_missing(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    suite.makepyfile(test_module="import pytest\npytest.importorskip('no_such_module')\n")
    result = suite.runpytest_subprocess("--continue-on-collection-errors")
    result.assert_outcomes(passed=1, skipped=1, xfailed=1, failed=1, errors=3)
    result.stdout.fnmatch_lines(["*only tests marked `gpu` may skip*No real data in*absent*"])
