"""Magnetic tiles: detectors beside anomalib's own STFPM, on the same images, by the same metrics.

    python benchmarks/anomaly_tiles.py --seeds 0 1 2 --output benchmarks/results/anomaly_tiles.csv

Teacher of all are SqueezeNet's features of ImageNet; student is an untrained one, a decoder, or EfficientAD's. That of
anomalib has its loss, its optimizer and its maps; its model is given these two networks, as it would make resnets by
timm. ``--detectors`` names some of them: their rows are put in place of those that the file has. It needs
LIGHTNING_KD_DATA. Timings are medians of one image on one thread, in turns.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning_kd.tasks import AnomalyDetection, EfficientAD
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kd import DistillationModule, Term, losses, schedules
from lightning_kd.anomalies import StudentTeacher
from lightning_kd.cli.command import DistillationCLI
from lightning_kd.cli.costs import latency_ms
from lightning_kd.data import AnomalyFolder, UnrelatedImages
from lightning_kd.models import CifarResNet, EfficientADStudent, SideBySide, SqueezeNetFeatures, Standardized

ROOT, SIZE = "$LIGHTNING_KD_DATA/magnetic_tile", (128, 128)
IMAGENET = "$LIGHTNING_KD_DATA/weights/squeezenet1_1_features_imagenet.pth"
CIFAR = "$LIGHTNING_KD_DATA/weights/resnet20-12fca82f.th"
LAYERS = ("features.4", "features.7", "features.12")
QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip
DETECTORS = (
    "magnetic_tile_stfpm",
    "anomalib Stfpm",
    "magnetic_tile_reverse",
    "RD4AD",
    "MixedTeacher",
    "EfficientAD",
    "EfficientAD, hard=0.999",
)
RD4AD = (
    "--model.terms.rd.loss.init_args.flatten",
    "true",
    "--model.task.init_args.weights",
    "null",
    "--model.student.init_args.residual",
    "false",
    "--model.optimizer.init_args.betas",
    "[0.5, 0.999]",
    "--model.task.init_args.align_corners",
    "true",
)
"""What makes of the variant for fabrics the original: whole maps' cosines, levels that count alike, a plain decoder."""

Measured = dict[str, dict[str, float]]
"""Figures by the names of what they are of."""


def quality(detector: nn.Module, data: Any) -> dict[str, float]:
    """Measure what a network says of the tiles of the test."""
    task, metrics = AnomalyDetection().eval(), AnomalyDetection().metrics()
    data.setup("test")
    with torch.no_grad():
        for batch in data.test_dataloader():
            moved = data.on_after_batch_transfer(batch, 0)
            task.update(metrics, task(detector.eval(), moved), moved)
    return {name: float(value) for name, value in metrics.compute().items()}


def shipped(config: str, seed: int, *changes: str) -> tuple[dict[str, float], nn.Module]:
    """Train and measure a shipped configuration."""
    quiet = [f"--trainer.{name}=false" for name in QUIET]
    cli = DistillationCLI(["fit", "--config", config, "--seed_everything", str(seed), *quiet, *changes])
    detector = cli.model.task.deployed(cli.model.student)
    return quality(detector, cli.datamodule), detector


class Patches(nn.Module):
    """EfficientAD's teacher: each fourth channel of SqueezeNet's seventh layer, at a quarter of the resolution."""

    channels = 64

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*list(SqueezeNetFeatures(IMAGENET).features)[:8])

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W) -> (B, 64, H / 4, W / 4)``."""
        size = images.shape[-2] // 4, images.shape[-1] // 4
        return F.interpolate(self.layers(images)[:, ::4], size, mode="bilinear", align_corners=False)


class OneMap(nn.Module):
    """One of the two maps of EfficientAD: of the student and its teacher, or of the student and the autoencoder."""

    def __init__(self, detector: nn.Module, which: int) -> None:
        super().__init__()
        self.detector, self.which = detector, which

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.detector.raw(images)[self.which]
        return found


def efficient_ad(seed: int, epochs: int, hard: float) -> tuple[Measured, nn.Module]:
    """Train and measure EfficientAD, whose describer of patches is SqueezeNet; and each of its two maps alone."""
    seed_everything(seed)
    data = AnomalyFolder(ROOT, image_size=SIZE, batch_size=4)
    data.setup("fit")
    moved = (data.on_after_batch_transfer(batch, 0)[0] for batch in data.train_dataloader())
    module = DistillationModule(
        EfficientAD(unrelated=UnrelatedImages("$LIGHTNING_KD_DATA/camvid_half/train")),
        EfficientADStudent(Patches.channels, SIZE, width=16, padding=True),
        Standardized(Patches(), Patches.channels).standardize(moved),
        {
            "hard": Term(losses.EfficientAD(hard), student="output.local", teacher="output"),
            "autoencoder": Term(losses.FitNet(), student="output.autoencoder", teacher="output"),
        },
        lambda parameters: torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-5),
    )
    # The quantiles are those of the last validation.
    trainer = Trainer(max_epochs=epochs, check_val_every_n_epoch=epochs, **QUIET)
    trainer.fit(module, datamodule=data)
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()}, flush=True)
    detector = module.task.deployed(module.student)
    name = "EfficientAD" if hard == 0.0 else f"EfficientAD, hard={hard}"
    return {
        name: quality(detector, data),
        f"{name}, teacher's map": quality(OneMap(detector, 0), data),
        f"{name}, autoencoder's map": quality(OneMap(detector, 1), data),
    }, detector


class Halved(nn.Module):
    """A network of CIFAR's, on images of half the size: nearer to those that it knows."""

    def __init__(self, depth: int, weights: str | None = None) -> None:
        super().__init__()
        self.network = CifarResNet(depth, weights=weights)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to logits."""
        logits: Tensor = self.network(F.avg_pool2d(images, 2))
        return logits


def mixed(seed: int, epochs: int) -> tuple[Measured, nn.Module]:
    """Train and measure MixedTeacher: early levels of a ResNet that knows CIFAR-10, late ones of SqueezeNet."""
    seed_everything(seed)
    data = AnomalyFolder(ROOT, image_size=SIZE)
    levels = [["fine.network.layer1", "fine.network.layer2"], ["deep.features.7", "deep.features.12"]]
    module = DistillationModule(
        AnomalyDetection(difference=levels, combine="sum", smoothing=4.0),
        SideBySide({"fine": Halved(8), "deep": SqueezeNetFeatures()}),
        SideBySide({"fine": Halved(20, CIFAR), "deep": SqueezeNetFeatures(IMAGENET)}),
        {path.replace(".", "_"): Term(losses.STFPM(), student=path, teacher=path) for each in levels for path in each},
        lambda parameters: torch.optim.AdamW(parameters, lr=0.001),
        lr_scheduler=schedules.Cosine(1.0, 0.0),
    )
    trainer = Trainer(max_epochs=epochs, limit_val_batches=0, **QUIET)
    trainer.fit(module, datamodule=data)
    detector: Any = module.task.deployed(module.student)
    parts = {
        kind: StudentTeacher(detector.student, detector.teacher, each, combine="sum", smoothing=4.0)
        for kind, each in zip(("early levels of CIFAR-10", "late levels of ImageNet"), levels, strict=True)
    }
    return {
        "MixedTeacher": quality(detector, data),
        **{f"MixedTeacher, {kind}": quality(part, data) for kind, part in parts.items()},
    }, detector


def anomalibs(seed: int, epochs: int) -> tuple[dict[str, float], nn.Module]:
    """Train and measure anomalib's own on the same images, in batches as large; its maps by the same metrics."""
    from anomalib.models.components import TimmFeatureExtractor  # noqa: PLC0415 - only in this half
    from anomalib.models.image.stfpm.loss import STFPMLoss  # noqa: PLC0415
    from anomalib.models.image.stfpm.torch_model import STFPMModel  # noqa: PLC0415

    seed_everything(seed)
    data = AnomalyFolder(ROOT, image_size=SIZE)
    data.setup("fit")
    teacher = SqueezeNetFeatures(IMAGENET)
    model = STFPMModel(backbone=teacher, layers=list(LAYERS))
    model.teacher_model = TimmFeatureExtractor(teacher, list(LAYERS)).eval()
    model.student_model = TimmFeatureExtractor(SqueezeNetFeatures(), list(LAYERS), requires_grad=True)
    teacher.requires_grad_(False)
    optimizer = torch.optim.SGD(model.student_model.parameters(), lr=0.4, momentum=0.9, weight_decay=0.001)
    loss = STFPMLoss()
    for _ in range(epochs):
        model.train()
        model.teacher_model.eval()
        for batch in data.train_dataloader():
            images, _ = data.on_after_batch_transfer(batch, 0)
            optimizer.zero_grad()
            value = loss(*model(images))
            value.backward()
            optimizer.step()
    print(f"anomalib, seed {seed}: last loss {float(value.detach()) / len(images):.4f} per image", flush=True)
    return quality(model, data), model


def measured(name: str, seed: int) -> tuple[Measured, nn.Module]:
    """Train and measure a detector, by its name."""
    if name.startswith("EfficientAD"):
        return efficient_ad(seed, 5, 0.999 if name.endswith("hard=0.999") else 0.0)
    if name == "MixedTeacher":
        return mixed(seed, 20)
    if name == "anomalib Stfpm":
        found, detector = anomalibs(seed, 20)
    elif name == "RD4AD":
        found, detector = shipped("magnetic_tile_reverse", seed, *RD4AD)
    else:
        found, detector = shipped(name, seed)
    return {name: found}, detector


def kept(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the rows that a file has."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["detector"], int(row["seed"])): row for row in csv.DictReader(file)}


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=DETECTORS)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    networks: dict[str, nn.Module] = {}
    for seed in options.seeds:
        for detector in options.detectors:
            found, networks[detector] = measured(detector, seed)
            rows = kept(options.output) | {
                (name, seed): {"detector": name, "seed": seed, **figures} for name, figures in found.items()
            }
            print(*found.items(), sep="\n", flush=True)
            with options.output.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["detector", "seed", "image_auroc", "pixel_auroc", "aupro", "image_f1"])
                writer.writeheader()
                writer.writerows(rows.values())
    networks["the backbone alone"] = SqueezeNetFeatures()
    image = (torch.randn(1, 3, *SIZE),)
    print(latency_ms({name: (network.eval(), image) for name, network in networks.items()}))


if __name__ == "__main__":
    main()
