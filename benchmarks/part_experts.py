"""Faces: three networks that each know a part of the 68 points teach one that finds them all.

    python benchmarks/part_experts.py --seeds 0 1 2 --output benchmarks/results/face68_experts

Each expert is trained on the labels of its part alone, as if nobody had drawn the others; then `lightning-kd
compare` goes on, with the configuration face68_pose_simcc and them in the teacher's place. It needs LIGHTNING_KD_DATA.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Trainer, seed_everything
from lightning_kd.tasks import Pose
from torch.optim import AdamW
from torchvision.transforms import v2

from lightning_kd import DistillationModule, schedules
from lightning_kd.cli import main
from lightning_kd.cli.configs import find
from lightning_kd.data import KeypointCsv
from lightning_kd.models import PartExperts, PoseNet

CONFIG = yaml.safe_load(Path(find("face68_pose_simcc")).read_text(encoding="utf-8"))
TURNED = [v2.RandomAffine(**spec["init_args"]) for spec in CONFIG["data"]["init_args"]["transforms"]]
PARTS = {
    "outline": [*range(17)],
    "eyes": [*range(17, 27), *range(36, 48)],
    "nose and mouth": [*range(27, 36), *range(48, 68)],
}
EXPERT: dict[str, Any] = {"backbone": "resnet10t", "image_size": [48, 48], "stride": 16, "channels": 128}


class Part(KeypointCsv):
    """The faces of a configuration, with the labels of some joints."""

    def __init__(self, joints: list[int], settings: dict[str, Any]) -> None:
        super().__init__(**settings)
        self.joints = joints

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Leave the other joints out."""
        images, points = super().on_after_batch_transfer(batch, dataloader_idx)
        return images, points[:, self.joints]


def expert(part: str, file: Path, epochs: int) -> None:
    """Train the expert of a part, and write its weights."""
    seed_everything(0)
    settings = CONFIG["data"]["init_args"] | {"transforms": TURNED}
    network = PoseNet(num_keypoints=len(PARTS[part]), **EXPERT)
    module = DistillationModule(
        Pose(len(PARTS[part]), threshold=0.05),
        network,
        optimizer=partial(AdamW, lr=0.002),
        lr_scheduler=schedules.Cosine(1.0, 0.0),
        lr_interval="step",
    )
    run = Trainer(max_epochs=epochs, precision="bf16-mixed", logger=False, enable_checkpointing=False)
    data = Part(PARTS[part], settings)
    run.fit(module, datamodule=data)
    print(part, run.test(module, datamodule=data, verbose=False))
    torch.save(network.state_dict(), file)


def teacher(folder: Path, epochs: int) -> dict[str, Any]:
    """Return the configuration of all experts as one teacher; those that are not there are trained."""
    networks = [PoseNet(num_keypoints=len(joints), **EXPERT) for joints in PARTS.values()]
    for part, network in zip(PARTS, networks, strict=True):
        file = folder / f"{part}.pt"
        if not file.exists():
            expert(part, file, epochs)
        network.load_state_dict(torch.load(file, weights_only=True))
    whole = folder / "face68_experts.pt"
    torch.save(PartExperts(list(zip(networks, PARTS.values(), strict=True)), 68).state_dict(), whole)
    made = [
        [{"class_path": "lightning_kd.models.PoseNet", "init_args": EXPERT | {"num_keypoints": len(joints)}}, joints]
        for joints in PARTS.values()
    ]
    model = {"class_path": "lightning_kd.models.PartExperts", "init_args": {"experts": made, "num_keypoints": 68}}
    return {"class_path": "lightning_kd.teachers.Frozen", "init_args": {"model": model, "checkpoint": str(whole)}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--experts", type=Path, default=Path("checkpoints"), help="folder of their weights")
    parser.add_argument("--epochs", type=int, default=24, help="of an expert")
    parser.add_argument("options", nargs="*", help="of lightning-kd compare: --trainer.max_epochs=2, behind a --")
    given = parser.parse_args()
    given.experts.mkdir(parents=True, exist_ok=True)
    given.output.mkdir(parents=True, exist_ok=True)
    model = CONFIG["model"] | {"teacher": teacher(given.experts, given.epochs)}
    file = given.experts / "face68_experts.yaml"
    file.write_text(yaml.safe_dump(CONFIG | {"model": model, "teacher_fit": None}))
    compare = ["compare", "--config", str(file), "--seeds", *map(str, given.seeds), "--output", str(given.output)]
    raise SystemExit(main([*compare, *given.options]))
