import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LambdaCallback
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import Logger
from lightning_kd.tasks import Classification
from processes import run_script
from project import QUIET
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection, R2Score

from lightning_kd import DistillationModule, Term, losses, schedules
from lightning_kd.task import TaskAdapter
from lightning_kd.teachers import Cached, Frozen

CLASSES = 3


class Net(nn.Module):
    def __init__(self, width: int, inputs: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, CLASSES)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.stem(x))


class History(Logger):
    """What a user's logger is given of the training, step by step."""

    name = version = None

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.steps.append({key: value for key, value in metrics.items() if key.startswith("train/")})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :CLASSES].argmax(1)), batch_size=16)


def trainer(logger: Logger | bool = False, **kwargs: Any) -> Trainer:
    return Trainer(**QUIET | {"logger": logger, "log_every_n_steps": 1, "limit_val_batches": 0} | kwargs)


def module(teacher: nn.Module | None = None, **kwargs: Any) -> DistillationModule:
    terms = {"kd": Term(losses.KD(), weight=0.5), "hint": Term(losses.FitNet(), student="stem", teacher="stem")}
    if teacher is None:
        return DistillationModule(Classification(CLASSES), Net(4), **kwargs)
    return DistillationModule(Classification(CLASSES), Net(4), teacher, **{"terms": terms} | kwargs)


@pytest.mark.parametrize("given", [{"teacher": nn.Linear(6, 3)}, {"terms": {"kd": Term(losses.KD())}}])
def test_teacher_and_terms_go_together(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="A teacher and terms go together"):
        DistillationModule(Classification(CLASSES), Net(4), **given)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="lr_interval is 'epoch' or 'step', got 'batch'"):
        module(lr_interval="batch")
    with pytest.raises(ValueError, match="task_weight"):
        module(Net(8), task_weight=-1.0)


@pytest.mark.parametrize("given", [MeanMetric(), {"mean": MeanMetric()}], ids=["one", "a dict"])
def test_metrics_have_names(given: Any) -> None:
    class Task(Classification):
        def metrics(self) -> Any:
            return given

    with pytest.raises(TypeError, match=r"metrics\(\) of Task returns a MetricCollection.*got a (MeanMetric|dict)"):
        DistillationModule(Task(CLASSES), Net(4))


def test_classes_and_what_is_made_already_are_refused() -> None:
    with pytest.raises(TypeError, match=r"task is a TaskAdapter, got the class Classification. Did you mean"):
        DistillationModule(Classification, Net(4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"student is a Module, got the class Net. Did you mean Net\("):
        DistillationModule(Classification(CLASSES), Net)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"student is the network that learns, got a teacher \(Frozen\).*swapped\?"):
        DistillationModule(Classification(CLASSES), Frozen(Net(4)))
    made = torch.optim.SGD(Net(4).parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"optimizer makes one of parameters.*SGD.*made already"):
        module(optimizer=made)
    with pytest.raises(TypeError, match=r"lr_scheduler makes one of an optimizer.*StepLR.*made already"):
        module(lr_scheduler=torch.optim.lr_scheduler.StepLR(made, 1))


def test_its_state_is_the_students() -> None:
    distilled, alone = module(Net(8)), module()
    assert set(distilled.state_dict()) == set(alone.state_dict())
    assert all(key.startswith("student.") for key in distilled.state_dict())
    assert {id(p) for p in distilled.parameters()} == {id(p) for p in distilled.student.parameters()}
    assert alone.teacher is None
    assert isinstance(distilled.teacher, Frozen)


def test_without_a_teacher_it_is_plain_training() -> None:
    made, plain, history = module(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)), Net(4), History()
    plain.load_state_dict(made.student.state_dict())
    trainer(history, max_epochs=2).fit(made, loader(), loader())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    expected = []
    for _ in range(2):
        for x, target in loader():
            loss = nn.functional.cross_entropy(plain(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append({"train/loss": float(loss.detach()), "train/task": float(loss.detach())})
    assert history.steps == expected
    for key, value in made.student.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key


def test_it_learns_and_logs_the_weighted_sum() -> None:
    history = History()
    made = module(Net(8), task_weight=0.3, optimizer=lambda p: torch.optim.Adam(p, lr=0.02))
    trainer(history, max_epochs=6).fit(made, loader(), loader())
    assert len(history.steps) == 18
    for step in history.steps:
        assert set(step) == {"train/loss", "train/task", "train/kd", "train/hint"}
        total = 0.3 * step["train/task"] + 0.5 * step["train/kd"] + step["train/hint"]
        assert step["train/loss"] == pytest.approx(total, rel=1e-5)
    assert history.steps[-1]["train/loss"] < 0.8 * history.steps[0]["train/loss"]


@pytest.mark.parametrize(("interval", "rate"), [("epoch", 0.25), ("step", 1.0 * 0.5**6)])
def test_the_scheduler_steps_by_its_interval(interval: str, rate: float) -> None:
    made = module(
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
        lr_interval=interval,
    )
    run = trainer(max_epochs=2)
    run.fit(made, loader(), loader())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


def test_evaluation_is_of_the_student_alone() -> None:
    teacher = Net(8)
    made = module(teacher)
    trainer(limit_val_batches=1.0).validate(made, loader(), verbose=False)
    assert teacher.calls == 0
    predicted = trainer().predict(made, loader())
    assert teacher.calls == 0
    x, target = loader().dataset.tensors
    with torch.no_grad():
        expected = made.student.eval()(x).softmax(1)
    torch.testing.assert_close(torch.cat(predicted), expected)
    run = trainer(limit_val_batches=1.0)
    run.validate(made, loader(), verbose=False)
    assert set(run.callback_metrics) == {"val/loss", "val/accuracy", "val/calibration_error"}
    assert float(run.callback_metrics["val/accuracy"]) == pytest.approx(accuracy_score(target, expected.argmax(1)))
    loss = nn.functional.nll_loss(expected.log(), target)
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(float(loss), rel=1e-5)


HALVES = """
import torch
from test_module import Net, loader, module, trainer
from torch import nn

made = module(Net(8))
run = trainer(limit_val_batches=1.0, strategy="ddp", devices=2)
run.validate(made, loader(), verbose=False)
x, target = loader().dataset.tensors
with torch.no_grad():
    whole = nn.functional.cross_entropy(made.student.eval()(x), target)
torch.testing.assert_close(run.callback_metrics["val/loss"], whole)
"""


@pytest.mark.slow
def test_two_processes_have_one_validation_loss(tmp_path: Path) -> None:
    """By which a scheduler, or a callback, of each process decides."""
    run_script(HALVES, folder=tmp_path, ranks=2)


def agreement(made: DistillationModule, **kwargs: Any) -> float:
    run = trainer(**kwargs)
    run.test(made, loader(), verbose=False)
    return float(run.callback_metrics["test/agreement"])


def test_a_test_measures_the_agreement_with_the_teacher() -> None:
    teacher = Net(8)
    made, x = module(teacher), loader().dataset.tensors[0]
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    teacher.train()
    value = agreement(made)
    with torch.no_grad():
        expected = (made.student.eval()(x).argmax(1) == teacher.eval()(x).argmax(1)).float().mean()
    assert value == pytest.approx(float(expected))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not teacher._forward_pre_hooks
    run = trainer()
    run.test(module(), loader(), verbose=False)
    assert "test/agreement" not in run.callback_metrics


def test_the_agreement_is_with_the_teacher_behind_a_cache(tmp_path: Path) -> None:
    teacher = Net(8)
    made = module(Cached(tmp_path, teacher))
    trainer().fit(made, loader(), loader())
    taught = DistillationModule(made.task, made.student, teacher, {"kd": Term(losses.KD())})
    assert agreement(made) == agreement(taught)


def test_a_task_without_metrics_needs_no_labels() -> None:
    class Plain(TaskAdapter):
        def loss(self, output: Tensor, batch: Any) -> Tensor:
            return output.square().mean()

    run, images = trainer(limit_val_batches=1), DataLoader(torch.randn(8, 6), batch_size=4)
    run.fit(DistillationModule(Plain(), Net(4)), images, images)
    assert run.callback_metrics["val/loss"] > 0


def test_inputs_that_are_no_one_argument_are_told() -> None:
    class Two(TaskAdapter):
        def inputs(self, batch: Any) -> Any:
            return batch[0], batch[1]

        def loss(self, output: Tensor, batch: Any) -> Tensor:
            return output.mean()

    with pytest.raises(TypeError) as error:
        trainer().fit(DistillationModule(Two(), nn.Linear(6, 4)), loader(), loader())
    assert any("Two.inputs returned a tuple of 2 items" in note for note in error.value.__notes__)


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_several_loaders_are_told(stage: str) -> None:
    run, both = trainer(limit_val_batches=2, num_sanity_val_steps=0), [loader(), loader()]
    with pytest.raises(ValueError, match="_dataloader gives several loaders, and DistillationModule measures one"):
        {"fit": lambda: run.fit(module(), loader(), both), "validate": lambda: run.validate(module(), both),
         "test": lambda: run.test(module(), both)}[stage]()  # fmt: skip


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("given", ["float", "dict"])
def test_a_loss_that_is_no_tensor_is_told(given: str, stage: str) -> None:
    class Logging(TaskAdapter):
        def loss(self, output: Tensor, batch: Any) -> Any:
            loss = output.square().mean()
            return loss.item() if given == "float" else {"loss": loss}

    made, run = DistillationModule(Logging(), Net(4)), trainer(limit_val_batches=2, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=r"Logging\.loss returned a (float|dict.*), and a tensor of one number"):
        run.fit(made, loader(), loader()) if stage == "fit" else run.validate(made, loader(), verbose=False)


@pytest.mark.parametrize("what", ["loss", "metric 'r2'"])
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_loss_or_metric_of_several_values_is_told(what: str, stage: str) -> None:
    class Several(TaskAdapter):
        def loss(self, output: Tensor, batch: Any) -> Tensor:
            each = (output - nn.functional.one_hot(batch[1], CLASSES)).square()
            return each.mean(0) if what == "loss" else each.mean()

        def metrics(self) -> MetricCollection:
            return MetricCollection({"r2": R2Score(multioutput="raw_values")})

        def update(self, metrics: MetricCollection, output: Tensor, batch: Any) -> None:
            metrics.update(output, nn.functional.one_hot(batch[1], CLASSES).float())

    made, run = DistillationModule(Several(), Net(4)), trainer(limit_val_batches=2, num_sanity_val_steps=0)
    told = rf"the {what} of Several is a tensor of shape \(3,\), and one number is expected"
    with pytest.raises(ValueError, match=told):
        run.fit(made, loader(), loader()) if stage == "fit" else run.validate(made, loader(), verbose=False)


def test_the_agreement_is_with_the_teacher_as_it_teaches() -> None:
    """Its input and its type are those of the training."""
    teacher = Net(8, inputs=12)
    made, x = module(teacher, teacher_input=lambda x: torch.cat([x, x], dim=1)), loader().dataset.tensors[0]
    trainer().fit(made, loader(), loader())
    with torch.no_grad():
        said = teacher.eval()(torch.cat([x, x], dim=1)).argmax(1)
        expected = (made.student.eval()(x).argmax(1) == said).float().mean()
    assert agreement(made) == pytest.approx(float(expected))
    half = module(Net(8).bfloat16())
    assert 0.0 <= agreement(half) <= 1.0
    assert 0.0 <= agreement(module(Net(8)), precision="bf16-true") <= 1.0


def test_a_checkpoint_loads_into_the_plain_student_and_as_a_teacher(tmp_path: Path) -> None:
    made = module(Net(8))
    run = trainer()
    run.fit(made, loader(), loader())
    run.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    teacher = Frozen(Net(4), checkpoint=tmp_path / "last.ckpt")
    for key, value in made.student.state_dict().items():
        assert torch.equal(teacher.model.state_dict()[key], value)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("form", ["student", "student in place", "module"])
def test_compiled_it_is_the_same_training(form: str) -> None:
    results = []
    weights, teacher = Net(4).state_dict(), Net(8)
    for compiled in (False, True):
        history = History()
        made = module(teacher, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        made.student.load_state_dict(weights)
        made.attachment.distiller.terms["hint"].projector = nn.Linear(4, 8)
        with torch.no_grad():
            for p in made.attachment.distiller.terms.parameters():
                p.fill_(0.1)
        fitted: Any = made
        if compiled and form == "student":
            made.student = torch.compile(made.student, backend="eager")
        elif compiled and form == "student in place":
            made.student.compile(backend="eager")
        elif compiled:
            fitted = torch.compile(made, backend="eager")
        trainer(history).fit(fitted, loader(), loader())
        results.append(history.steps)
        torch._dynamo.reset()
    assert len(results[0]) == len(results[1]) == 3
    for a, b in zip(*results, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
        assert a["train/hint"] > 0
        assert a["train/kd"] > 0


@pytest.mark.parametrize(("interval", "rates"), [("epoch", [1.0, 1.0, 0.5, 0.5]), ("step", [1.0, 0.75, 0.5, 0.25])])
def test_a_schedule_of_the_learning_rate_ends_with_the_run(interval: str, rates: list[float]) -> None:
    seen: list[float] = []

    class Student(DistillationModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

    fitted = Student(
        Classification(CLASSES),
        Net(4),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        lr_scheduler=schedules.Linear(1.0, 0.0),
        lr_interval=interval,
    )
    run = trainer(max_epochs=2, limit_train_batches=2)
    run.fit(fitted, loader(), loader())
    assert seen == rates
    assert run.optimizers[0].param_groups[0]["lr"] == 0.0


def test_a_learning_rate_below_zero_is_told() -> None:
    with pytest.raises(ValueError, match=r"lr_scheduler=Linear\(.*gave -1.0 at 100.0% of the run"):
        trainer(limit_train_batches=2).fit(module(lr_scheduler=schedules.Linear(1.0, -1.0)), loader(), loader())


def test_cosine_of_the_learning_rate_is_torchs_cosine_annealing() -> None:
    def rates(lr_scheduler: Any) -> list[float]:
        fitted = module(lr_scheduler=lr_scheduler)
        seen = []
        watch = LambdaCallback(on_train_epoch_end=lambda run, _: seen.append(run.optimizers[0].param_groups[0]["lr"]))
        trainer(max_epochs=5, limit_train_batches=1, callbacks=[watch]).fit(fitted, loader(), loader())
        return seen

    torchs = rates(lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5))
    assert rates(schedules.Cosine(1.0, 0.0)) == pytest.approx(torchs)


def test_a_schedule_of_the_learning_rate_needs_an_end() -> None:
    fitted = module(lr_scheduler=schedules.Cosine(1.0, 0.0))
    with pytest.raises(ValueError, match="Set max_epochs, or with max_steps lr_interval='step'"):
        trainer(max_epochs=-1, max_steps=3).fit(fitted, loader(), loader())


@pytest.mark.parametrize(
    ("plateau", "watched"),
    [
        (torch.optim.lr_scheduler.ReduceLROnPlateau, "val/loss"),
        (lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/accuracy"), "val/accuracy"),
    ],
)
def test_a_plateau_is_one_of_what_is_validated(plateau: Any, watched: str) -> None:
    run = trainer(limit_val_batches=1)
    run.fit(module(lr_scheduler=plateau), loader(), loader())
    (config,) = run.lr_scheduler_configs
    assert config.monitor == watched
    assert config.scheduler.best == pytest.approx(float(run.callback_metrics[watched]))


def test_another_optimizer_or_no_teacher_does_not_resume(tmp_path: Path) -> None:
    run = trainer()
    run.fit(module(), loader(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    run = trainer()
    run.fit(module(Net(8)), loader(), loader())
    run.save_checkpoint(tmp_path / "hint.ckpt")
    with pytest.raises(ValueError, match="was distilled, with terms that learn, and this one trains the student alone"):
        trainer(max_epochs=2).fit(module(), loader(), loader(), ckpt_path=tmp_path / "hint.ckpt", weights_only=True)
    other = module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    with pytest.raises(ValueError, match=r"its state has no dampening, momentum for SGD\. Resume with"):
        trainer(max_epochs=2).fit(other, loader(), loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


def test_data_without_any_label_cannot_be_measured() -> None:
    unlabelled = DataLoader(TensorDataset(torch.randn(8, 6), torch.full((8,), -100)), batch_size=4)
    made, run = module(), trainer(limit_val_batches=None)
    with pytest.raises(ValueError, match="Classification measured nothing on the val data: no sample has a label"):
        run.validate(made, unlabelled, verbose=False)
    with pytest.raises(ValueError, match="nothing on the test data"):
        run.test(made, unlabelled, verbose=False)
    assert len(run.predict(made, unlabelled) or []) == 2
    labels = torch.full((16,), -100)
    labels[-2:] = 1  # which the sanity check does not see
    some = DataLoader(TensorDataset(torch.randn(16, 6), labels), batch_size=4)
    run = trainer(limit_val_batches=None)
    run.fit(module(), loader(), some)
    assert "val/accuracy" in run.callback_metrics


def test_it_pickles_with_the_optimizer_that_it_has_by_default() -> None:
    made = pickle.loads(pickle.dumps(module(Net(8))))
    optimizer = made.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["lr"] == 1e-3


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_data_that_normalise_on_the_device_come_in_the_precision_of_the_weights(precision: Any) -> None:
    class Bytes(LightningDataModule):
        def train_dataloader(self) -> Any:
            images = torch.arange(96, dtype=torch.uint8).view(16, 6)
            return DataLoader(TensorDataset(images, torch.arange(16) % CLASSES), batch_size=4)

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] / 255, batch[1]

    run, lit = trainer(precision=precision, limit_val_batches=1), module(Net(8))
    run.fit(lit, datamodule=Bytes())
    assert run.callback_metrics["train/hint"] > 0
    run.test(lit, datamodule=Bytes(), verbose=False)
    assert len(run.predict(lit, datamodule=Bytes()) or []) == 4


# Said of any module that has configure_model.
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback:UserWarning")
def test_an_average_of_weights_has_the_projectors_wherever_it_stands() -> None:
    terms = {"hint": Term(losses.FitNet(), student="stem", teacher="stem")}
    module = DistillationModule(Classification(CLASSES), Net(4), Net(8), terms)
    average = EMAWeightAveraging(decay=0.5)
    run = trainer(callbacks=[LambdaCallback(), average])
    for epochs in (1, 2):
        run.fit_loop.max_epochs = epochs
        run.fit(module, loader(), loader())
        assert run.callbacks.index(module.attachment) == run.callbacks.index(average) - 1
        assert run.callback_metrics["train/hint"] > 0
    assert not any("_dist" in key for key in module.state_dict())
