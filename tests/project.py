"""A project as its user wrote it, to which tests attach callbacks: a module, its data, a quiet run of it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import Distillation, Term, losses

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip
"""Arguments of a Trainer that writes nothing."""


def net(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(16, 6, generator=generator), torch.randint(0, 4, (16,), generator=generator))


def loader(batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=batch_size)


class Project(LightningModule):
    """Of which two begin alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = net()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Direct(Project):
    """Which is the student itself: its step calls its own forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def fit(
    module: LightningModule,
    *callbacks: Callback,
    batches: Iterable[Any] | None = None,
    resume: Path | None = None,
    **kwargs: Any,
) -> Trainer:
    run = Trainer(callbacks=list(callbacks), **QUIET | kwargs)
    batches = loader() if batches is None else batches
    run.fit(module, batches, ckpt_path=resume, weights_only=True if resume else None)
    return run


def kd(student: str | None = "model", teacher: nn.Module | None = None, **kwargs: Any) -> Distillation:
    return Distillation(teacher or net(16), {"kd": Term(losses.KD(), weight=0.9)}, student=student, **kwargs)


def hint(*names: str, width: int = 16, **kwargs: Any) -> Distillation:
    terms = {name: Term(losses.FitNet(), student="0", teacher="0") for name in names or ["hint"]}
    return Distillation(net(width), terms, **{"student": "model"} | kwargs)


def logged(run: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in run.callback_metrics.items()}
