"""The callback on modules as users and Lightning itself write them; none of their lines is changed."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_kd.callbacks import EMATeacher
from lightning_kd.tasks import Classification
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from lightning_kd import Distillation, DistillationModule, Distiller, Term, losses, schedules, teachers


def net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(16, 6, generator=generator), torch.randint(0, 4, (16,), generator=generator))


def loader() -> DataLoader:
    return DataLoader(data(), batch_size=4)


class Base(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = net(8)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: LightningModule, *callbacks: Any, batches: Any = None, **kwargs: Any) -> Trainer:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    run = Trainer(callbacks=list(callbacks), **options | kwargs)
    run.fit(module, loader() if batches is None else batches)
    return run


def kd(student: str | None = "model", teacher: nn.Module | None = None, **kwargs: Any) -> Distillation:
    return Distillation(teacher or net(16), {"kd": Term(losses.KD(), weight=0.9)}, student=student, **kwargs)


def hint(**kwargs: Any) -> Distillation:
    term = Term(losses.FitNet(), student="0", teacher="0")
    return Distillation(net(16), {"hint": term}, **{"student": "model"} | kwargs)


def logged(run: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in run.callback_metrics.items()}


# Modules of Lightning, of timm users, and with the optimizers of real projects.


def test_boring_model() -> None:
    run = fit(
        BoringModel(), kd(None, nn.Linear(32, 2)), batches=BoringModel().train_dataloader(), limit_train_batches=3
    )
    assert logged(run)["train/kd"] > 0


def test_lightning_transformer() -> None:
    class Words(Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            words = torch.randint(0, 30, (36,), generator=torch.Generator().manual_seed(index))
            return words[:-1], words[1:]

    class Offline(LightningTransformer):
        def prepare_data(self) -> None:
            """Would download WikiText."""

    teacher, student = Offline(vocab_size=30), Offline(vocab_size=30)
    # It returns log-probabilities (B * T, V), which are logits.
    callback = Distillation(
        teacher.model,
        {
            "kd": Term(losses.KD()),
            "hint": Term(losses.FitNet(), student="transformer.encoder", teacher="transformer.encoder"),
        },
        student="model",
    )
    run = fit(student, callback, batches=DataLoader(Words(), batch_size=2))
    assert logged(run)["train/kd"] > 0
    assert logged(run)["train/hint"] > 0


def test_a_timm_classifier() -> None:
    class TimmClassifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model("resnet10t", num_classes=4)
            self.criterion = nn.CrossEntropyLoss()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            logits = self(batch["image"])
            return {"loss": self.criterion(logits, batch["label"]), "logits": logits}

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net.parameters(), lr=1e-3)

    items = [{"image": torch.randn(3, 32, 32), "label": torch.tensor(i % 4)} for i in range(4)]
    callback = Distillation(
        timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, depth=2),
        {
            "dkd": Term(losses.DKD()),
            "tokens": Term(losses.FitNet(), student="net.layer3", teacher="blocks.1"),
        },
        target="label",
    )
    run = fit(TimmClassifier(), callback, batches=DataLoader(items, batch_size=2))
    assert logged(run)["train/dkd"] > 0
    assert logged(run)["train/tokens"] > 0


def test_two_parameter_groups_and_a_scheduler_per_step() -> None:
    class Grouped(Base):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.model[0].parameters(), "lr": 0.01}, {"params": self.model[2].parameters()}]
            optimizer = torch.optim.AdamW(groups, lr=0.1)
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.01, 0.1], total_steps=4)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    run = fit(Grouped(), hint())
    optimizer = run.optimizers[0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2 + 2, 2]
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [group["lr"] for group in fit(Grouped()).optimizers[0].param_groups]
    assert rates != [0.01, 0.1]


# What training_step may return, and where networks may be made.


@pytest.mark.parametrize("returned", ["tensor", "dict", "none"])
@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_what_training_step_returns(returned: str) -> None:
    outputs = []

    class Returns(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            skipped = returned == "none" and batch_idx % 2
            return None if skipped else {"loss": loss, "more": 1} if returned == "dict" else loss

        def on_train_batch_end(self, outputs_: Any, batch: Any, batch_idx: int) -> None:
            outputs.append(outputs_)

    run = fit(Returns(), kd())
    assert logged(run)["train/loss"] == pytest.approx(logged(run)["train/task"] + 0.9 * logged(run)["train/kd"])
    if returned == "dict":
        assert outputs[0]["more"] == 1


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
@pytest.mark.parametrize("callback", [kd, hint])
def test_networks_made_late(hook: str, callback: Callable[[], Distillation]) -> None:
    class Late(Base):
        def __init__(self) -> None:
            LightningModule.__init__(self)

    def make(self: LightningModule, stage: str = "") -> None:
        if not hasattr(self, "model"):
            self.model = net(8)

    setattr(Late, hook, make)
    module = Late()
    run = fit(module, callback())
    assert min(logged(run).values()) > 0
    assert list(module._modules) == ["model"]


def test_the_module_itself_is_the_student_by_default() -> None:
    class Direct(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    term = Term(losses.FitNet(), student="model.0", teacher="0")
    run = fit(Direct(), Distillation(net(16), {"hint": term}))
    assert logged(run)["train/hint"] > 0


def test_two_views_in_one_step() -> None:
    class Views(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            one, two = self.model(batch[0]), self.model(batch[0] + 0.1)
            with torch.no_grad():
                self.model(batch[0])
            return (one - two).square().mean()

    teacher = net(16)
    calls: list[Tensor] = []
    teacher.register_forward_hook(lambda module, args, output: calls.append(args[0]))
    fit(Views(), kd(teacher=teacher))
    assert len(calls) == 2 * 4
    assert torch.equal(calls[0] + 0.1, calls[1])


# Labels, inputs and logs.


@pytest.mark.parametrize("target", [None, 1, lambda batch: batch[1]])
def test_labels_of_a_tuple(target: Any) -> None:
    fit(Base(), Distillation(net(16), {"dkd": Term(losses.DKD())}, student="model", target=target))


def test_labels_that_are_not_there() -> None:
    class Unlabelled(Base):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(batch).square().mean()

    images = DataLoader(torch.randn(8, 6), batch_size=4)
    fit(Unlabelled(), kd(), batches=images)
    with pytest.raises(ValueError, match=r"needs 'target', and batch\[1\] did not get it out of the batch, a tensor"):
        fit(Unlabelled(), Distillation(net(16), {"dkd": Term(losses.DKD())}, student="model"), batches=images)
    optional = Distillation(net(16), {"z": Term(losses.Standardized(losses.KD()))}, student="model")
    fit(Unlabelled(), optional, batches=images)


def test_the_teacher_can_have_another_input() -> None:
    seen: list[Tensor] = []
    teacher = nn.Sequential(nn.Linear(12, 4))
    teacher.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    fit(Base(), kd(teacher=teacher, teacher_input=lambda x: torch.cat([x, x], dim=1)))
    assert seen[0].shape == (4, 12)


def test_a_name_that_the_module_logs_is_the_modules() -> None:
    class Logs(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", loss * 0 + 42.0)
            return loss

    values = logged(fit(Logs(), kd(), max_epochs=2))
    assert values["train/loss"] == 42.0
    assert values["train/kd"] > 0


def test_weights_follow_their_schedule_over_the_run() -> None:
    values: list[float] = []

    class Watch(Base):
        def on_train_batch_end(self, *args: Any) -> None:
            values.append(float(self.trainer.callback_metrics["train/kd/weight"]))

    term = Term(losses.KD(), weight=schedules.Linear(2.0, 0.0))
    fit(Watch(), Distillation(net(16), {"kd": term}, student="model"))
    assert values == [2.0, 1.5, 1.0, 0.5]
    with pytest.raises(ValueError, match=r"A schedule is over the run, and the run has no end"):
        fit(Base(), Distillation(net(16), {"kd": term}, student="model"), max_epochs=-1)


# Everything else that a Trainer does.


@pytest.mark.parametrize("callback", [kd, hint])
def test_fit_again_validate_test_predict(callback: Callable[[], Distillation]) -> None:
    class Full(Base):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.training_step(batch, batch_idx))

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test", self.training_step(batch, batch_idx))

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(batch[0])

    module, attached = Full(), callback()
    teacher = attached.distiller.teacher.model
    calls: list[int] = []
    run = Trainer(
        callbacks=[attached], max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    run.validate(module, loader(), verbose=False)
    run.fit(module, loader(), loader())
    teacher[0].register_forward_hook(lambda *args: calls.append(1))
    run.validate(module, loader(), verbose=False)
    run.test(module, loader(), verbose=False)
    assert len(run.predict(module, loader())) == 4
    assert not calls
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(), loader())
    assert len(calls) == 4
    run = Trainer(fast_dev_run=True, callbacks=[callback()], accelerator="cpu", enable_progress_bar=False)
    run.fit(Full(), loader(), loader())


def test_an_iterable_data_set_and_several_loaders() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter([data()[i] for i in range(8)])

    fit(Base(), hint(), batches=DataLoader(Stream(), batch_size=4))

    class Two(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["a"], batch_idx)

    fit(Two(), hint(target=lambda batch: batch["a"][1]), batches={"a": loader(), "b": loader()})


def test_the_rehearsal_leaves_no_trace() -> None:
    class Still(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.eval()  # as some frozen encoders do it
            return super().forward(x)

    class Random(Base):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), Still(8, 4))
            self.steps: list[int] = []

        def on_train_start(self) -> None:
            assert self.model[3].training

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("before", 1.0)
            logits = self.model(batch[0])
            self.steps.append(batch_idx)
            return nn.functional.cross_entropy(logits, batch[1])

    states = []
    unweighted = Term(losses.FitNet(), weight=0.0, student="0", teacher="0")
    for callbacks in ([], [Distillation(net(16), {"hint": unweighted}, student="model")]):
        torch.manual_seed(5)
        module = Random()
        fit(module, *callbacks)
        assert module.steps == [0, 1, 2, 3]
        states.append(module.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo at a graph break
def test_a_compiled_module() -> None:
    module = Base()
    fit(torch.compile(module, backend="eager"), kd())
    module = Base()
    module.model = torch.compile(module.model, backend="eager")
    assert logged(fit(module, hint()))["train/hint"] > 0


def test_a_compiled_module_that_ran_before_learns_the_same() -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module, callback = Base(), hint()
        if compiled:
            module.model = torch.compile(module.model, backend="eager")
            module.model(torch.zeros(4, 6))
        found.append(logged(fit(module, callback))["train/hint"])
    assert found[1] == pytest.approx(found[0]) != 0


def test_projects_on_pytorch_lightning() -> None:
    class Foreign(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = net(8)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    for callback in (kd(), hint()):
        run = pl.Trainer(
            callbacks=[callback], max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, accelerator="cpu",
        )  # fmt: skip
        module = Foreign()
        run.fit(module, loader())
        assert min(float(value) for value in run.callback_metrics.values()) > 0
        assert list(module._modules) == ["model"]


# What is refused, and how.


def test_manual_optimization_is_told_what_to_call() -> None:
    class Manual(Base):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match=r"manual optimization.*distiller\.watch\(\)"):
        fit(Manual(), kd())


@pytest.mark.parametrize("hook", ["setup", "configure_optimizers", "on_train_start"])
def test_manual_optimization_that_is_said_late_is_told_too(hook: str) -> None:
    """It would step its optimizers, and the terms would be silently nothing."""

    class Late(Base):
        def _late(self, *args: object, **kwargs: object) -> object:
            self.automatic_optimization = False
            return getattr(super(), hook)(*args, **kwargs)

    setattr(Late, hook, Late._late)
    with pytest.raises(ValueError, match="uses manual optimization"):
        fit(Late(), kd())


def test_what_manual_optimization_calls_works() -> None:
    class Manual(Base):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.values: list[float] = []
            self.distiller = Distiller({"kd": Term(losses.KD())}, net(16))
            self.distiller.attach(self.model)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            with self.distiller.watch() as calls:
                loss = super().training_step(batch, batch_idx)
            found = self.distiller(calls, target=batch[1])
            self.optimizers().zero_grad()
            self.manual_backward(loss + self.distiller.total(found))
            self.optimizers().step()
            self.values.append(float(found["kd"].detach()))

    module = Manual()
    fit(module)
    assert len(module.values) == 4
    assert all(value > 0 for value in module.values)
    assert not any("teacher" in key for key in module.state_dict())


def test_a_student_that_is_not_called() -> None:
    with pytest.raises(RuntimeError, match=r"did not call the student \(Base.forward\).*'model'"):
        fit(Base(), kd(None))


def test_a_student_of_which_a_method_is_called() -> None:
    class Methods(Base):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.model.forward(batch[0]), batch[1])

    told = r"\('model'\).* A call is self\.model\(x\): forward\(x\) and other methods .* one of its submodules\."
    with pytest.raises(RuntimeError, match=told):
        fit(Methods(), kd("model"))


def test_an_unknown_path_lists_the_closest_and_leaves_nothing_behind() -> None:
    module = Base()
    for callback in (
        Distillation(net(16), {"hint": Term(losses.FitNet(), student="9", teacher="0")}, student="model"),
        Distillation(net(16), {"hint": Term(losses.FitNet(), student="0", teacher="0.x")}, student="model"),
        kd("modle"),
    ):
        with pytest.raises(ValueError, match=r"has no module .*Closest: '"):
            fit(module, callback)
        assert "training_step" not in vars(module)
        assert list(module._modules) == ["model"]
        assert not module.model._forward_hooks


def test_two_callbacks_are_the_sum_of_their_terms() -> None:
    module = Base()
    first = Distillation(net(16), {"kd": Term(losses.KD(), weight=0.5)}, student="model", task_weight=0.25)
    past = Term(losses.FitNet(), weight=2.0, student="0", teacher="0", projector=nn.Linear(8, 8))
    run = fit(module, first, EMATeacher({"past": past}, student="model"))
    values = logged(run)
    sums = 0.25 * values["train/task"] + 0.5 * values["train/kd"] + 2.0 * values["train/past"]
    assert values["train/loss"] == pytest.approx(sums)
    assert values["train/past"] > 0
    assert list(module._modules) == ["model"]
    assert "training_step" not in vars(module)


@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
def test_two_callbacks_that_contradict_each_other_are_refused() -> None:
    module = DistillationModule(Classification(4), net(8), net(16), {"kd": Term(losses.KD())})
    with pytest.raises(ValueError, match="More than one callback has a term named kd"):
        fit(module, kd())
    weighed = EMATeacher({"past": Term(losses.KD())}, student="model", task_weight=0.1)
    with pytest.raises(ValueError, match="first of the Trainer's callbacks that distil, Distillation, to give"):
        fit(Base(), kd(), weighed)


def test_an_error_in_training_step_is_the_users_own() -> None:
    class Broken(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise ArithmeticError("mine")

    module = Broken()
    for callback in (kd(), hint()):
        with pytest.raises(ArithmeticError, match="mine"):
            fit(module, callback)
        assert "training_step" not in vars(module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"terms": {}}, "terms is empty"),
        ({"terms": {"loss": Term(losses.KD())}}, "cannot be a term's name"),
        ({"terms": {"kd": losses.KD()}}, "wrap the loss"),
        ({"teacher": "resnet50"}, "teacher is a module"),
        ({"labels": {"maks": 1}}, "labels= gives 'maks', which no loss .* Asked for"),
        ({"student": net(4)}, "student is the dotted path of a module .*got Sequential"),
        ({"task_weight": -1.0}, "task_weight"),
        ({"terms": [Term(losses.KD())]}, "terms are given by name"),
        ({"terms": {1: Term(losses.KD())}}, "cannot be a term's name"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Distillation(**{"teacher": net(4), "terms": {"kd": Term(losses.KD())}} | arguments)


@pytest.mark.parametrize("callback", [kd, hint])
@pytest.mark.parametrize("finder", [LearningRateFinder(num_training_steps=4), BatchSizeFinder(max_trials=1)])
def test_what_trains_before_the_training(callback: Callable[[], Distillation], finder: Any, tmp_path: Path) -> None:
    class Tuned(Base):
        lr, batch_size = 0.1, 4

        def train_dataloader(self) -> DataLoader:
            return DataLoader(data(), batch_size=self.batch_size, num_workers=0)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module = Tuned()
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(callbacks=[finder, callback()], max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own, about its finder
        run.fit(module)
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("returned", [(torch.ones(()), 1), 1.0, "loss"])
def test_what_is_no_loss_is_lightnings_to_tell(returned: Any) -> None:
    class Odd(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            return returned

    with pytest.raises(MisconfigurationException, match="training_step"):
        fit(Odd(), kd())


def test_labels_that_a_loss_can_do_without() -> None:
    class Unlabelled(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(batch[0]).square().mean()

    term = Term(losses.Standardized(losses.KD()))
    run = fit(
        Unlabelled(),
        Distillation(net(16), {"kd": term}, student="model"),
        batches=DataLoader(TensorDataset(torch.randn(8, 6)), batch_size=4),
    )
    assert logged(run)["train/kd"] > 0


def _hints(*names: str, width: int = 16) -> Distillation:
    return Distillation(net(width), {n: Term(losses.FitNet(), student="0", teacher="0") for n in names}, "model")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (_hints("a", "b"), _hints("a"), "b.projector.weight .* is gone"),
        (_hints("a"), _hints("a", "b"), "b.projector.weight is new"),
        (_hints("a"), _hints("a", width=12), r"was \(16, 8\) and is \(12, 8\)"),
        (_hints("a", "b"), _hints("b", "a"), "their order was a, b"),
        (kd(), _hints("a"), "parameters to learn: a"),
        (None, _hints("a"), "parameters to learn: a"),
    ],
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # Lightning's: other terms, another callback
def test_resuming_with_other_terms_says_what_differs(before: Any, after: Any, message: str, tmp_path: Path) -> None:
    fit(Base(), *([before] if before else [])).save_checkpoint(tmp_path / "run.ckpt")
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(callbacks=[after], max_epochs=2, accelerator="cpu", enable_checkpointing=False, **options)
    with pytest.raises(ValueError, match=message):
        run.fit(Base(), loader(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)


def test_two_teachers_with_terms_of_their_own_resume_exactly(tmp_path: Path) -> None:
    def both() -> list[Distillation]:
        return [_hints("a"), _hints("b", width=12)]

    def run(epochs: int, **options: Any) -> Base:
        torch.manual_seed(0)
        model = Base()
        trainer = Trainer(
            callbacks=both(), max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(model, loader(), weights_only=True, **options)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    run(1)
    resumed, whole = run(2, ckpt_path=tmp_path / "1.ckpt"), run(2)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])


def test_callbacks_in_another_order_do_not_resume(tmp_path: Path) -> None:
    fit(Base(), _hints("a"), _hints("b", width=12)).save_checkpoint(tmp_path / "run.ckpt")
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [_hints("b", width=12), _hints("a")]
    run = Trainer(callbacks=callbacks, max_epochs=2, accelerator="cpu", enable_checkpointing=False, **options)
    with pytest.raises(ValueError, match="had its callbacks in the order"):
        run.fit(Base(), loader(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)


def test_two_callbacks_share_nothing_that_is_bound_or_learned() -> None:
    teacher, loss = teachers.Frozen(net(16)), losses.FitNet()
    terms: list[dict[str, Term]] = [{n: Term(losses.FitNet(), student="0", teacher="0")} for n in "ab"]
    with pytest.raises(ValueError, match="one Frozen"):
        fit(Base(), *(Distillation(teacher, each, "model") for each in terms))
    terms = [{n: Term(loss, student="0", teacher="0")} for n in "ab"]
    with pytest.raises(ValueError, match="one FitNet"):
        fit(Base(), *(Distillation(net(16), each, "model") for each in terms))


def test_a_student_that_no_optimizer_knows_is_told() -> None:
    class Forgotten(Base):
        def __init__(self) -> None:
            super().__init__()
            self.other = net(4)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.other.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="None of the student's parameters, those of a Sequential, is in an optimizer"):
        fit(Forgotten(), kd())


class Detached(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor | None = None) -> Tensor:
        return student.detach() if teacher is None else nn.functional.mse_loss(student.detach(), teacher)


def test_a_loss_or_projector_without_a_gradient_is_refused() -> None:
    for term in (Term(Detached()), Term(losses.FitNet(), projector=Detached())):
        with pytest.raises(ValueError, match="without a gradient"):
            fit(Base(), Distillation(net(16), {"odd": term}, student="model"))


def test_a_teacher_that_overwrites_its_input_is_refused() -> None:
    class InPlace(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    teacher = InPlace(*net(16))
    with pytest.raises(ValueError, match=r"overwrites its input .*teacher_input=lambda x: x\.clone\(\)"):
        fit(Base(), kd(teacher=teacher))
    fit(Base(), kd(teacher=teacher, teacher_input=torch.clone))


def test_a_module_may_log_the_same_name_at_the_end_of_a_batch() -> None:
    class Logging(Base):
        def on_train_batch_end(self, outputs: Any, *args: Any) -> None:
            self.log("train/loss", outputs["loss"], on_step=True, on_epoch=True)

    assert "train/kd" in logged(fit(Logging(), kd()))


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")  # Lightning's, of its feature
def test_a_step_that_fetches_its_own_batch() -> None:
    class Fetching(Base):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            batch, _, _ = next(dataloader_iter)
            return super().training_step(batch, 0)

    with pytest.raises(ValueError, match="takes its batch from a dataloader_iter"):
        fit(Fetching(), hint())


def test_a_teacher_without_weights_is_refused() -> None:
    with torch.device("meta"):
        teacher = net(16)
    with pytest.raises(ValueError, match="has no weights: it is on the meta device"):
        fit(Base(), kd(teacher=teacher))


def test_muon_is_told_what_it_cannot_optimize() -> None:
    class Matrices(Base):
        def configure_optimizers(self) -> Any:
            return torch.optim.Muon([p for p in self.parameters() if p.ndim == 2], lr=0.01)

    with pytest.raises(ValueError, match="Muon optimizes matrices only"):
        fit(Matrices(), hint())


def test_the_rehearsal_puts_a_samplers_generator_back() -> None:
    def run(callback: Distillation) -> list[Tensor]:
        seen: list[Tensor] = []

        class Seeing(Base):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                seen.append(batch[1])
                return super().training_step(batch, batch_idx)

        sampler = SubsetRandomSampler(range(12), generator=torch.Generator().manual_seed(3))
        fit(Seeing(), callback, batches=DataLoader(data(), batch_size=4, sampler=sampler))
        return seen[-3:]

    plain, rehearsed = run(kd()), run(hint())
    assert all(map(torch.equal, plain, rehearsed))


def test_a_loss_of_each_sample_is_refused() -> None:
    class Unreduced(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1], reduction="none")

    with pytest.raises(ValueError, match=r"a loss of shape \(\d+,\), and a loss is one number"):
        fit(Unreduced(), kd())


@pytest.mark.parametrize("task_weight", [0.0, 1.0])
def test_the_modules_own_loss_is_blamed_where_it_is_not_finite(task_weight: float) -> None:
    class Broken(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(batch[0]).mean() * math.nan

    with pytest.raises(FloatingPointError, match=r"Step 1: .*after the module's own loss was not finite"):
        fit(Broken(), kd(task_weight=task_weight), max_epochs=2)


def test_a_call_that_failed_is_forgotten() -> None:
    seen: list[Tensor] = []

    class Seen(nn.Module):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            seen.append(teacher)
            return (student - teacher).square().mean()

    class Failing(nn.Sequential):
        failed = False

        def forward(self, x: Tensor) -> Tensor:
            self.failed = not self.failed
            if self.failed:
                raise RuntimeError("out of memory, say")
            return super().forward(x)

    class Retrying(Base):
        def __init__(self) -> None:
            super().__init__()
            self.model = Failing(*net(8))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            try:
                return self.model(batch[0]).mean()
            except RuntimeError:
                return self.model(3 * batch[0]).mean()

    for path in ("2", "output"):
        teacher = net(16)
        fit(Retrying(), Distillation(teacher, {"seen": Term(Seen(), student=path, teacher=path)}, student="model"))
        torch.testing.assert_close(seen[-1], teacher(3 * data()[12:][0]))


def test_an_iterator_is_not_robbed_of_a_batch() -> None:
    with pytest.raises(ValueError, match="can be read only once"):
        fit(Base(), hint(), batches=iter(list(loader())))


def test_a_first_parameter_group_that_is_empty() -> None:
    class Empty(Base):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([{"params": []}, {"params": list(self.parameters())}], lr=0.1)

    fit(Empty(), hint())


def test_an_error_in_the_teacher_is_said_to_be_there() -> None:
    with pytest.raises(RuntimeError) as error:
        fit(Base(), kd(teacher=nn.Linear(7, 4)))
    assert "teacher_input=" in error.value.__notes__[0]


def test_a_callback_that_learned_for_another_student_says_so() -> None:
    callback = hint()
    fit(Base(), callback)
    other = Base()
    other.model = net(5)
    with pytest.raises(RuntimeError) as error:
        fit(other, callback)
    assert "make a new one" in error.value.__notes__[0]


def test_inputs_may_ask_for_labels() -> None:
    seen: list[tuple[str, Any]] = []

    def privileged(x: Tensor, *, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor]:
        seen.append(("teacher", (target, mask)))
        return (x + target[:, None],)

    def harder(x: Tensor, *, noise: Tensor) -> Tensor:
        seen.append(("student", noise))
        return x + noise

    batch = torch.randn(4, 6), torch.arange(4)
    batches = DataLoader(TensorDataset(*batch), batch_size=4)
    noise = {"noise": lambda batch: torch.full_like(batch[0], 0.5)}
    # Rehearsed, too: it needs a projector.
    fit(Base(), hint(teacher_input=privileged, student_input=harder, labels=noise), batches=batches)
    assert [side for side, _ in seen] == ["student", "teacher"] * 2
    assert torch.equal(seen[-1][1][0], batch[1])
    assert seen[-1][1][1] is None
    assert torch.equal(seen[-2][1], torch.full((4, 6), 0.5))


def test_an_input_that_asks_for_what_is_not_there() -> None:
    def harder(x: Tensor, *, noise: Tensor) -> Tensor:
        return x + noise

    with pytest.raises(ValueError, match=r"harder, which makes a model's arguments, asks for 'noise'.*labels="):
        fit(Base(), kd(student_input=harder))


def test_labels_have_one_way_in() -> None:
    with pytest.raises(ValueError, match="give target by that name"):
        kd(labels={"target": 1})


def test_a_barebones_trainer_is_not_asked_to_log(recwarn: pytest.WarningsRecorder) -> None:
    run = Trainer(barebones=True, max_epochs=1, callbacks=[kd()], accelerator="cpu")
    run.fit(Base(), loader())
    assert not [each for each in recwarn if "self.log()" in str(each.message)]


def test_a_student_that_is_called_only_sometimes() -> None:
    class Sometimes(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx < 2 else self.model[0].weight.square().sum()

    with pytest.raises(RuntimeError, match=r"called the student \('model'\) before, and not in step 2, epoch 0"):
        fit(Sometimes(), kd())


def test_a_batch_of_two_views_needs_labels_of_both() -> None:
    class Views(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self.model(torch.cat([batch[0], batch[0]])), torch.cat([batch[1]] * 2))

    def dkd(**kwargs: Any) -> Distillation:
        return Distillation(net(16), {"dkd": Term(losses.DKD())}, student="model", **kwargs)

    with pytest.raises(ValueError, match=r"two views or a part of a batch: pass the labels of what it is called with"):
        fit(Views(), dkd())
    fit(Views(), dkd(target=lambda batch: torch.cat([batch[1], batch[1]])))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # what is tried
def test_torchscript_is_one_piece() -> None:
    class Scripted(Base):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.jit.script(net(8))

    with pytest.raises(ValueError, match="is TorchScript, whose calls cannot be watched"):
        fit(Scripted(), kd())
    with pytest.raises(ValueError, match=r"Term 'hint': the teacher .* is TorchScript, inside of which nothing"):
        fit(Base(), Distillation(torch.jit.script(net(16)), {"hint": hint().distiller.terms["hint"]}, student="model"))
    run = fit(Base(), kd(teacher=torch.jit.script(net(16))))
    assert logged(run)["train/kd"] > 0


def test_a_second_fit_of_one_trainer_logs_its_terms_too() -> None:
    module, callback = Base(), hint()
    run = fit(module, callback)
    first = logged(run)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    assert logged(run).keys() == first.keys()
    assert logged(run)["train/hint"] != first["train/hint"]
