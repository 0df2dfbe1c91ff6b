"""A project with metrics of its own, in which networks learn from each other."""

import copy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_kd.callbacks import MutualDistillation
from project import QUIET
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_kd import Term, losses


class Net(nn.Module):
    def __init__(self, width: int = 5, save: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Tanh())
        self.head = nn.Linear(width, 4)
        self.save = save

    def forward(self, x: Tensor) -> Tensor:
        features = checkpoint(self.body, x, use_reentrant=False) if self.save else self.body(x)
        return self.head(features)


class Lit(LightningModule):
    """Of a user, with a metric object, a hook that computes one, and a list of what was called."""

    def __init__(self, model: nn.Module | None = None, data: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model", "data"])
        self.model = Net() if model is None else model
        self.data = data
        self.temperature = nn.Parameter(torch.ones(()))
        self.accuracy, self.by_hook = MulticlassAccuracy(4, average="micro"), MulticlassAccuracy(4, average="micro")
        self.called: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.model(batch[0]) / self.temperature, batch[1])
        self.log("my_loss", loss, on_step=True)
        return loss

    def _evaluate(self, batch: Any, stage: str) -> None:
        logits = self.model(batch[0])
        self.accuracy(logits, batch[1])
        self.by_hook.update(logits, batch[1])
        self.log_dict({f"{stage}_acc": self.accuracy})

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self.log("val_by_hook", self.by_hook.compute())
        self.by_hook.reset()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loader(start: int = 0) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 6, generator=generator), torch.randint(0, 4, (64,), generator=generator)
    return DataLoader(TensorDataset(x[start : start + 32], y[start : start + 32]), batch_size=8)


def mutual(*peers: nn.Module, terms: dict[str, Term] | None = None, **kwargs: Any) -> MutualDistillation:
    kd = {"kd": Term(losses.KD(temperature=2.0))}
    return MutualDistillation(list(peers) or [Net(7)], terms or kd, **{"student": "model"} | kwargs)


def trainer(*callbacks: Callback, **kwargs: Any) -> Trainer:
    saves = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    options = {"max_epochs": 2, "enable_checkpointing": saves, "num_sanity_val_steps": 0}
    return Trainer(callbacks=list(callbacks), **QUIET | options | kwargs)


def fit(module: LightningModule, *callbacks: Callback, **kwargs: Any) -> Trainer:
    run = trainer(*callbacks, **kwargs)
    run.fit(module, loader(), loader(32))
    return run


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def accuracy(network: nn.Module) -> float:
    x, y = loader(32).dataset.tensors
    with torch.no_grad():
        return float((copy.deepcopy(network).eval()(x).argmax(1) == y).float().mean())
