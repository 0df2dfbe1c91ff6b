"""The ways to train the same student from the same teacher: by hand, by our doors, by torchdistill."""

import copy
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from _user import sgd
from _work import TEMPERATURE, Work
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_kd import Distillation, DistillationModule

Tick = Callable[[], None]
"""Is called after each step."""


class ByHand:
    """The losses of a step, written by hand: hooks keep what both networks have."""

    def __init__(self, work: Work, student: nn.Module, teacher: nn.Module) -> None:
        self.work, self.student = work, student
        self.teacher = teacher.eval().requires_grad_(False)
        self.kept: dict[str, dict[str, Any]] = {"student": {}, "teacher": {}}
        for side, network in (("student", student), ("teacher", teacher)):
            for path in filter(None, work.taps.values()):
                network.get_submodule(path).register_forward_hook(self._keeper(side, path))

    def _keeper(self, side: str, path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self.kept[side][path] = output

        return keep

    def losses(self, batch: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            self.kept["teacher"][""] = self.work.teach(self.teacher, batch)
        output = self.kept["student"][""] = self.work.call(self.student, batch)
        found = {"task": self.work.loss(output, batch)}
        for name, path in self.work.taps.items():
            found[name] = self.work.compare(name, *(self.kept[side][path] for side in ("student", "teacher")))
        for side in self.kept.values():
            side.clear()
        return found

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        weights = {"task": self.work.task_weight} | {name: weight for name, (weight, _) in self.work.by_hand.items()}
        return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()


class User(LightningModule):
    """A module that knows nothing of distillation."""

    def __init__(self, work: Work, student: nn.Module) -> None:
        super().__init__()
        self.model = student
        self._work = work

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._work.loss(self._work.call(self.model, batch), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.model.parameters())


class WrittenByHand(User):
    """The same with distillation written into it, and what the doors log logged."""

    def __init__(self, work: Work, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(work, student)
        self.teacher = teacher
        self._by_hand = ByHand(work, student, teacher)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.teacher.eval()
        losses = self._by_hand.losses(batch)
        total = self._by_hand.total(losses)
        self.log_dict({"train/loss": total, **{f"train/{name}": loss for name, loss in losses.items()}}, batch_size=1)
        return total


class Ticking(Callback):
    """Calls the clock after each step."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def on_train_batch_end(self, *args: Any) -> None:
        self.tick()


def _fit(module: LightningModule, work: Work, steps: int, bf16: bool, tick: Tick, *callbacks: Callback) -> None:
    trainer = Trainer(
        max_epochs=1, callbacks=[*callbacks, Ticking(tick)], accelerator=work.device,
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        precision="bf16-mixed" if bf16 else "32-true", logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([work.batch] * steps, batch_size=None))


def alone(work: Work, steps: int, bf16: bool, tick: Tick) -> None:
    _fit(User(work, copy.deepcopy(work.student)), work, steps, bf16, tick)


def loop(work: Work, steps: int, bf16: bool, tick: Tick) -> None:
    """A plain PyTorch loop."""
    student, teacher = (network.to(work.device) for network in work.networks())
    by_hand, optimizer = ByHand(work, student.train(), teacher), sgd(student.parameters())
    for batch in DataLoader([work.batch] * steps, batch_size=None):
        optimizer.zero_grad()
        with torch.autocast(work.device, torch.bfloat16) if bf16 else nullcontext():
            loss = by_hand.total(by_hand.losses(batch))
        loss.backward()
        optimizer.step()
        tick()


def module_by_hand(work: Work, steps: int, bf16: bool, tick: Tick) -> None:
    _fit(WrittenByHand(work, *work.networks()), work, steps, bf16, tick)


def callback(work: Work, steps: int, bf16: bool, tick: Tick) -> None:
    student, teacher = work.networks()
    distillation = Distillation(teacher, work.terms(), student="model", task_weight=work.task_weight)
    _fit(User(work, student), work, steps, bf16, tick, distillation)


def module(work: Work, steps: int, bf16: bool, tick: Tick) -> None:
    student, teacher = work.networks()
    made = DistillationModule(work.task, student, teacher, work.terms(), optimizer=sgd, task_weight=work.task_weight)
    _fit(made, work, steps, bf16, tick)


def torchdistill(work: Work, steps: int, bf16: bool, tick: Tick) -> None:
    """Torchdistill's training box; what it has no loss for is one of the losses by hand."""
    from torchdistill.core.distillation import DistillationBox  # noqa: PLC0415 - it configures logging

    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    student, teacher = work.networks()
    hooks = {"forward_hook": {"input": [], "output": [path for path in work.taps.values() if path]}}
    labelled = {"forward_proc": "forward_batch_target" if work.levels else "forward_batch_only"}
    criterion: dict[str, Any] = {"sub_terms": {n: _term(work, n) for n in work.taps}}
    if work.levels:
        criterion["model_term"] = {"weight": work.task_weight}
        criterion_extras = {"func2extract_model_loss": "extract_model_loss_dict"}
    else:
        criterion_extras = {}
        if "kd" not in work.taps:  # KDLoss brings the cross-entropy
            criterion["sub_terms"]["task"] = {
                "criterion": {"key": "CrossEntropyLoss", "kwargs": {}},
                "criterion_wrapper": {
                    "key": "SimpleLossWrapper",
                    "kwargs": {"input": {"is_from_teacher": False, "module_path": ".", "io": "output"}},
                },
                "weight": work.task_weight,
            }
    box = DistillationBox(
        teacher, student, {},
        {
            "num_epochs": 1,
            "teacher": {**hooks, "requires_grad": False, "forward_proc": "forward_batch_only"},
            "student": {**hooks, **labelled},
            "criterion": {"key": "WeightedSumLoss", "kwargs": criterion, **criterion_extras},
            "optimizer": {"key": "SGD", "kwargs": {"lr": 0.01, "momentum": 0.9}},
        },
        torch.device(work.device), None, False, 1,
    )  # fmt: skip
    box.teacher_model.eval()
    box.student_model.train()
    for inputs, targets in DataLoader([work.batch] * steps, batch_size=None):
        box.post_forward_process(loss=box.forward_process(inputs, targets, {}))
        tick()


def _term(work: Work, name: str) -> dict[str, Any]:
    weight = work.by_hand[name][0]
    if name == "kd":  # with the cross-entropy in it
        own = {"student_module_path": ".", "student_module_io": "output", "temperature": TEMPERATURE}
        own |= {"teacher_module_path": ".", "teacher_module_io": "output", "alpha": work.task_weight, "beta": weight}
        return {"criterion": {"key": "KDLoss", "kwargs": own}, "weight": 1.0}
    return {"criterion": _OwnLoss(work, name), "weight": weight}


class _OwnLoss(nn.Module):
    """A loss by hand, in torchdistill's form."""

    def __init__(self, work: Work, name: str) -> None:
        super().__init__()
        self.work, self.name, self.path = work, name, work.taps[name] or "."

    def forward(self, student: Any, teacher: Any, targets: Any) -> Tensor:
        return self.work.compare(self.name, *(side[self.path]["output"] for side in (student, teacher)))


BY_HAND = "module by hand"
WAYS: dict[str, Callable[[Work, int, bool, Tick], None]] = {
    "student alone": alone,
    "loop by hand": loop,
    BY_HAND: module_by_hand,
    "callback": callback,
    "DistillationModule": module,
    "torchdistill": torchdistill,
}
