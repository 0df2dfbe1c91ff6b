"""The callback on modules as users and Lightning itself write them; none of their lines is changed."""

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
from lightning_kd.callbacks import EMATeacher, MutualDistillation
from project import QUIET, Direct, Project, data, fit, hint, kd, loader, logged, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler

from lightning_kd import Distillation, Term, losses, schedules

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
    class Grouped(Project):
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

    class Returns(Project):
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
    class Late(Project):
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


@pytest.mark.parametrize("kind", [Distillation, MutualDistillation])
def test_a_step_may_have_an_autocast_of_its_own(kind: Any) -> None:
    class Own(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out = self.model(batch[0])
            return nn.functional.cross_entropy(out.float(), batch[1])

    terms = {"hint": Term(losses.FitNet(), student="0", teacher="0")}
    others = net(16) if kind is Distillation else [net(16)]
    assert logged(fit(Own(), kind(others, terms, student="model")))["train/hint"] > 0


def test_the_module_itself_is_the_student_by_default() -> None:
    term = Term(losses.FitNet(), student="model.0", teacher="0")
    run = fit(Direct(), Distillation(net(16), {"hint": term}))
    assert logged(run)["train/hint"] > 0


def test_two_views_in_one_step() -> None:
    class Views(Project):
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


def test_the_teacher_can_have_another_input() -> None:
    seen: list[Tensor] = []
    teacher = nn.Sequential(nn.Linear(12, 4))
    teacher.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    fit(Project(), kd(teacher=teacher, teacher_input=lambda x: torch.cat([x, x], dim=1)))
    assert seen[0].shape == (4, 12)


def test_a_name_that_the_module_logs_is_the_modules() -> None:
    class Logs(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", loss * 0 + 42.0)
            return loss

    values = logged(fit(Logs(), kd(), max_epochs=2))
    assert values["train/loss"] == 42.0
    assert values["train/kd"] > 0


def test_weights_follow_their_schedule_over_the_run() -> None:
    values: list[float] = []

    class Watch(Project):
        def on_train_batch_end(self, *args: Any) -> None:
            values.append(float(self.trainer.callback_metrics["train/kd/weight"]))

    term = Term(losses.KD(), weight=schedules.Linear(2.0, 0.0))
    fit(Watch(), Distillation(net(16), {"kd": term}, student="model"))
    assert values == [2.0, 1.5, 1.0, 0.5]
    with pytest.raises(ValueError, match=r"A schedule is over the run, and the run has no end"):
        fit(Project(), Distillation(net(16), {"kd": term}, student="model"), max_epochs=-1)


# Everything else that a Trainer does.


@pytest.mark.parametrize("callback", [kd, hint])
def test_fit_again_validate_test_predict(callback: Callable[[], Distillation]) -> None:
    class Full(Project):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.training_step(batch, batch_idx))

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test", self.training_step(batch, batch_idx))

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(batch[0])

    module, attached = Full(), callback()
    teacher = attached.distiller.teacher.model
    calls: list[int] = []
    run = Trainer(callbacks=[attached], **QUIET)
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

    fit(Project(), hint(), batches=DataLoader(Stream(), batch_size=4))

    class Two(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["a"], batch_idx)

    fit(Two(), hint(target=lambda batch: batch["a"][1]), batches={"a": loader(), "b": loader()})


def test_the_rehearsal_leaves_no_trace() -> None:
    class Still(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.eval()  # as some frozen encoders do it
            return super().forward(x)

    class Random(Project):
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
    module = Project()
    fit(torch.compile(module, backend="eager"), kd())
    module = Project()
    module.model = torch.compile(module.model, backend="eager")
    assert logged(fit(module, hint()))["train/hint"] > 0


def test_a_compiled_module_that_ran_before_learns_the_same() -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module, callback = Project(), hint()
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
        run = pl.Trainer(callbacks=[callback], **QUIET)
        module = Foreign()
        run.fit(module, loader())
        assert min(float(value) for value in run.callback_metrics.values()) > 0
        assert list(module._modules) == ["model"]


def test_two_callbacks_are_the_sum_of_their_terms() -> None:
    module = Project()
    first = Distillation(net(16), {"kd": Term(losses.KD(), weight=0.5)}, student="model", task_weight=0.25)
    past = Term(losses.FitNet(), weight=2.0, student="0", teacher="0", projector=nn.Linear(8, 8))
    run = fit(module, first, EMATeacher({"past": past}, student="model"))
    values = logged(run)
    sums = 0.25 * values["train/task"] + 0.5 * values["train/kd"] + 2.0 * values["train/past"]
    assert values["train/loss"] == pytest.approx(sums)
    assert values["train/past"] > 0
    assert list(module._modules) == ["model"]
    assert "training_step" not in vars(module)


def test_an_error_in_training_step_is_the_users_own() -> None:
    class Broken(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise ArithmeticError("mine")

    module = Broken()
    for callback in (kd(), hint()):
        with pytest.raises(ArithmeticError, match="mine"):
            fit(module, callback)
        assert "training_step" not in vars(module)


@pytest.mark.parametrize("callback", [kd, hint])
@pytest.mark.parametrize("finder", [LearningRateFinder(num_training_steps=4), BatchSizeFinder(max_trials=1)])
def test_what_trains_before_the_training(callback: Callable[[], Distillation], finder: Any, tmp_path: Path) -> None:
    class Tuned(Project):
        lr, batch_size = 0.1, 4

        def train_dataloader(self) -> DataLoader:
            return DataLoader(data(), batch_size=self.batch_size, num_workers=0)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module = Tuned()
    options = QUIET | {"enable_checkpointing": True}  # Lightning's own, which the finder puts its state into
    run = Trainer(callbacks=[finder, callback()], default_root_dir=tmp_path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own, about its finder
        run.fit(module)
    assert "training_step" not in vars(module)


def test_a_module_may_log_the_same_name_at_the_end_of_a_batch() -> None:
    class Logging(Project):
        def on_train_batch_end(self, outputs: Any, *args: Any) -> None:
            self.log("train/loss", outputs["loss"], on_step=True, on_epoch=True)

    assert "train/kd" in logged(fit(Logging(), kd()))


def test_the_rehearsal_puts_a_samplers_generator_back() -> None:
    def run(callback: Distillation) -> list[Tensor]:
        seen: list[Tensor] = []

        class Seeing(Project):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                seen.append(batch[1])
                return super().training_step(batch, batch_idx)

        sampler = SubsetRandomSampler(range(12), generator=torch.Generator().manual_seed(3))
        fit(Seeing(), callback, batches=DataLoader(data(), batch_size=4, sampler=sampler))
        return seen[-3:]

    plain, rehearsed = run(kd()), run(hint())
    assert all(map(torch.equal, plain, rehearsed))


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

    class Retrying(Project):
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


def test_a_first_parameter_group_that_is_empty() -> None:
    class Empty(Project):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([{"params": []}, {"params": list(self.parameters())}], lr=0.1)

    fit(Empty(), hint())


def test_a_barebones_trainer_is_not_asked_to_log(recwarn: pytest.WarningsRecorder) -> None:
    run = Trainer(barebones=True, max_epochs=1, callbacks=[kd()], accelerator="cpu")
    run.fit(Project(), loader())
    assert not [each for each in recwarn if "self.log()" in str(each.message)]


def test_a_second_fit_of_one_trainer_logs_its_terms_too() -> None:
    module, callback = Project(), hint()
    run = fit(module, callback)
    first = logged(run)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    assert logged(run).keys() == first.keys()
    assert logged(run)["train/hint"] != first["train/hint"]


def test_a_penalty_on_the_modules_parameters_is_on_no_projector() -> None:
    class Penalized(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + sum(p.abs().sum() for p in self.parameters())

    def task_loss(callback: Distillation) -> float:
        return logged(fit(Penalized(), callback, max_steps=1))["train/task"]

    assert task_loss(kd()) == task_loss(hint())
