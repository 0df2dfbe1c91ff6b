"""Tasks as they are started from a configuration: in two processes, and resumed, with their shuffled data."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run_script

from lightning_kd.cli import main

TEACHER = ["--teacher_fit.max_epochs", "1"]
CONFIGS = {
    "scenes_detection_cwd": TEACHER,
    "scenes_segmentation_cwd": TEACHER,
    "scenes_pose_simcc": TEACHER,
    "textures_stfpm": TEACHER,
    "digits_retrieval_leaf": [*TEACHER, "--trainer.limit_train_batches", "4"],
    # A network that knows nothing yet is sure of nothing, so everything that it finds has to pass.
    "scenes_detection_self_training": [
        "--data.init_args.labelled", "0.5", "--model.task.init_args.burn_in", "0",
        "--model.task.init_args.score", "0.02", "--model.student.init_args.score_thresh", "0.01",
    ],
}  # fmt: skip
SMALL = [
    "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1", "--trainer.check_val_every_n_epoch", "2",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    "--trainer.accelerator", "cpu",
    "--trainer.callbacks+", "lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.save_top_k", "-1", "--trainer.callbacks.filename", "{epoch}",
    "--trainer.callbacks.save_on_train_epoch_end", "true",
]  # fmt: skip
SIZES = ["--data.init_args.train_size", "16", "--data.init_args.val_size", "4", "--data.init_args.batch_size", "4"]


def steps(folder: Path) -> list[dict[str, str]]:
    """What was logged of each step of training."""
    (file,) = folder.rglob("metrics.csv")
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["train/loss"]]
    return [{key: value for key, value in row.items() if key.startswith("train/") or key == "step"} for row in rows]


@pytest.mark.slow
# Lightning's own, of a run that is resumed into another folder: what it forgets is which checkpoints were best.
@pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_in_two_processes_and_resumed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    limited = "--trainer.limit_train_batches" in CONFIGS[name]  # data that comes in one size
    fit = ["fit", "--config", name, *SMALL, *([] if limited else SIZES), *CONFIGS[name]]
    assert main([*fit, "--trainer.default_root_dir", "whole", "--traceback"]) == 0
    (half,), (end,) = Path("whole").rglob("epoch=0.ckpt"), Path("whole").rglob("epoch=1.ckpt")
    assert main([*fit, "--trainer.default_root_dir", "rest", "--ckpt_path", str(half), "--traceback"]) == 0
    (resumed,) = Path("rest").rglob("epoch=1.ckpt")
    one, other = (torch.load(file, weights_only=True) for file in (end, resumed))
    assert steps(Path("whole"))[4:] == steps(Path("rest"))
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(other[part], one[part], rtol=0, atol=0)
    assert str(other["random_state"]) == str(one["random_state"])
    learned = [[v["learned"] for v in c["callbacks"].values() if "learned" in v] for c in (one, other)]
    torch.testing.assert_close(*learned, rtol=0, atol=0)

    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.default_root_dir", "two"]
    if name == "scenes_pose_simcc":  # as users start it; the others save the time of importing
        command = [sys.executable, "-m", "lightning_kd", *fit, *two]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        script = "import sys\nfrom lightning_kd.cli import main\nsys.exit(main())"
        run_script(script, *fit, *two, folder=tmp_path, ranks=2)
    together = steps(Path("two"))
    assert len(together) == (8 if limited else 4)  # of 16 images, twice, 4 in each process
    assert all(float(value) > 0 for step in together for key, value in step.items() if key != "step"), together
