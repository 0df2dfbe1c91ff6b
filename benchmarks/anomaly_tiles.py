"""Magnetic tiles: the shipped detectors beside anomalib's own STFPM, on the same images, batches, seeds and backbone.

    python benchmarks/anomaly_tiles.py --seeds 0 1 2 --output benchmarks/results/anomaly_tiles.csv

Teacher of all are SqueezeNet's features of ImageNet; student is an untrained one, or a decoder. The batches of a seed
are the same. anomalib's has its loss, its optimizer and its anomaly maps; its model is given these two networks, as it
would make resnets by timm. It needs LIGHTNING_KD_DATA. Timings are medians of one image on one thread, in turns.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything
from lightning_kd.tasks import AnomalyDetection

from lightning_kd.cli.command import DistillationCLI
from lightning_kd.cli.costs import latency_ms
from lightning_kd.models import SqueezeNetFeatures

LAYERS = ("features.4", "features.7", "features.12")
QUIET = (
    "--trainer.logger",
    "false",
    "--trainer.enable_checkpointing",
    "false",
    "--trainer.enable_progress_bar",
    "false",
)


def ours(config: str, seed: int) -> tuple[dict[str, float], Any]:
    """Train and measure a shipped configuration."""
    cli = DistillationCLI(["fit", "--config", config, "--seed_everything", str(seed), *QUIET])
    (measured,) = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    return {name.removeprefix("test/"): value for name, value in measured.items()}, cli


def anomalibs(seed: int, epochs: int, data: Any) -> tuple[dict[str, float], torch.nn.Module]:
    """Train and measure anomalib's own on the same batches; its maps are measured by the same metrics."""
    from anomalib.models.components import TimmFeatureExtractor  # noqa: PLC0415 - only in this half
    from anomalib.models.image.stfpm.loss import STFPMLoss  # noqa: PLC0415
    from anomalib.models.image.stfpm.torch_model import STFPMModel  # noqa: PLC0415

    seed_everything(seed)
    teacher = SqueezeNetFeatures("$LIGHTNING_KD_DATA/weights/squeezenet1_1_features_imagenet.pth")
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
    task, metrics = AnomalyDetection().eval(), AnomalyDetection().metrics()
    model.eval()
    with torch.no_grad():
        for batch in data.test_dataloader():
            moved = data.on_after_batch_transfer(batch, 0)
            task.update(metrics, task(model, moved), moved)
    return {name: float(value) for name, value in metrics.compute().items()}, model


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--configs", nargs="+", default=["magnetic_tile_stfpm", "magnetic_tile_reverse"])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    rows, networks = [], {}
    for seed in options.seeds:
        for config in options.configs:
            measured, cli = ours(config, seed)
            rows.append({"detector": config, "seed": seed, **measured})
            print(rows[-1], flush=True)
            networks[config] = cli.model.task.deployed(cli.model.student).eval()
        measured, networks["anomalib Stfpm"] = anomalibs(seed, 20, cli.datamodule)
        rows.append({"detector": "anomalib Stfpm", "seed": seed, **measured})
        print(rows[-1], flush=True)
    networks["the backbone alone"] = SqueezeNetFeatures()
    image = (torch.randn(1, 3, 128, 128),)
    print(latency_ms({name: (network, image) for name, network in networks.items()}))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
