from pathlib import Path

import pytest
import timm
import torch
from lightning_kd.tasks import Classification

from lightning_kd.cli import main
from lightning_kd.models import Timm

MINE = """
model:
  student: {class_path: lightning_kd.models.Timm, init_args: {name: resnet10t, options: {in_chans: 1}}}
  terms: {hint: {loss: lightning_kd.losses.AT, student: features.1, teacher: layer1}}
"""


def test_it_is_timm_s_own_model() -> None:
    made = Timm("resnet10t", num_classes=7, options={"in_chans": 1})
    own = timm.create_model("resnet10t", num_classes=7, in_chans=1)
    assert type(made) is type(own)
    own.load_state_dict(made.state_dict(), strict=True)
    assert made(torch.rand(2, 1, 32, 32)).shape == (2, 7)
    assert Classification(num_classes=7).knowledge(made)["features.4"] == "layer4"


def test_an_unknown_name_is_told_with_the_closest() -> None:
    with pytest.raises(ValueError, match=r"timm has no model 'resnet10y'\. Closest: .*resnet10t"):
        Timm("resnet10y", num_classes=7)


def test_a_configuration_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(MINE)
    run = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    alone = ["--model.teacher.init_args.checkpoint=null", "--teacher_fit=null"]
    assert main(["fit", "--config", "digits_kd", "--config", "mine.yaml", *alone, *run]) == 0
    (saved,) = tmp_path.rglob("*.ckpt")
    assert main(["export", str(saved), "--format", "state_dict", "--output", "student.pt"]) == 0
    timm.create_model("resnet10t", num_classes=10, in_chans=1).load_state_dict(torch.load("student.pt"), strict=True)
