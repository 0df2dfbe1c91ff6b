"""Poses from the command line to what is delivered."""

import json
from pathlib import Path

import onnxruntime
import pytest
import torch

from lightning_kd.cli import main
from lightning_kd.data import KeypointScenes
from lightning_kd.keypoints import SimCC, decode

TINY = {"batch_size": 4, "train_size": 8, "val_size": 4, "test_size": 6, "size": 32}


@pytest.mark.slow
def test_a_student_is_trained_exported_and_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"backbone": "mobilenetv3_small_050", "stride": 16, "channels": 16}  # joints and size are the data's
    config = {
        "trainer": {"max_epochs": 1, "enable_progress_bar": False},
        "data": {"class_path": "lightning_kd.data.KeypointScenes", "init_args": TINY},
        "model": {
            "task": {"class_path": "lightning_kd.tasks.Pose"},
            "student": {"class_path": "lightning_kd.models.PoseNet", "init_args": options},
        },
    }
    Path("c.yaml").write_text(json.dumps(config))
    assert main(["fit", "--config", "c.yaml", "--traceback"]) == 0
    (checkpoint,) = Path("runs").rglob("*.ckpt")
    assert main(["predict", "--config", "c.yaml", "--ckpt_path", str(checkpoint), "--output", "joints.pt"]) == 0
    joints = torch.load("joints.pt", weights_only=True)
    assert joints.shape == (6, 9, 3)
    assert main(["export", str(checkpoint), "--format", "onnx", "--output", "s.onnx", "--traceback"]) == 0
    session = onnxruntime.InferenceSession("s.onnx", providers=["CPUExecutionProvider"])
    data = KeypointScenes(**TINY)  # type: ignore[arg-type]
    data.setup("test")
    images, _ = data.on_after_batch_transfer(data.splits["test"].__getitems__(list(range(6))), 0)
    bins = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    places, _ = decode(SimCC(*map(torch.from_numpy, bins)))
    assert ((32 * places - joints[..., :2]).abs() < 0.05).float().mean() > 0.95
