"""What an epoch costs with a cached teacher, against the student alone and against the teacher that runs.

A ResNet-18 student and a ResNet-34 teacher on random images. The variants train an epoch in turn, in one process, so
that the machine's moods meet them all; medians and ratios are printed. The cache was filled before. On the CPU the time
is processor time, which other processes on the machine disturb less than the clock; on a GPU it is wall time.

    python benchmarks/cached_teacher.py --size 32 --images 512 --rounds 5
"""

import argparse
import copy
import json
import logging
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _user import Alone
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_kd.callbacks import TeacherCache
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18, resnet34

from lightning_kd import Distillation, Term, losses

CLASSES = 100


class Clock(Callback):
    """Times the steps of a fit but the first, which warms up."""

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu
        self.seconds = 0.0

    def now(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() if self.gpu else time.process_time()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.begun = self.now()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.seconds = self.now() - self.begun


def terms(hint: bool) -> dict[str, Term]:
    found = {"kd": Term(losses.KD(temperature=4.0))}
    return found | ({"hint": Term(losses.FitNet(), student="layer4", teacher="layer4")} if hint else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    data = TensorDataset(
        torch.randn(options.images, 3, options.size, options.size), torch.randint(CLASSES, (options.images,))
    )
    student, teacher = resnet18(num_classes=CLASSES), resnet34(num_classes=CLASSES)
    root = Path(tempfile.mkdtemp())

    def epoch(variant: str) -> float:
        clock, hint = Clock(gpu), "hint" in variant
        callbacks: list[Callback] = [clock]
        if variant != "alone":
            callbacks.append(Distillation(teacher, terms(hint), student="model", task_weight=0.1))
        if "cached" in variant:
            callbacks.append(TeacherCache(root / str(hint)))
        trainer = Trainer(
            accelerator="gpu" if gpu else "cpu",
            devices=1,
            max_epochs=1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(data, batch_size=options.batch_size, shuffle=True, drop_last=True)
        trainer.fit(Alone(copy.deepcopy(student)), loader)
        return clock.seconds

    variants = ["alone", "live", "cached", "live, hint", "cached, hint"]
    filling = {variant: epoch(variant) for variant in variants}
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(options.rounds):
        for variant in variants:
            times[variant].append(epoch(variant))
    medians = {variant: statistics.median(each) for variant, each in times.items()}
    for variant in variants:
        ratios = [t / alone for t, alone in zip(times[variant], times["alone"], strict=True)]
        print(f"{variant:14} {medians[variant]:8.3f} s   {statistics.median(ratios):.3f} of alone", end="")
        print(f"   ({min(ratios):.3f} to {max(ratios):.3f}; the first epoch {filling[variant]:.3f} s)")
    if options.output:
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
        given = {k: v for k, v in vars(options).items() if k != "output"}
        told = {"options": given, "about": about, "seconds": times, "first_epoch": filling}
        options.output.write_text(json.dumps(told, indent=1) + "\n")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
