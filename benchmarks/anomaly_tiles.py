"""Magnetic tiles: detectors beside anomalib's own, on the same images, by the same metrics.

    python benchmarks/anomaly_tiles.py --seeds 0 1 2 --output benchmarks/results/anomaly_tiles.csv

Teacher of all are SqueezeNet's features of ImageNet; student is an untrained one, a decoder, or EfficientAD's. Those of
anomalib have its models, losses, optimizers and maps; what differs from them is that they are given SqueezeNet, where
they would make resnets by timm, or load a describer of patches. ``--detectors`` names some of them: their rows are put
in place of those that the file has. It needs LIGHTNING_KD_DATA.

What of RD4AD fails, by leaving out one of its four differences from the variant for fabrics at a time::

    python benchmarks/anomaly_tiles.py --seeds 1 2 --detectors "RD4AD, position by position" "RD4AD, levels weighed" \
        "RD4AD, decoder sees the encoder" "RD4AD, usual betas" --output benchmarks/results/anomaly_tiles_rd4ad.csv

``--latency`` trains a step at most, and writes medians of one image on one thread, in turns::

    python benchmarks/anomaly_tiles.py --latency --output benchmarks/results/anomaly_tiles_latency.csv
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning import seed_everything
from lightning_kd.tasks import AnomalyDetection
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kd.anomalies import StudentTeacher
from lightning_kd.cli.command import DistillationCLI
from lightning_kd.cli.costs import latency_ms
from lightning_kd.data import AnomalyFolder, UnrelatedImages
from lightning_kd.models import FeatureDescriber, PatchDescriber, ReverseDistillation, SqueezeNetFeatures

ROOT, SIZE = "$LIGHTNING_KD_DATA/magnetic_tile", (128, 128)
IMAGENET = "$LIGHTNING_KD_DATA/weights/squeezenet1_1_features_imagenet.pth"
CAMVID = "$LIGHTNING_KD_DATA/camvid_half/train"
LAYERS = ("features.4", "features.7", "features.12")
QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip
DETECTORS = (
    "magnetic_tile_stfpm",
    "anomalib Stfpm",
    "magnetic_tile_reverse",
    "RD4AD",
    "anomalib ReverseDistillation",
    "MixedTeacher",
    "MixedTeacher, whole students",
    "EfficientAD",
    "EfficientAD, hard=0.999",
    "anomalib EfficientAd",
)
RD4AD = {
    "position by position": "--model.terms.rd.loss.init_args.flatten=false",
    "levels weighed": "--model.task.init_args.weights=[0.0625, 0.0625, 0.25, 1.0]",
    "decoder sees the encoder": "--model.student.init_args.residual=true",
    "usual betas": "--model.optimizer.init_args.betas=[0.9, 0.999]",
}
"""What makes of the original the variant for fabrics, one by one."""

ABLATION = tuple(f"RD4AD, {without}" for without in RD4AD)

CONFIGS = {
    "RD4AD": "magnetic_tile_rd4ad",
    "MixedTeacher": "magnetic_tile_mixed_teacher",
    "EfficientAD": "magnetic_tile_efficient_ad",
}
"""Shipped configurations, by what the detectors are called here."""

WHOLE = {
    "fine": {
        "class_path": "lightning_kd.models.Shrunk",
        "init_args": {"network": {"class_path": "lightning_kd.models.CifarResNet", "init_args": {"depth": 20}}},
    },
    "deep": {"class_path": "lightning_kd.models.SqueezeNetFeatures"},
}
"""The networks of MixedTeacher's student, both as deep as their teachers."""

CHANGES = RD4AD | {
    "hard=0.999": "--model.terms.hard.loss.init_args.hard=0.999",
    "whole students": f"--model.student.init_args.networks={json.dumps(WHOLE)}",
}
"""Of one of these, by what is behind the comma."""

MIXED = [["fine.network.layer1", "fine.network.layer2"], ["deep.features.7", "deep.features.12"]]
"""The levels of MixedTeacher."""

Measured = dict[str, dict[str, float]]
"""Figures by the names of what they are of."""

Trained = tuple[Any, Any]
"""A detector, and its data."""


def quality(detector: nn.Module, data: Any) -> dict[str, float]:
    """Measure what a network says of the tiles of the test."""
    task, metrics = AnomalyDetection().eval(), AnomalyDetection().metrics()
    data.setup("test")
    with torch.no_grad():
        for batch in data.test_dataloader():
            moved = data.on_after_batch_transfer(batch, 0)
            task.update(metrics, task(detector.eval(), moved), moved)
    return {name: float(value) for name, value in metrics.compute().items()}


def shipped(config: str, seed: int, *changes: str) -> Trained:
    """Train a shipped configuration."""
    quiet = [f"--trainer.{name}=false" for name in QUIET]
    cli = DistillationCLI(["fit", "--config", config, "--seed_everything", str(seed), *quiet, *changes])
    return cli.model.task.deployed(cli.model.student), cli.datamodule


class OneMap(nn.Module):
    """One of the two maps of EfficientAD: of the student and its teacher, or of the student and the autoencoder."""

    def __init__(self, maps: Callable[[Tensor], Any], which: int) -> None:
        super().__init__()
        self.maps, self.which = maps, which

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.maps(images)[self.which]
        return found


def looped(model: Any, data: Any, epochs: int, optimizer: Any, loss: Callable[[Tensor], Tensor]) -> Trained:
    """Train a model of anomalib."""
    data.setup("fit")
    for _ in range(epochs):
        model.train()
        for batch in data.train_dataloader():
            images, _ = data.on_after_batch_transfer(batch, 0)
            optimizer.zero_grad()
            loss(images).backward()
            optimizer.step()
    return model, data


def anomalib_stfpm(seed: int, epochs: int) -> Trained:
    """Train anomalib's STFPM on the same images, in batches as large."""
    from anomalib.models.components import TimmFeatureExtractor  # noqa: PLC0415 - only in this half
    from anomalib.models.image.stfpm.loss import STFPMLoss  # noqa: PLC0415 - likewise
    from anomalib.models.image.stfpm.torch_model import STFPMModel  # noqa: PLC0415 - likewise

    seed_everything(seed)
    data = AnomalyFolder(ROOT, image_size=SIZE)
    teacher = SqueezeNetFeatures(IMAGENET)
    model = STFPMModel(backbone=teacher, layers=list(LAYERS))
    model.teacher_model = TimmFeatureExtractor(teacher, list(LAYERS)).eval()
    model.student_model = TimmFeatureExtractor(SqueezeNetFeatures(), list(LAYERS), requires_grad=True)
    teacher.requires_grad_(False)
    optimizer = torch.optim.SGD(model.student_model.parameters(), lr=0.4, momentum=0.9, weight_decay=0.001)
    loss = STFPMLoss()
    return looped(model, data, epochs, optimizer, lambda images: loss(*model(images)))


class Levels(nn.Module):
    """SqueezeNet as an encoder for anomalib's decoder of ResNet-18: its channels, and sizes that are halved evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.network = SqueezeNetFeatures(IMAGENET, levels=[2, 5, 8]).requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return levels of 64, 128 and 256 channels, a quarter, an eighth and a sixteenth of the images' size."""
        sizes = [(images.shape[-2] // part, images.shape[-1] // part) for part in (4, 8, 16)]
        return {
            f"level{i}": F.interpolate(level, size, mode="bilinear", align_corners=False)
            for i, (level, size) in enumerate(zip(self.network(images), sizes, strict=True))
        }


def anomalib_reverse(seed: int, epochs: int) -> Trained:
    """Train anomalib's reverse distillation, with its bottleneck and its decoder, on SqueezeNet's levels."""
    from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss  # noqa: PLC0415 - likewise

    seed_everything(seed)
    data = AnomalyFolder(ROOT, image_size=SIZE)
    model: Any = ReverseDistillation("resnet18", SIZE, pretrained=False)
    model.encoder = Levels()
    learning = [*model.decoder.parameters(), *model.bottleneck.parameters()]
    optimizer = torch.optim.Adam(learning, lr=0.005, betas=(0.5, 0.99))
    loss = ReverseDistillationLoss()
    return looped(model, data, epochs, optimizer, lambda images: loss(*model(images)))


class Normalising(nn.Module):
    """A teacher that normalises images by itself, as anomalib's describers do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Call the network with images that are normalised as those of ImageNet."""
        from anomalib.models.image.efficient_ad.torch_model import imagenet_norm_batch  # noqa: PLC0415 - likewise

        described: Tensor = self.network(imagenet_norm_batch(images))
        return described


def anomalib_efficient_ad(seed: int, epochs: int) -> Trained:
    """Train anomalib's EfficientAd, in batches of one image, with our describer and a student as narrow as ours."""
    from anomalib.models import EfficientAd  # noqa: PLC0415 - likewise

    channels = 64
    seed_everything(seed)
    as_read: Any = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    data = AnomalyFolder(ROOT, image_size=SIZE, batch_size=1, **as_read)
    data.setup("fit")
    whole: Any = EfficientAd(teacher_out_channels=channels, padding=True, pad_maps=False)
    model = whole.model
    describer = FeatureDescriber(SqueezeNetFeatures(IMAGENET, levels=[7]), every=4)
    model.teacher = Normalising(describer).requires_grad_(False).eval()
    for name, layer in PatchDescriber(2 * channels, width=16, padding=True).named_children():
        setattr(model.student, name, layer)
    model.ae.encoder.enconv6 = nn.Conv2d(64, 64, (SIZE[0] // 32, SIZE[1] // 32))  # 8 there, of 256 pixels
    unrelated = UnrelatedImages(CAMVID, **as_read)

    def batches(loader: Any) -> Iterable[Any]:
        for batch in loader:
            images, target = data.on_after_batch_transfer(batch, 0)
            yield SimpleNamespace(image=images, gt_label=target["label"])

    model.mean_std.update(whole.teacher_channel_mean_std(batches(data.train_dataloader())))
    learning = [*model.student.parameters(), *model.ae.parameters()]
    # Its schedule counts epochs by a number of steps: the rate stays as it is.
    optimizer = torch.optim.Adam(learning, lr=whole.lr, weight_decay=whole.weight_decay)
    looped(model, data, epochs, optimizer, lambda images: sum(model(images, unrelated(images))))
    if epochs:
        model.eval().quantiles.update(whole.map_norm_quantiles(batches(data.val_dataloader())))
    return model, data


def trained(name: str, seed: int, train: bool = True) -> Trained:
    """Train a detector, by its name; or only make it, by one step at most."""
    short = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0}
    changes = [] if train else [f"--trainer.{key}={value}" for key, value in short.items()]
    made: dict[str, Callable[[], Trained]] = {
        "anomalib Stfpm": lambda: anomalib_stfpm(seed, 20 * train),
        "anomalib ReverseDistillation": lambda: anomalib_reverse(seed, 10 * train),
        "anomalib EfficientAd": lambda: anomalib_efficient_ad(seed, 5 * train),
    }
    if name in made:
        return made[name]()
    first, _, change = name.partition(", ")
    if first == "EfficientAD" and not train:
        changes += ["--teacher_fit=null", "--model.teacher.init_args.checkpoint=null"]
    return shipped(CONFIGS.get(first, name), seed, *changes, *([CHANGES[change]] if change else []))


def measured(name: str, detector: Any, data: Any) -> Measured:
    """Measure a detector: by its map, and by others that its parts give."""
    found = {name: quality(detector, data)}
    if name.startswith("RD4AD"):
        detector.align_corners = False
        found[f"{name}, align_corners=False"] = quality(detector, data)
        detector.align_corners = True
    if "EfficientA" in name:
        maps = detector.get_maps if name.startswith("anomalib") else detector.raw
        found[f"{name}, teacher's map"] = quality(OneMap(maps, 0), data)
        found[f"{name}, autoencoder's map"] = quality(OneMap(maps, 1), data)
    if name.startswith("MixedTeacher"):
        networks: Any = detector.student, detector.teacher
        how: Any = {"combine": "sum", "smoothing": 4.0}
        for kind, layers in zip(("early levels of CIFAR-10", "late levels of ImageNet"), MIXED, strict=True):
            found[f"{name}, {kind}"] = quality(StudentTeacher(*networks, layers, weights=[1.0, 4.0], **how), data)
        found[f"{name}, levels alike"] = quality(StudentTeacher(*networks, MIXED, **how), data)
    return found


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
    parser.add_argument("--detectors", nargs="+", choices=[*DETECTORS, *ABLATION], default=DETECTORS)
    parser.add_argument("--latency", action="store_true", help="train a step at most, write what an image takes")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.latency:
        networks = {name: trained(name, 0, train=False)[0] for name in options.detectors}
        image = (torch.randn(1, 3, *SIZE),)
        networks["the backbone alone"] = SqueezeNetFeatures()
        took = latency_ms({name: (network.eval(), image) for name, network in networks.items()})
        write(options.output, [{"detector": name, "latency_ms": round(ms, 2)} for name, ms in took.items()])
        return
    for seed in options.seeds:
        for detector in options.detectors:
            found = measured(detector, *trained(detector, seed))
            rows = kept(options.output) | {
                (name, seed): {"detector": name, "seed": seed, **figures} for name, figures in found.items()
            }
            print(*found.items(), sep="\n", flush=True)
            write(options.output, [*rows.values()])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
