from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from project import QUIET, Project, data, fit, hint, loader, logged, net
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    random_split,
)
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.wrappers import MinMaxMetric

from lightning_kd import Distillation, Term, losses, teachers
from lightning_kd.attachment.rehearsal import _length, _small_batch, first_samples, training_data


class Indexed(Dataset[Any]):
    def __init__(self, length: int = 10) -> None:
        self.length = length
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.asked.append(index)
        return {"x": torch.full((3,), float(index)), "index": index}


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from (torch.full((3,), float(i)) for i in range(10))


def refuse(*args: Any) -> Any:
    raise AssertionError("no worker is started and no sampler asked")


class Refusing(RandomSampler):
    __iter__ = refuse


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4},
        {"batch_size": 4, "shuffle": True},
        {"batch_size": 4, "drop_last": True, "num_workers": 2, "worker_init_fn": refuse},
        {"batch_sampler": BatchSampler(Refusing(range(10)), 4, drop_last=False)},
        {"batch_size": 4, "sampler": Refusing(range(10))},
    ],
    ids=",".join,
)
def test_two_samples_of_data_with_indices(options: dict[str, Any]) -> None:
    data = Indexed()
    batch = _small_batch(DataLoader(data, **options))
    assert data.asked == [0, 1]
    assert torch.equal(batch["x"], torch.tensor([[0.0] * 3, [1.0] * 3]))
    assert batch["index"].tolist() == [0, 1]


def test_the_loaders_own_collate_is_used() -> None:
    assert _small_batch(DataLoader(Indexed(), batch_size=4, collate_fn=len)) == 2


def test_data_that_gives_whole_lists() -> None:
    class Lists(Indexed):
        def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
            return [{"x": torch.ones(1), "index": -i} for i in indices]

    assert _small_batch(DataLoader(Lists(), batch_size=4))["index"].tolist() == [0, -1]


def test_a_single_sample_is_a_batch_of_one() -> None:
    assert _small_batch(DataLoader(Indexed(1), batch_size=4))["x"].shape == (1, 3)


@pytest.mark.parametrize(
    ("loader", "shape"),
    [
        (DataLoader(Stream(), batch_size=4), (4, 3)),
        (DataLoader(Stream(), batch_size=None), (3,)),
    ],
    ids=["stream", "stream of batches"],
)
def test_other_data_gives_its_first_batch(loader: Any, shape: tuple[int, ...]) -> None:
    assert _small_batch(loader).shape == shape


def test_an_iterator_is_refused_since_its_first_batch_would_be_lost() -> None:
    with pytest.raises(ValueError, match="can be read only once"):
        _small_batch(iter([torch.zeros(4, 3)]))


def test_data_without_automatic_batches_gives_its_first() -> None:
    batch = _small_batch(DataLoader(Indexed(), batch_size=None))
    assert batch["x"].shape == (3,)


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "sequential"])
def test_several_loaders(mode: str) -> None:
    loaders = {"a": DataLoader(Indexed(), batch_size=4), "b": [DataLoader(Stream(), batch_size=3)]}
    batch = _small_batch(CombinedLoader(loaders, mode))
    assert batch["a"]["x"].shape == (2, 3)
    assert batch["b"][0].shape == (3, 3)


class Probe(LightningModule):
    """Asks for samples where the attachment does."""

    def __init__(self, data: DataLoader[Any] | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.data = data
        self.samples: Any = None

    def train_dataloader(self) -> Any:
        return self.data

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * x for x in batch]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [x + 1 for x in batch]

    def configure_model(self) -> None:
        self.samples = first_samples(self.trainer, self, training_data(self.trainer))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batch = batch
        return self.layer(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> Any:
        return self.loader


@pytest.mark.filterwarnings("ignore:You have overridden `on_")  # the module's hooks are meant
@pytest.mark.parametrize("door", ["argument", "module", "datamodule"])
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_samples_are_what_training_step_would_get(door: str, precision: Any) -> None:
    loader = DataLoader(TensorDataset(torch.arange(12.0).reshape(4, 3)), batch_size=2)
    module = Probe(loader if door == "module" else None)
    trainer = Trainer(max_steps=1, precision=precision, **QUIET)
    given = {"argument": {"train_dataloaders": loader}, "module": {}, "datamodule": {"datamodule": Data(loader)}}
    trainer.fit(module, **given[door])
    assert torch.equal(module.samples[0], module.batch[0])
    assert module.samples[0].dtype == module.batch[0].dtype
    assert torch.equal(module.samples[0].float(), 2 * torch.arange(6.0).reshape(2, 3) + 1)


class Centred(nn.Module):
    """Keeps a mean of its own, in a new tensor each time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


def test_means_that_student_and_teacher_keep_are_as_before() -> None:
    def with_means(width: int) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width) if width == 16 else Centred(), nn.Linear(width, 4)
        )

    def run(projector: nn.Module | None) -> list[torch.Tensor]:
        module, teacher = Project(), with_means(16)
        module.model = with_means(8)
        torch.manual_seed(1)
        term = Term(losses.FitNet(), weight=0.0, student="0", teacher="0", projector=projector)
        terms = {"hint": term, "kd": Term(losses.KD())}
        distillation = Distillation(teachers.Frozen(teacher, mode="train"), terms, student="model")
        fit(module, distillation, max_steps=1)
        return [module.model[1].mean, teacher[1].running_mean, teacher[1].num_batches_tracked]

    assert all(map(torch.equal, run(None), run(nn.Linear(8, 16))))


class Frozen(nn.Module):
    """Has buffers that nobody can write into."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 16)
        self.register_buffer("scale", torch.ones(1).expand(16))
        with torch.inference_mode():
            self.register_buffer("shift", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale + self.shift.clone()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # what is tried
@pytest.mark.parametrize(
    "make", [Frozen, lambda: torch.jit.script(net(16)), lambda: torch.jit.freeze(torch.jit.script(net(16).eval()))]
)
def test_a_teacher_that_cannot_be_written_into_is_rehearsed(make: Any) -> None:
    term = Term(losses.FitNet(), student="0", teacher="output")
    assert logged(fit(Project(), Distillation(make(), {"hint": term}, student="model")))["train/hint"] > 0


def test_a_step_may_ask_for_its_optimizer_before_it_calls_the_student() -> None:
    class Asking(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("lr", self.optimizers().param_groups[0]["lr"] + self.lr_schedulers().get_last_lr()[0])
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    module = Asking()
    run = fit(module, hint(), max_epochs=2)
    assert logged(run)["lr"] == pytest.approx(2 * 0.05)
    assert len(run.optimizers) == len(run.lr_scheduler_configs) == 1
    assert {id(p) for p in module.parameters()} < {id(p) for p in run.optimizers[0].param_groups[0]["params"]}


def test_a_step_may_ask_how_long_the_run_is_before_it_calls_the_student() -> None:
    class Asking(Project):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def train_dataloader(self) -> DataLoader[Any]:
            one, other = random_split(data(), [8, 8])
            return DataLoader(ConcatDataset([other, one]), batch_size=4, shuffle=True)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert self.trainer.estimated_stepping_batches == 2 * len(self.trainer.train_dataloader) == 8
            self.seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    def order(*callbacks: Callback) -> Tensor:
        module = Asking()
        torch.manual_seed(3)
        Trainer(callbacks=list(callbacks), **QUIET | {"max_epochs": 2}).fit(module)
        return torch.stack(module.seen[-8:])

    assert torch.equal(order(), order(hint()))


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_a_step_keeps_how_long_the_run_is(mode: Any) -> None:
    class Keeping(Project):
        kept: list[float]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.kept.append(self.trainer.num_training_batches)
            return super().training_step(next(each for each in batch if each is not None), batch_idx)

    module = Keeping()
    module.kept = []
    fit(module, hint(), batches=CombinedLoader([loader(4), loader(8)], mode))
    assert len(set(module.kept)) == 1


def test_what_each_process_gets_is_what_a_step_is_told() -> None:
    class OfTwo:
        world_size = 2

        class _data_connector:  # noqa: N801 - Lightning's
            _requires_distributed_sampler = staticmethod(lambda _: True)

    for drop_last in (False, True):
        for samples in (7, 9, 16):
            whole = TensorDataset(torch.zeros(samples))
            sampler = DistributedSampler(whole, num_replicas=2, rank=0, drop_last=False)
            expected = len(DataLoader(whole, batch_size=4, sampler=sampler, drop_last=drop_last))
            assert _length(OfTwo(), DataLoader(whole, batch_size=4, drop_last=drop_last)) == expected  # type: ignore[arg-type]


def test_a_step_that_asks_first_sees_what_it_sees_alone() -> None:
    class Random(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x + torch.randn(()), y

    class Asking(Project):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert self.trainer.num_training_batches == 3
            assert self.trainer.estimated_stepping_batches == 3
            self.optimizers()
            self.seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    def seen(*callbacks: Callback) -> Tensor:
        module = Asking()
        torch.manual_seed(3)
        of_its_own = torch.Generator().manual_seed(4)
        batches = DataLoader(Random(*data().tensors), batch_size=4, shuffle=True, generator=of_its_own)
        fit(module, *callbacks, batches=batches, limit_train_batches=3)
        return torch.stack(module.seen[-3:])

    assert torch.equal(seen(), seen(hint()))


def test_what_a_metric_has_seen_does_not_count_the_rehearsal() -> None:
    class Measuring(Project):
        def __init__(self) -> None:
            super().__init__()
            self.extremes = MinMaxMetric(MulticlassAccuracy(4))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert self.extremes.min_val.isinf() or batch_idx
            self.extremes(batch[0][:, :4], batch[1])
            return super().training_step(batch, batch_idx)

    assert fit(Measuring(), hint()).global_step == 4


def test_buffers_that_a_first_forward_resizes_are_as_before() -> None:
    class Observing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("least", torch.zeros(0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.least.resize_(8).copy_(x.detach().amin(0))
            return x

    module = Project()
    module.model = nn.Sequential(nn.Linear(6, 8), Observing(), nn.Linear(8, 4))
    term = Term(losses.FitNet(), student="0", teacher="0")
    assert logged(fit(module, Distillation(net(16), {"hint": term}, student="model")))["train/hint"] > 0


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_a_network_that_makes_the_students_arguments_is_rehearsed(precision: Any) -> None:
    view = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert view[1].num_batches_tracked == 0
            assert view[1].running_mean.abs().sum() == 0

    terms = {"hint": Term(losses.FitNet(), student="0", teacher="0")}
    fit(Project(), Distillation(net(16), terms, student="model", student_input=view), Look(), precision=precision)
    assert view[1].num_batches_tracked == 4
