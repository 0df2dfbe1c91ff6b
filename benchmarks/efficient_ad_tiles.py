"""Magnetic tiles by EfficientAD, from its first step: the describer of patches is distilled, too.

    python benchmarks/efficient_ad_tiles.py --seeds 0 1 2 --output benchmarks/results/efficient_ad_tiles.csv

The paper's describer learned the features of a WideResNet-101 on ImageNet; here SqueezeNet's are learned on pieces of
CamVid's street scenes, once. It needs LIGHTNING_KD_DATA.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning_kd.tasks import AnomalyDetection, EfficientAD
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_kd import DistillationModule, Term, losses
from lightning_kd.data import AnomalyFolder, UnrelatedImages
from lightning_kd.models import EfficientADStudent, PatchDescriber, SqueezeNetFeatures, Standardized
from lightning_kd.models.efficient_ad import BORDER

CHANNELS, WIDTH, SIZE = 256, 32, (128, 128)
SCENES = "$LIGHTNING_KD_DATA/camvid_half/train"
QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Scenes(IterableDataset[Any]):
    """Pieces of street scenes, and masks that say that nothing is anomalous."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.pieces = UnrelatedImages(SCENES)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.length):
            yield self.pieces(torch.zeros(1, 3, *SIZE))[0], torch.zeros(SIZE)


class AsDescribed(nn.Module):
    """SqueezeNet's features of an eighth of the resolution, at the positions that the describer has."""

    def __init__(self) -> None:
        super().__init__()
        whole = SqueezeNetFeatures("$LIGHTNING_KD_DATA/weights/squeezenet1_1_features_imagenet.pth")
        self.layers = nn.Sequential(*list(whole.features)[:8])

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W) -> (B, 256, H / 4 - 8, W / 4 - 8)``."""
        size = images.shape[-2] // 4, images.shape[-1] // 4
        maps = F.interpolate(self.layers(images), size, mode="bilinear", align_corners=False)
        return maps[..., BORDER:-BORDER, BORDER:-BORDER]


def adam(rate: float) -> Any:
    """Return what makes the paper's optimizer."""
    return lambda parameters: torch.optim.Adam(parameters, lr=rate, weight_decay=1e-5)


def described(steps: int) -> PatchDescriber:
    """Distil the describer of patches."""
    seed_everything(0)
    loader = DataLoader(Scenes(16 * steps), batch_size=16)
    first = DataLoader(Scenes(320), batch_size=16)
    module = DistillationModule(
        AnomalyDetection(difference=["output"]),
        PatchDescriber(CHANNELS, WIDTH),
        Standardized(AsDescribed(), CHANNELS).standardize(images for images, _ in first),
        {"describe": Term(losses.FitNet(), student="output", teacher="output")},
        adam(1e-3),
    )
    trainer = Trainer(max_epochs=1, limit_val_batches=0, **QUIET)
    trainer.fit(module, loader)
    print(f"the describer: mean squared error {float(trainer.callback_metrics['train/describe']):.3f}", flush=True)
    student: Any = module.student
    return student


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1000, help="of the describer's own training")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    describer, rows = described(options.steps), []
    for seed in options.seeds:
        begun = time.perf_counter()
        seed_everything(seed)
        data = AnomalyFolder("$LIGHTNING_KD_DATA/magnetic_tile", image_size=SIZE)
        data.setup("fit")
        moved = (data.on_after_batch_transfer(batch, 0)[0] for batch in data.train_dataloader())
        module = DistillationModule(
            EfficientAD(unrelated=UnrelatedImages(SCENES)),
            EfficientADStudent(CHANNELS, SIZE, WIDTH),
            Standardized(describer, CHANNELS).standardize(moved),
            {
                "hard": Term(losses.EfficientAD(), student="output.local", teacher="output"),
                "autoencoder": Term(losses.FitNet(), student="output.autoencoder", teacher="output"),
            },
            adam(1e-3),
        )
        trainer = Trainer(max_epochs=options.epochs, check_val_every_n_epoch=options.epochs, **QUIET)
        trainer.fit(module, datamodule=data)
        (measured,) = trainer.test(module, datamodule=data, verbose=False)
        rows.append({"detector": "EfficientAD", "seed": seed}
                    | {name.removeprefix("test/"): value for name, value in measured.items()})  # fmt: skip
        print(rows[-1], f"{time.perf_counter() - begun:.0f} s", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
