"""What an epoch costs with a cached teacher, against the student alone and against the teacher that runs.

A ResNet-18 student and a ResNet-34 teacher on random images. The variants train an epoch in turn, in one process, so
that the machine's moods meet them all; medians and ratios are printed. The cache was filled before. On the CPU the time
is processor time, which other processes on the machine disturb less than the clock; on a GPU it is wall time.

    python benchmarks/cached_teacher.py --size 32 --images 512 --rounds 5

With ``--reading`` it compares who reads the answers: the training process, as it is, or the data loader's two workers,
who send them with the samples. An answer is a feature with as many values as the sample, float16, in a file that is in
the memory of the operating system, or is not. No network runs: a step waits for ``--step`` seconds, as for a GPU, and
copies what has come.

    python benchmarks/cached_teacher.py --reading --size 224 --images 768 --batch-size 32
"""

import argparse
import copy
import gc
import json
import logging
import os
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _machine import about
from _user import Alone
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_kd.callbacks import TeacherCache
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset, default_collate
from torchvision.models import resnet18, resnet34

from lightning_kd import Distillation, Term, losses
from lightning_kd.caching.shards import Shards

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
    parser.add_argument("--reading", action="store_true", help="compare who reads the answers")
    parser.add_argument("--step", type=float, default=0.1, help="seconds of a step, with --reading")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    told = readings(options) if options.reading else epochs(options)
    if options.output:
        given = {k: v for k, v in vars(options).items() if k != "output"}
        options.output.write_text(json.dumps({"options": given, "about": about(), **told}, indent=1) + "\n")


def epochs(options: argparse.Namespace) -> dict[str, Any]:
    """Compares epochs with the cache, with the teacher and without either."""
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
    shutil.rmtree(root)
    return {"seconds": times, "first_epoch": filling}


class Samples(Dataset[Any]):
    """Images that are made of bytes when they are read, as those of a folder are."""

    def __init__(self, count: int, size: int) -> None:
        self.count = count
        self.images = torch.randint(256, (16, 3, size, size), dtype=torch.uint8)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index % len(self.images)] / 255


class WithAnswers(Samples):
    """The same, whose worker reads the answers of a batch, too."""

    def __init__(self, count: int, size: int, folder: Path) -> None:
        super().__init__(count, size)
        self.folder = folder
        self.shards: Shards | None = None

    def __getitems__(self, indices: list[int]) -> Any:
        self.shards = self.shards or opened(self.folder, self.images.shape[-1])
        return [self[i] for i in indices], self.shards.read(torch.tensor(indices))


def with_answers(read: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return default_collate(read[0]), read[1]


class Drawn:
    """Batches of a sampler, of which it is noted what they are."""

    def __init__(self, count: int, batch_size: int) -> None:
        self.batches = BatchSampler(RandomSampler(range(count)), batch_size, drop_last=True)
        self.drawn: list[Tensor] = []

    def __iter__(self) -> Any:
        for batch in self.batches:
            self.drawn.append(torch.tensor(batch))
            yield batch

    def __len__(self) -> int:
        return len(self.batches)


def opened(folder: Path, size: int) -> Shards:
    return Shards(folder, "benchmark", {"feature": ([3, size, size], "F16")})


def evict(folder: Path) -> None:
    """Makes the operating system forget what the files hold."""
    gc.collect()  # what is mapped is not forgotten
    for path in folder.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def readings(options: argparse.Namespace) -> dict[str, Any]:
    """Compares who reads the answers, by milliseconds of a batch: on the clock, of the main process, of all."""
    torch.manual_seed(0)
    size, folder = options.size, Path(tempfile.mkdtemp(dir=Path.cwd()))  # not where files are kept in memory
    shards = opened(folder, size)
    for keys in torch.arange(options.images).split(256):
        shards.write(keys, {"feature": torch.randn(len(keys), 3, size, size).half()})
    del shards

    def used(who: int) -> float:
        usage = resource.getrusage(who)
        return usage.ru_utime + usage.ru_stime

    def epoch(reader: str, cold: bool, step: float) -> list[float]:
        if cold:
            evict(folder)
        in_workers = reader == "workers"
        data = WithAnswers(options.images, size, folder) if in_workers else Samples(options.images, size)
        shards = opened(folder, size) if reader == "main process" else None
        sampler = Drawn(options.images, options.batch_size)
        collate = with_answers if in_workers else default_collate
        loader = DataLoader(data, batch_sampler=sampler, num_workers=2, collate_fn=collate)
        fetched = torch.empty(options.batch_size, 3, size, size, dtype=torch.float16)  # stands for a GPU's memory
        images = torch.empty(options.batch_size, 3, size, size)
        children = used(resource.RUSAGE_CHILDREN)
        begun, own = time.perf_counter(), used(resource.RUSAGE_SELF)
        for number, batch in enumerate(loader):
            images.copy_(batch[0] if in_workers else batch)
            if shards is not None:
                fetched.copy_(shards.read(sampler.drawn[number])["feature"])
            elif in_workers:
                fetched.copy_(batch[1]["feature"])
            time.sleep(step)
        clock, own = time.perf_counter() - begun, used(resource.RUSAGE_SELF) - own  # the workers have ended
        both = own + used(resource.RUSAGE_CHILDREN) - children
        return [1e3 * seconds / len(sampler) for seconds in (clock, own, both)]

    found: dict[str, dict[str, list[list[float]]]] = {}
    for cold in (False, True):
        for step in (0.0, options.step):
            times: dict[str, list[list[float]]] = {"nobody": [], "main process": [], "workers": []}
            for warming in [True] + [False] * options.rounds:
                for reader in times:
                    measured = epoch(reader, cold, step)
                    times[reader] += [] if warming else [measured]
            case = f"{'not in' if cold else 'in'} memory, steps of {step:g} s"
            found[case] = times
            for reader, rounds in times.items():
                clock, own, both = (statistics.median(each) for each in zip(*rounds, strict=True))
                ratios = [r[0] / m[0] for r, m in zip(rounds, times["main process"], strict=True)]
                print(
                    f"{case:31} {reader:12} {clock:6.1f} ms a batch, processor time {own:5.1f} ms of the main process, "
                    f"{both:5.1f} ms of all   {statistics.median(ratios):.2f} of the main process's clock "
                    f"({min(ratios):.2f} to {max(ratios):.2f})",
                    flush=True,
                )
    shutil.rmtree(folder)
    return {"milliseconds": found}


if __name__ == "__main__":
    main()
