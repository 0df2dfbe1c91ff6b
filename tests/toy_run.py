"""A configuration that is trained in a moment, of data and networks that tests can change."""

from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Toy(LightningDataModule):
    """Images of a size, of as many classes as one says."""

    def __init__(self, size: int = 8, num_classes: int = 4) -> None:
        super().__init__()
        self.size, self.num_classes = size, num_classes

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(8, 1, self.size, self.size, generator=generator)
        return DataLoader(TensorDataset(images, torch.arange(8) % self.num_classes), batch_size=8)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Net(nn.Module):
    """A convolution of a width, and a head."""

    def __init__(self, width: int = 3, num_classes: int = 4) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, width, 3, padding=1), nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).mean((2, 3)))


def configuration(
    name: str,
    data: Any = None,
    task: str = "lightning_kd.tasks.Classification",
    width: int = 6,
    checkpoint: str = "",
) -> str:
    """Write a configuration in the folder one stands in, of one epoch of one batch; its file."""
    model = {"class_path": f"{__name__}.Net", "init_args": {"width": width}}
    content = {
        "trainer": {"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False},
        "data": {"class_path": f"{__name__}.Toy", "init_args": data or {}},
        "model": {
            "task": {"class_path": task},
            "student": {"class_path": f"{__name__}.Net"},
            "teacher": {
                "class_path": "lightning_kd.teachers.Frozen",
                "init_args": {"model": model, "checkpoint": checkpoint or f"{name}.ckpt"},
            },
            "terms": {"kd": {"loss": {"class_path": "lightning_kd.losses.KD"}}},
        },
        "teacher_fit": {"max_epochs": 1, "lr": 0.01},
    }
    Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
    return f"{name}.yaml"
