"""Segmentation from the command line to what is delivered; exact resume; few labels with teachers that take turns."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import segmentation_models_pytorch as smp
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_kd.tasks import Segmentation
from processes import run_script

from lightning_kd import DistillationModule, Term, losses, teachers
from lightning_kd.cli import main
from lightning_kd.data import MaskScenes

QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
TINY = {"batch_size": 4, "train_size": 8, "val_size": 4, "test_size": 6}


def student() -> torch.nn.Module:
    model: torch.nn.Module = smp.FPN(
        "tu-mobilenetv3_small_050",
        encoder_weights=None,
        classes=11,
        decoder_pyramid_channels=32,
        decoder_segmentation_channels=32,
    )
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smp", "torchvision"])
def test_a_student_is_trained_exported_and_predicts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network: dict[str, Any] = {
        "class_path": "segmentation_models_pytorch.FPN",
        "init_args": {"encoder_name": "tu-mobilenetv3_small_050", "encoder_weights": None},
    }
    if kind == "torchvision":
        network = {"class_path": "lightning_kd.models.Torchvision", "init_args": {"name": "lraspp_mobilenet_v3_large"}}
    config = {
        "trainer": {"max_epochs": 1, "enable_progress_bar": False},
        "data": {"class_path": "lightning_kd.data.MaskScenes", "init_args": TINY},
        "model": {"task": {"class_path": "lightning_kd.tasks.Segmentation"}, "student": network},
    }
    Path("c.yaml").write_text(json.dumps(config))
    assert main(["fit", "--config", "c.yaml", "--traceback"]) == 0
    (checkpoint,) = Path("runs").rglob("*.ckpt")
    assert main(["predict", "--config", "c.yaml", "--ckpt_path", str(checkpoint), "--output", "masks.pt"]) == 0
    masks = torch.load("masks.pt", weights_only=True)
    assert masks.shape == (6, 64, 64)
    assert masks.dtype == torch.uint8
    assert main(["export", str(checkpoint), "--format", "onnx", "--output", "s.onnx", "--traceback"]) == 0
    session = onnxruntime.InferenceSession("s.onnx", providers=["CPUExecutionProvider"])
    data = MaskScenes(**TINY)
    data.setup("test")
    images, _ = data.on_after_batch_transfer(data.splits["test"].__getitems__(list(range(6))), 0)
    (name,) = [each.name for each in session.get_inputs()]
    assert (torch.from_numpy(session.run(None, {name: images.numpy()})[0]).argmax(1) == masks).float().mean() > 0.999
    assert session.run(None, {name: torch.zeros(3, 3, 96, 160).numpy()})[0].shape == (3, 11, 96, 160)


def distilled(folder: Path, epochs: int, resume: Path | None = None) -> dict[str, torch.Tensor]:
    seed_everything(0)
    terms = {
        "cwd": Term(losses.CWD(), student="logits", teacher="logits", weight=3.0),
        "hint": Term(losses.FitNet(), student="features.3", teacher="features.3"),
    }
    teacher = smp.Unet("resnet18", encoder_weights=None, classes=11)
    module = DistillationModule(Segmentation(11), student(), teacher, terms)
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = Trainer(max_epochs=epochs, callbacks=[keep], limit_val_batches=0, **QUIET)
    trainer.fit(module, datamodule=MaskScenes(**TINY), ckpt_path=resume, weights_only=True)
    return module.state_dict()


@pytest.mark.slow
def test_resume_is_exact(tmp_path: Path) -> None:
    whole = distilled(tmp_path / "whole", 2)
    distilled(tmp_path / "half", 1)
    resumed = distilled(tmp_path / "half", 2, tmp_path / "half" / "epoch=0.ckpt")
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.mark.slow
def test_two_averages_take_turns_on_images_without_masks() -> None:
    torch.manual_seed(0)
    data = MaskScenes(**TINY, labelled=0.25)
    terms = {"consistency": Term(losses.KD(temperature=1.0), student="logits", teacher="logits")}
    module = DistillationModule(Segmentation(11, ignore_index=255), student(), teachers.EMA(0.5, count=2), terms)
    trainer = Trainer(max_epochs=2, limit_val_batches=0, enable_checkpointing=False, log_every_n_steps=1, **QUIET)
    trainer.fit(module, datamodule=data)
    assert float(trainer.callback_metrics["train/consistency"]) > 0


def test_a_cnn_and_a_transformer_teach_each_other() -> None:
    torch.manual_seed(0)
    transformer = smp.Segformer("mit_b0", encoder_weights=None, decoder_segmentation_channels=32, classes=11)
    terms = {
        "bsd": Term(losses.BSD(), student="logits", teacher="logits"),
        "regions": Term(losses.RegionBSD(11), student="features.3", teacher="features.3"),
        "hfd": Term(losses.FitNet(), student="features.2", teacher="features.2"),
    }
    for kept in ({"bsd"}, {"regions", "hfd"}):
        networks = {"train": student(), "peer1/train": transformer}
        before = {side: [p.detach().clone() for p in net.parameters()] for side, net in networks.items()}
        module = DistillationModule(
            Segmentation(11, ignore_index=255),
            networks["train"],
            teachers.Peers([transformer]),
            {name: terms[name] for name in kept},
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            task_weight=0.0,  # so that whatever moves was moved by the other
        )
        trainer = Trainer(max_steps=1, limit_val_batches=0, enable_checkpointing=False, log_every_n_steps=1, **QUIET)
        trainer.fit(module, datamodule=MaskScenes(**TINY))
        for side, network in networks.items():
            assert all(float(trainer.callback_metrics[f"{side}/{name}"]) > 0 for name in kept)
            moved = [not torch.equal(p, q) for p, q in zip(network.parameters(), before[side], strict=True)]
            assert any(moved), (side, kept)


# Run as a script, once per process.
SCRIPT = """
import segmentation_models_pytorch as smp, torch
from lightning import Trainer, seed_everything
from lightning_kd import DistillationModule, Term, losses
from lightning_kd.data import MaskScenes
from lightning_kd.tasks import Segmentation
from processes import run_script

if __name__ == "__main__":
    seed_everything(0)
    make = lambda name: smp.FPN(name, encoder_weights=None, classes=11)
    terms = {
        "cwd": Term(losses.CWD(), student="logits", teacher="logits"),
        "hint": Term(losses.FitNet(), student="features.3", teacher="features.3"),
    }
    module = DistillationModule(Segmentation(11), make("tu-mobilenetv3_small_050"), make("resnet18"), terms)
    trainer = Trainer(
        max_steps=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=MaskScenes(batch_size=4, train_size=16, val_size=4, test_size=4))
    assert all(float(trainer.callback_metrics[f"train/{key}"]) > 0 for key in ("task", "cwd", "hint"))
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    each = trainer.strategy.all_gather(weights)
    assert torch.equal(each[0], each[1])
    each = trainer.strategy.all_gather(trainer.callback_metrics["val/miou"])  # of all images, on both
    assert torch.equal(each[0], each[1])
"""


@pytest.mark.slow
def test_two_processes_learn_the_same_student(tmp_path: Path) -> None:
    run_script(SCRIPT, folder=tmp_path, ranks=2)
