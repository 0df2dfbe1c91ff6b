"""What a step costs through each door, against the same losses written by hand in a plain LightningModule.

A ResNet-18 student and a ResNet-34 teacher, on the same random batch (the cost does not depend on the images).
The variants train in turn, in one process, so that the machine's moods meet them all; medians and ratios are
printed. On the CPU a step's time is its processor time, which other processes on the machine disturb less than the
clock; on a GPU it is wall time between synchronisations. Peak memory is measured on a GPU by the allocator, on the
CPU by torch's profiler as the highest sum of live tensor bytes.

    python benchmarks/step_cost.py --size 32 --batch-size 64 --steps 12 --rounds 7
"""

import argparse
import copy
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _peak import cpu_peak
from _user import Alone, sgd
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_kd.tasks import Classification
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18, resnet34

from lightning_kd import Distillation, DistillationModule, Term, losses

CLASSES, TEMPERATURE = 100, 4.0
HINTS = ("layer2", "layer3", "layer4")


class Repeated(Dataset[tuple[Tensor, Tensor]]):
    """One image and label, again and again."""

    def __init__(self, size: int, length: int) -> None:
        self.item = torch.randn(3, size, size), torch.tensor(1)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.item


class ByHand(Alone):
    """The same module with distillation written into it: logits, and hints of equal shape."""

    def __init__(self, student: nn.Module, teacher: nn.Module, hints: bool) -> None:
        super().__init__(student)
        self.teacher = teacher.requires_grad_(False)
        self.kept: dict[str, Tensor] = {}
        for side, net in (("student", student), ("teacher", teacher)) if hints else ():
            for name in HINTS:
                getattr(net, name).register_forward_hook(self._keeper(f"{side}.{name}"))

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            self.kept[name] = output

        return keep

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        self.teacher.eval()
        with torch.no_grad():
            theirs = self.teacher(images)
        ours = self.model(images)
        task = F.cross_entropy(ours, labels)
        kd = F.kl_div(
            (ours / TEMPERATURE).log_softmax(1), (theirs / TEMPERATURE).log_softmax(1),
            reduction="batchmean", log_target=True,
        ) * TEMPERATURE**2  # fmt: skip
        loss = 0.1 * task + 0.9 * kd
        values = {"train/task": task, "train/kd": kd}
        for name in HINTS if self.kept else ():
            hint = F.mse_loss(self.kept[f"student.{name}"], self.kept[f"teacher.{name}"])
            loss = loss + hint
            values[f"train/{name}"] = hint
        self.kept.clear()
        self.log_dict({"train/loss": loss, **values})
        return loss


def terms(hints: bool) -> dict[str, Term]:
    found = {"kd": Term(losses.KD(temperature=TEMPERATURE), weight=0.9)}
    if hints:
        found |= {name: Term(losses.FitNet(), student=name, teacher=name) for name in HINTS}
    return found


def variants(hints: bool) -> dict[str, Callable[[], tuple[LightningModule, list[Callback]]]]:
    """How to make each variant, from the same weights."""
    student, teacher = resnet18(num_classes=CLASSES), resnet34(num_classes=CLASSES)

    def nets() -> tuple[nn.Module, nn.Module]:
        return copy.deepcopy(student), copy.deepcopy(teacher)

    def callback() -> tuple[LightningModule, list[Callback]]:
        ours, theirs = nets()
        return Alone(ours), [Distillation(theirs, terms(hints), student="model", task_weight=0.1)]

    def module() -> tuple[LightningModule, list[Callback]]:
        ours, theirs = nets()
        task = Classification(CLASSES)
        return DistillationModule(task, ours, theirs, terms(hints), optimizer=sgd, task_weight=0.1), []

    return {
        "student alone": lambda: (Alone(nets()[0]), []),
        "by hand": lambda: (ByHand(*nets(), hints), []),
        "callback": callback,
        "module": module,
    }


class Stopwatch(Callback):
    """Times each step after the first three, from its start to its end."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.times, self.peak, self.started = cuda, [], 0.0, 0.0

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_train_batch_start(self, *args: Any) -> None:
        self.started = self._now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if i >= 3:
            self.times.append(self._now() - self.started)


def train(make: Callable[[], tuple[LightningModule, list[Callback]]], data: DataLoader[Any], cuda: bool) -> Stopwatch:
    module, callbacks = make()
    watch = Stopwatch(cuda)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(
        max_epochs=1, callbacks=[*callbacks, watch], accelerator="gpu" if cuda else "cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    if cuda:
        watch.peak = torch.cuda.max_memory_allocated()
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12, help="steps per round; the first three are not counted")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cuda = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    data = DataLoader(Repeated(options.size, options.batch_size * options.steps), batch_size=options.batch_size)
    few = DataLoader(Repeated(options.size, options.batch_size * 3), batch_size=options.batch_size)
    print(f"{machine}, torch {torch.__version__}, ResNet-34 -> ResNet-18, {options}")
    report = {"machine": machine, "torch": torch.__version__, "options": vars(options) | {"output": None}, "cases": {}}
    for case, hints in (("logits", False), ("logits + 3 hints", True)):
        made = variants(hints)
        times: dict[str, list[float]] = {name: [] for name in made}
        peaks = {}
        for _ in range(options.rounds):
            for name, make in made.items():
                watch = train(make, data, cuda)
                times[name].append(statistics.median(watch.times))
                peaks[name] = watch.peak
        if not cuda:
            peaks = {name: cpu_peak(lambda make=make: train(make, few, cuda=False)) for name, make in made.items()}
        print(f"\n{case}\n| variant | step, median | x by hand (min .. max of rounds) | peak memory | x by hand |")
        print("|---|---|---|---|---|")
        figures = {}
        for name in made:
            ratios = [a / b for a, b in zip(times[name], times["by hand"], strict=True)]
            figures[name] = {
                "seconds": statistics.median(times[name]),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "peak_bytes": peaks[name],
                "peak_ratio": peaks[name] / peaks["by hand"],
            }
            f = figures[name]
            spread = f"{f['ratio']:.3f} ({f['ratio_min']:.3f} .. {f['ratio_max']:.3f})"
            print(
                f"| {name} | {f['seconds'] * 1e3:.0f} ms | {spread} "
                f"| {f['peak_bytes'] / 2**20:.0f} MiB | {f['peak_ratio']:.3f} |"
            )
        report["cases"][case] = figures
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
