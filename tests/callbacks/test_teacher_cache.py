"""A run with a cache is the run without it, however the samples come."""

import copy
import functools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning_kd.callbacks import Distillation, TeacherCache
from lightning_kd.tasks import Classification
from processes import run_script
from project import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_kd import DistillationModule, Term, losses, teachers
from lightning_kd.caching.shards import Shards
from lightning_kd.data import Digits, RandomShift, Replayed
from lightning_kd.models import CifarResNet


class Module(LightningModule):
    """Knows neither distillation nor indices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


def terms() -> dict[str, Term]:
    hint = Term(losses.FitNet(), student="1", teacher="1")  # with a projector: there is a rehearsal
    return {"kd": Term(losses.KD(temperature=4.0), weight=0.9), "hint": hint}


@functools.cache
def digits() -> TensorDataset:
    data = Digits(train_size=100)
    data.setup("fit")
    return TensorDataset(data.splits["train"].images / 127.5 - 1, data.splits["train"].labels)


def fit(*callbacks: Callback, data: Any = None, module: Any = None, epochs: int = 3, **options: Any) -> Tensor:
    """The student's weights after a fit with batches of ten.

    Not shuffled: what a matrix product says of a sample depends in its last bits on the other rows.
    """
    module = module or Module()
    loader = DataLoader(digits() if data is None else data, **({"batch_size": 10} | options))
    torch.manual_seed(2)
    trainer = Trainer(callbacks=list(callbacks), **QUIET | {"max_epochs": epochs, "limit_val_batches": 0})
    trainer.fit(module, loader, loader if isinstance(module, DistillationModule) else None)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def distillation(teacher: nn.Module | None = None) -> Distillation:
    return Distillation(teacher or network(), terms(), student="model")


def no_run(module: nn.Module, args: Any) -> None:
    pytest.fail("the teacher ran")


def test_bitwise_the_live_run_when_it_fills_and_when_it_reads(tmp_path: Path) -> None:
    live = fit(distillation())
    assert torch.equal(fit(TeacherCache(tmp_path, "float32"), distillation()), live)
    teacher = network()
    handle = teacher.register_forward_pre_hook(no_run)
    callback = distillation(teacher)
    with pytest.raises(pytest.fail.Exception, match="the teacher ran"):
        fit(callback, TeacherCache(tmp_path, "float32"))  # the rehearsal, which learns shapes, and no more
    handle.remove()
    handle = teacher.register_forward_hook(counting := Counting())
    assert torch.equal(fit(callback, TeacherCache(tmp_path, "float32")), live)
    assert counting.calls == 1
    assert callback.distiller.teacher.model is teacher  # has its place back
    assert not teacher[1]._forward_hooks
    handle.remove()
    assert torch.equal(fit(distillation(teachers.Cached(tmp_path))), live)  # there is no teacher at all


class Counting:
    calls = 0

    def __call__(self, *args: Any) -> None:
        self.calls += 1


def test_float16_is_near_and_the_same_each_time(tmp_path: Path) -> None:
    first = fit(TeacherCache(tmp_path), distillation())
    assert torch.equal(fit(TeacherCache(tmp_path), distillation()), first)
    live = fit(distillation())
    assert not torch.equal(first, live)
    torch.testing.assert_close(first, live, rtol=0, atol=2e-3)


def test_samples_come_in_another_order_each_epoch(tmp_path: Path) -> None:
    live = fit(distillation(), shuffle=True)
    for workers in (0, 2):
        torch.testing.assert_close(
            fit(distillation(), TeacherCache(tmp_path, "float32"), shuffle=True, num_workers=workers), live
        )


def test_a_fill_runs_no_student_and_leaves_nothing_behind(tmp_path: Path) -> None:
    module, data = Module(), digits()
    before, attributes = copy.deepcopy(module.state_dict()), {*vars(module), "_hparams"}  # which Lightning sets
    module.model[1].register_forward_hook(counting := Counting())
    filling = TeacherCache(tmp_path, "float32", fill_only=True)
    fit(distillation(), filling, module=module, data=data, drop_last=True, batch_size=30)
    assert counting.calls == 1  # the rehearsal
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert set(vars(module)) == attributes
    pickle.dumps(module)
    torch.testing.assert_close(fit(distillation(teachers.Cached(tmp_path)), data=data), fit(distillation(), data=data))


def test_a_fill_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_progress.total.processed == 4:
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(distillation(), TeacherCache(tmp_path, fill_only=True), Stop())
    teacher = network()
    teacher.register_forward_hook(counting := Counting())
    fit(distillation(teacher), TeacherCache(tmp_path, fill_only=True))
    assert counting.calls == 1 + 6  # the rehearsal, and those of ten batches that were not there
    fit(distillation(teacher), TeacherCache(tmp_path, fill_only=True))
    assert counting.calls == 1 + 6 + 1


def test_the_module_door(tmp_path: Path) -> None:
    def trained(*callbacks: Callback, teacher: nn.Module | None = None) -> Tensor:
        torch.manual_seed(0)
        student = CifarResNet(depth=8, width=4, in_channels=1, num_classes=10)
        teacher = teacher or CifarResNet(depth=8, width=8, in_channels=1, num_classes=10)
        module = DistillationModule(Classification(num_classes=10), student, teacher, {"kd": Term(losses.KD())})
        return fit(*callbacks, module=module, epochs=2)

    live = trained()
    torch.testing.assert_close(trained(TeacherCache(tmp_path, "float32")), live)
    torch.testing.assert_close(trained(teacher=teachers.Cached(tmp_path)), live)


def test_loaders_that_are_made_anew_each_epoch_and_several_at_once(tmp_path: Path) -> None:
    class Anew(LightningDataModule):
        several = False

        def train_dataloader(self) -> Any:
            made = DataLoader(digits(), batch_size=10)
            return [made, DataLoader(digits(), batch_size=10)] if self.several else made

    class OfTheFirst(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[0] if isinstance(batch[0], list) else batch, batch_idx)

    def run(data: Anew) -> None:
        options = QUIET | {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
        trainer = Trainer(callbacks=[distillation(), TeacherCache(tmp_path)], **options)
        trainer.fit(OfTheFirst(), data)

    run(data := Anew())
    data.several = True
    with pytest.raises(ValueError, match="needs to know which samples"):
        run(data)


class Shifted(Dataset[Any]):
    """Digits that are shifted at random."""

    def __init__(self) -> None:
        self.data = digits()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        image, label = self.data[index]
        return RandomShift(2)(image[None])[0], label


def test_augmentation_is_replayed(tmp_path: Path) -> None:
    data = Replayed(Shifted(), views=2)
    live = fit(distillation(), data=data, epochs=2)
    assert torch.equal(fit(distillation(), TeacherCache(tmp_path, "float32"), data=data, epochs=2), live)
    assert torch.equal(fit(distillation(teachers.Cached(tmp_path)), data=data, epochs=2, num_workers=2), live)


def test_augmentation_that_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Replayed"):
        fit(distillation(), TeacherCache(tmp_path), data=Shifted())

    class Augmenting(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((RandomShift(2)(batch[0]), batch[1]), batch_idx)

    with pytest.raises(ValueError, match="are not what the teacher saw"):
        fit(distillation(), TeacherCache(tmp_path), module=Augmenting())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(digits())


def test_a_stream_has_to_say_which_samples_it_gives(tmp_path: Path) -> None:
    hint = {"kd": Term(losses.KD())}
    with pytest.raises(ValueError, match="needs to know which samples"):
        fit(Distillation(network(), hint, student="model"), TeacherCache(tmp_path), data=Stream())
    numbered = TensorDataset(*digits().tensors, torch.arange(100) + 1000)
    callback = Distillation(network(), hint, student="model", index=2)
    fit(callback, TeacherCache(tmp_path), data=[tuple(t[:10] for t in numbered.tensors)], batch_size=None)
    assert "position" not in teachers.Frozen.labels


def test_of_several_teachers_none_is_chosen(tmp_path: Path) -> None:
    other = Distillation(network(), {"other": Term(losses.KD())}, student="model")
    with pytest.raises(ValueError, match="is for one trained teacher, and this run has 2"):
        fit(distillation(), other, TeacherCache(tmp_path))
    with pytest.raises(ValueError, match="has 0"):
        fit(TeacherCache(tmp_path))
    with pytest.raises(ValueError, match="storage is"):
        TeacherCache(tmp_path, "int4")


KILLED = """
import os, random, signal, sys, time, torch
from pathlib import Path
from lightning_kd.caching.shards import Shards

folder = Path(sys.argv[1])
random.seed(0)
shards = Shards(folder, "a", {"x": ([2000], "F32")})
for writer in range(20):
    child = os.fork()
    if not child:
        for start in range(10_000 * writer, 10_000 * (writer + 1), 50):
            keys = torch.arange(start, start + 50)
            shards.write(keys, {"x": keys[:, None].float().repeat(1, 2000)})
        os._exit(0)
    time.sleep(random.uniform(0.005, 0.05))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_whole_shards_or_none(tmp_path: Path) -> None:
    """Twenty writers, one after the other, at random moments."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)], check=True, timeout=120)
    shards = Shards(tmp_path, "a", {"x": ([2000], "F32")})
    keys = shards.has(torch.arange(200_000)).nonzero().squeeze(1)
    assert len(keys) >= 100
    assert len(keys) % 50 == 0
    assert torch.equal(shards.read(keys)["x"], keys[:, None].float().repeat(1, 2000))


TWO = """
import sys, torch
import lightning.pytorch as pl
from torch.utils.data import DataLoader
sys.path.insert(0, sys.argv[1])
from test_teacher_cache import Module, TeacherCache, digits, distillation

torch.manual_seed(0)
teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 12), torch.nn.ReLU(), torch.nn.Linear(12, 10))
calls = []
teacher.register_forward_hook(lambda *_: calls.append(1))
options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=4, callbacks=[distillation(teacher), TeacherCache("it")],
    **options,
)
pl.seed_everything(0)
trainer.fit(Module(), DataLoader(digits(), batch_size=10, shuffle=True))
# Of four epochs with five batches each, after a rehearsal: what the other process writes is there in the third.
assert len(calls) <= 1 + 2 * 5, len(calls)
"""


@pytest.mark.slow
def test_two_processes_fill_and_read_one_cache(tmp_path: Path) -> None:
    run_script(TWO, str(Path(__file__).parent), folder=tmp_path, ranks=2)
    assert len(list((tmp_path / "it").glob("*.safetensors"))) >= 2
    cached = teachers.Cached(tmp_path / "it")
    cached.bind(nn.Identity(), ["output", "1"])
    assert cached.lacking(100) == []
