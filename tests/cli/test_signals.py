"""What ends a command from outside: Ctrl-C, and SIGTERM, by which schedulers end a job."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_run import ALONE
from toy_run import Net, configuration

from lightning_kd.cli import main

MARK = Path("called")
COMMAND = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "runpy.run_module('lightning_kd', run_name='__main__', alter_sys=True)"
)
"""What was started in the background ignores Ctrl-C, and so do its children: a run of the tests, for one."""
BOTH = pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


class Slow(Net):
    """Takes its time to learn, and leaves a mark."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and "SLOW" in os.environ:
            MARK.touch()
            time.sleep(0.02)
        return super().forward(x)


def interrupted(sent: signal.Signals, after: str, *arguments: str) -> tuple[int, str, str]:
    """How a command ends that is sent a signal while it trains, after it has written a line: code, output, errors."""
    paths = os.pathsep.join(str(Path(__file__).parents[up]) for up in range(3))
    environment = os.environ | {"SLOW": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths}
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert any(after in line for line in process.stdout), process.communicate()
            MARK.unlink(missing_ok=True)
            until = time.monotonic() + 100
            while not MARK.exists() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            process.send_signal(sent)
            out, err = process.communicate(timeout=100)
        finally:
            process.kill()
    return process.returncode, out, err


@pytest.mark.slow
@BOTH
def test_an_interrupted_fit_is_none_that_ended(
    sent: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = configuration("mine")
    how = [f"--model.student={__name__}.Slow", "--trainer.max_epochs=500", "--trainer.enable_progress_bar=true"]
    returned, out, err = interrupted(sent, "epoch 50", "fit", "--config", config, *ALONE, *how)
    assert returned == code, err
    assert err.splitlines()[-1] == "lightning-kd: interrupted; --ckpt_path goes on from a checkpoint that was written"
    assert "student saved" not in out
    assert list(Path("runs").rglob("*.ckpt"))


@pytest.mark.slow
@BOTH
def test_an_interrupted_comparison_goes_on(
    sent: signal.Signals,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", "--config", configuration("mine"), f"--model.student={__name__}.Slow", "--output", "out"]
    arguments += ["--trainer.max_epochs", "50"]
    returned, out, err = interrupted(sent, "student alone, seed 0: training", *arguments)
    assert returned == code, err
    assert err.splitlines()[-1].startswith("lightning-kd: interrupted; what was finished stays, and the same command")
    assert "saved:" not in out
    assert main([*arguments, "--traceback"]) == 0
    told = capsys.readouterr().out
    assert "mine, seed 0: trained before" in told
    assert "student alone, seed 0: training" in told


class Told(Net):
    """Is told to end while it trains, or while it is measured."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        handled = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # or the tests would end
        now = "training" if self.training else "measured" if torch.is_inference_mode_enabled() else ""
        if handled and os.environ.get("TOLD") == now:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(x)


@pytest.mark.parametrize(("told", "begun"), [("training", 0), ("measured", 2)])
def test_a_signal_in_the_last_batch_of_a_run_ends_a_comparison(
    told: str, begun: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning ends such a run as if nothing was, and the next one would begin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOLD", told)
    how = [f"--model.student={__name__}.Told", "--trainer.limit_val_batches", "0"]
    assert main(["compare", "--config", configuration("mine"), *how, "--output", "out"]) == 143
    out, err = capsys.readouterr()
    assert out.count("seed 0: training") == begun
    assert "interrupted" in err
    assert not Path("out", "runs.csv").exists()
