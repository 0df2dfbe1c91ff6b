"""Faces by coordinates: a tough teacher, which learned the true points, and a tolerant one, of smoothed points.

    python benchmarks/tolerant_teacher.py --seeds 0 1 2 --output face68_tolerant

As `face68_pose_aloss`, beside which it is measured, with the same teacher, which is the tough one here. The points of
the tolerant one are smoothed by a shape model, as in the authors' code (github.com/aliprf/KD-Loss); it is trained as
the other is. What is trained is kept in the folder that it is started in, and found again. It needs LIGHTNING_KD_DATA.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from lightning_kd.cli import compare, teacher
from lightning_kd.cli.command import DistillationCLI
from lightning_kd.cli.configs import find
from lightning_kd.keypoints import Coordinates
from lightning_kd.models import PoseNet
from lightning_kd.paths import expand_path

VARIANCE = 0.9
"""Of the training faces' shapes, which the components that are kept hold."""

TOUGH, TOLERANT = "checkpoints/face68_coordinates_teacher.ckpt", "checkpoints/face68_tolerant_teacher.ckpt"
SMOOTHED, BOTH = "smoothed/keypoints.csv", "checkpoints/face68_both.pt"


class Teachers(nn.Module):
    """The two side by side; what the tough one says is what both say where one is asked."""

    def __init__(self, num_keypoints: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.tough, self.tolerant = (
            PoseNet("resnet34", num_keypoints, image_size, head="coordinates", stride=16) for _ in range(2)
        )

    def forward(self, images: Tensor) -> Coordinates:
        """``(B, 3, H, W)`` to places ``(B, K, 2)``."""
        self.tolerant(images)  # a term reads it
        said: Coordinates = self.tough(images)
        return said


def smooth(shapes: Tensor, train: Tensor) -> Tensor:
    """Project shapes ``(N, 2 K)`` on the first components of the training's, on each within three deviations."""
    mean = shapes[train].mean(0)
    _, s, v = torch.linalg.svd(shapes[train] - mean, full_matrices=False)
    kept = int((s.square().cumsum(0) / s.square().sum() < VARIANCE).sum()) + 1
    limit = 3 * s[:kept] / (int(train.sum()) - 1) ** 0.5
    parts = ((shapes - mean) @ v[:kept].T).clamp(-limit, limit)
    print(f"{kept} of {len(s)} components are kept")
    return mean + parts @ v[:kept]


def write_smoothed(source: Path, to: Path) -> None:
    """Write the list of keypoints again, with the points smoothed."""
    with source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name[0] in "xy"]
    points = torch.tensor([[float(row[name]) for name in names] for row in rows], dtype=torch.float64)
    size = torch.tensor([[float(row["w"]), float(row["h"])] for row in rows], dtype=torch.float64)
    size = size.repeat(1, len(names) // 2)
    smoothed = size * smooth(points / size, torch.tensor([row["split"] == "train" for row in rows]))
    to.parent.mkdir(parents=True, exist_ok=True)
    with to.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        for row, each in zip(rows, smoothed.tolist(), strict=True):
            table.writerow(row | {name: f"{x:.3f}" for name, x in zip(names, each, strict=True)})


def train_tolerant(root: Path) -> None:
    """Train the tolerant teacher as the shipped configuration trains its own, on the smoothed points."""
    write_smoothed(root / "keypoints.csv", Path(SMOOTHED))
    points = ["--data.init_args.csv_file", str(Path(SMOOTHED).resolve())]
    where = ["--model.teacher.init_args.checkpoint", TOLERANT]
    teacher.ensure(compare.read(find("face68_pose_aloss"), None, [*points, *where]).plain_config, DistillationCLI)


def with_both() -> dict[str, Any]:
    """Return the shipped configuration with both teachers, each with a term of its own."""
    config: dict[str, Any] = yaml.safe_load(Path(find("face68_pose_aloss")).read_text(encoding="utf-8"))
    weights = {
        f"{name}.{key.removeprefix('student.')}": value
        for name, file in (("tough", TOUGH), ("tolerant", TOLERANT))
        for key, value in torch.load(file, weights_only=True)["state_dict"].items()
        if key.startswith("student.")
    }
    torch.save(weights, BOTH)
    module = Path(__file__).stem
    config["model"]["teacher"]["init_args"] = {"model": {"class_path": f"{module}.Teachers"}, "checkpoint": BOTH}
    config["model"]["terms"] = {
        name: {
            "loss": {"class_path": "lightning_kd.losses.ALoss", "init_args": {"attract": attract, "repel": repel}},
            "student": "coordinates",
            "teacher": f"{name}[0]",
        }
        for name, attract, repel in (("tough", 1.9, 0.45), ("tolerant", 1.8, 0.4))
    }
    del config["teacher_fit"]
    return config


def with_tolerant() -> dict[str, Any]:
    """Return the shipped configuration with the tolerant teacher alone."""
    config: dict[str, Any] = yaml.safe_load(Path(find("face68_pose_aloss")).read_text(encoding="utf-8"))
    config["model"]["teacher"]["init_args"]["checkpoint"] = TOLERANT
    config["model"]["terms"]["assistive"]["loss"]["init_args"] = {"attract": 1.8, "repel": 0.4}
    del config["teacher_fit"]
    return config


def main() -> None:
    """Smooth, train, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    teacher.ensure(compare.read(find("face68_pose_aloss"), None, []).plain_config, DistillationCLI)
    train_tolerant(Path(expand_path("$LIGHTNING_KD_DATA/face68_112")))
    made = {"face68_tolerant": with_tolerant(), "face68_tough_and_tolerant": with_both()}
    for name, config in made.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    files = ["face68_pose_aloss", *(f"./{name}.yaml" for name in made)]
    compare.main(["--config", *files, "--seeds", *options.seeds, "--output", options.output])


if __name__ == "__main__":
    main()
