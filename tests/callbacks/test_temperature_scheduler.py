"""Schedules of a temperature, and what both schedulers have in common."""

import copy
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning_kd.callbacks import Distillation, EMATeacher, TemperatureScheduler, WeightScheduler
from lightning_kd.tasks import Classification
from project import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import DistillationModule, Term, losses, schedules

STEPS = 4  # in an epoch


class History(Logger):
    """What was logged, step by step."""

    name, version = "history", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, float]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "train/loss" in metrics:
            self.steps.append({name: value for name, value in metrics.items() if name.startswith("train/")})

    def __getitem__(self, name: str) -> list[float]:
        return [step[f"train/{name}"] for step in self.steps]


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def teacher() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(4, 3)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(2)
    return DataLoader(
        TensorDataset(torch.randn(8 * STEPS, 4, generator=generator), torch.arange(8 * STEPS) % 3), batch_size=8
    )


def distillation(**terms: Term) -> Distillation:
    return Distillation(teacher(), terms or {"kd": Term(losses.KD(temperature=3.0))}, student="model")


def fit(
    *callbacks: Callback, module: LightningModule | None = None, resume: Path | None = None, **kwargs: Any
) -> tuple[History, LightningModule]:
    history, module = History(), module or Module()
    options = QUIET | {"max_epochs": 2, "logger": history, "log_every_n_steps": 1}
    trainer = Trainer(callbacks=list(callbacks), **options | kwargs)
    val = loader() if isinstance(module, DistillationModule) else None
    trainer.fit(module, loader(), val, ckpt_path=resume, weights_only=True if resume else None)
    return history, module


def test_each_step_has_the_temperature_of_its_moment() -> None:
    history, _ = fit(distillation(), TemperatureScheduler("kd", schedules.Linear(8.0, 0.5)))
    assert history["kd/temperature"] == pytest.approx([8.0 - 7.5 * step / (2 * STEPS) for step in range(2 * STEPS)])


def test_the_loss_of_a_step_is_the_one_at_its_temperature() -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                s, t = pl_module.model(batch[0]), frozen(batch[0])
            temperature = 8.0 - 7.5 * trainer.global_step / (2 * STEPS)
            p = (t / temperature).softmax(1)
            each = (p * ((t / temperature).log_softmax(1) - (s / temperature).log_softmax(1))).sum(1)
            self.seen.append(float(temperature**2 * each.mean()))

    frozen, watch = teacher(), Watch()
    history, _ = fit(watch, distillation(), TemperatureScheduler("kd", schedules.Linear(8.0, 0.5)))
    assert history["kd"] == pytest.approx(watch.seen, rel=1e-4)


def test_by_epoch() -> None:
    history, _ = fit(distillation(), TemperatureScheduler("kd", schedules.Linear(8.0, 0.5), by="epoch"))
    assert history["kd/temperature"] == [8.0] * STEPS + [4.25] * STEPS


def test_any_function_is_a_schedule() -> None:
    history, _ = fit(distillation(), TemperatureScheduler("kd", lambda progress: 4.0 - progress), max_epochs=1)
    assert history["kd/temperature"] == pytest.approx([4.0, 3.75, 3.5, 3.25])


@pytest.mark.parametrize("max_epochs", [1, 3])
def test_it_means_the_same_for_every_length(max_epochs: int) -> None:
    scheduler = TemperatureScheduler("kd", schedules.Step(8.0, gamma=0.5, milestones=0.25))
    history, _ = fit(distillation(), scheduler, max_epochs=max_epochs)
    assert history["kd/temperature"] == [t for t in (8.0, 4.0, 2.0, 1.0) for _ in range(max_epochs)]


def test_the_order_of_callbacks_does_not_matter() -> None:
    both = [
        distillation,
        lambda: TemperatureScheduler("kd", schedules.Cosine(8.0, 1.0)),
        lambda: WeightScheduler("kd", schedules.Linear(0.0, 1.0)),
    ]
    one, module = fit(*(make() for make in both))
    other, same = fit(*(make() for make in reversed(both)))
    assert one.steps == other.steps
    assert torch.equal(module.model.weight, same.model.weight)


def test_beside_several_that_distil() -> None:
    ema = EMATeacher({"ema": Term(losses.KD())}, student="model")
    history, _ = fit(
        TemperatureScheduler("ema", schedules.Constant(2.0)), distillation(), ema, WeightScheduler("kd", lambda x: x)
    )
    assert history["ema/temperature"] == [2.0] * 2 * STEPS
    assert history["kd/weight"] == [step / (2 * STEPS) for step in range(2 * STEPS)]
    assert not {"train/kd/temperature", "train/ema/weight"} & history.steps[0].keys()


def test_beside_the_module_that_brings_its_own() -> None:
    module = DistillationModule(
        Classification(3), nn.Linear(4, 3), teacher(), {"kd": Term(losses.KD())}, optimizer=torch.optim.SGD
    )
    history, _ = fit(TemperatureScheduler("kd", schedules.Linear(8.0, 4.0)), module=module)
    assert history["kd/temperature"] == [8.0 - step / 2 for step in range(2 * STEPS)]


def test_it_reaches_through_a_wrapper() -> None:
    inner = losses.KD(temperature=3.0)
    seen = []
    inner.register_forward_pre_hook(lambda module, args: seen.append(module.temperature))
    fit(distillation(kd=Term(losses.Standardized(inner))), TemperatureScheduler("kd", schedules.Linear(8.0, 4.0)))
    assert seen == [8.0 - step / 2 for step in range(2 * STEPS)]
    assert inner.temperature == 3.0


@pytest.mark.parametrize("interrupted", [False, True])
def test_nothing_is_left_behind_and_a_second_fit_is_the_same(interrupted: bool) -> None:
    class Interrupt(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if interrupted and trainer.global_step == 3:
                raise RuntimeError("stop")

    term = Term(losses.KD(temperature=3.0))
    own = distillation(kd=term)
    schedulers = (
        TemperatureScheduler("kd", schedules.Linear(8.0, 1.0)),
        WeightScheduler("kd", schedules.Linear(1.0, 0.0)),
    )
    runs = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stop") if interrupted else nullcontext():
            runs.append(fit(own, *schedulers, Interrupt())[0].steps)
        assert (term.loss.temperature, term.weight, term.schedules) == (3.0, 1.0, {})
        assert not term.needs_end
    assert interrupted or runs[0] == runs[1]
    for scheduler in schedulers:
        for twin in (pickle.loads(pickle.dumps(scheduler)), copy.deepcopy(scheduler)):
            assert vars(twin).keys() == vars(scheduler).keys()


def test_resume_is_exact(tmp_path: Path) -> None:
    def run(resume: Path | None = None) -> tuple[History, LightningModule]:
        return fit(
            distillation(),
            TemperatureScheduler("kd", schedules.Cosine(8.0, 1.0)),
            WeightScheduler("kd", schedules.Exponential(1.0, 0.1), by="epoch"),
            ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1),
            resume=resume,
            enable_checkpointing=True,
        )

    whole, module = run()
    rest, resumed = run(tmp_path / "epoch=0.ckpt")
    assert len(rest.steps) == STEPS
    assert rest.steps == whole.steps[STEPS:]
    assert torch.equal(module.model.weight, resumed.model.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: [distillation(kd=Term(losses.KD()), hint=Term(losses.DKD())), TemperatureScheduler("kt", abs_plus)],
            r"TemperatureScheduler\('kt'\): no term has that name. Closest: 'kd'. The terms are 'kd', 'hint'.",
        ),
        (lambda: [TemperatureScheduler("kd", abs_plus)], r"TemperatureScheduler\('kd'\) found nothing that distils"),
        (
            lambda: [
                distillation(mse=Term(nn.MSELoss()), kd=Term(losses.KD()), z=Term(losses.Standardized(losses.KD()))),
                TemperatureScheduler("mse", abs_plus),
            ],
            "MSELoss has no temperature that could be set. Terms whose loss has one: 'kd', 'z'.",
        ),
        (
            lambda: [distillation(kd=Term(losses.CTKD(losses.KD()))), TemperatureScheduler("kd", abs_plus)],
            "CTKD has no temperature that could be set. Terms whose loss has one: none",
        ),
        (
            lambda: [distillation(), TemperatureScheduler("kd", abs_plus), TemperatureScheduler("kd", abs_plus)],
            r"the temperature of that term follows Custom\(abs_plus\) already",
        ),
        (
            lambda: [distillation(), TemperatureScheduler("kd", lambda x: 1.0 if x in (0.0, 1.0) else 0.25 - x)],
            r"Term 'kd': the schedule of the temperature gave 0.0 at 25.0% of the run \(step 2\)",
        ),
        (
            lambda: [distillation(), TemperatureScheduler("kd", lambda x: math.inf if 0 < x < 1 else 1.0)],
            r"Term 'kd': the schedule of the temperature gave inf at 12.5% of the run \(step 1\)",
        ),
    ],
)
def test_mistakes_are_told(make: Callable[[], list[Callback]], message: str) -> None:
    callbacks, module = make(), Module()
    with pytest.raises(ValueError, match=message):
        fit(*callbacks, module=module)
    assert "training_step" not in vars(module)
    for callback in callbacks:
        if isinstance(callback, Distillation):
            assert all(not term.schedules for _, term in callback.distiller.named_terms())


def abs_plus(progress: float) -> float:
    return 1.0 + abs(progress)


def test_by_epoch_needs_epochs() -> None:
    with pytest.raises(ValueError, match=r"does not say how many epochs it has. Set max_epochs"):
        fit(distillation(), TemperatureScheduler("kd", abs_plus, by="epoch"), max_epochs=-1, max_steps=4)
    history, _ = fit(distillation(), TemperatureScheduler("kd", abs_plus), max_epochs=-1, max_steps=4)
    assert history["kd/temperature"] == [1.0, 1.25, 1.5, 1.75]


@pytest.mark.parametrize("schedule", [schedules.Linear(4.0, 0.0), schedules.Constant(-1.0), lambda x: math.inf])
def test_temperatures_are_positive(schedule: Any) -> None:
    with pytest.raises(ValueError, match=r"A temperature cannot follow.*positive and finite"):
        TemperatureScheduler("kd", schedule)


def test_by_is_checked() -> None:
    with pytest.raises(ValueError, match="by is 'step' or 'epoch', got 'batch'"):
        TemperatureScheduler("kd", abs_plus, by="batch")  # type: ignore[arg-type]


def test_validation_and_test_do_not_ask_for_terms() -> None:
    class Tested(Module):
        def test_step(self, batch: Any, batch_idx: int) -> None: ...

    callbacks = [TemperatureScheduler("kd", abs_plus)]
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=callbacks).test(
        Tested(), loader(), verbose=False
    )
