"""Mean teacher on a module that knows nothing of it."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler, ModelCheckpoint
from lightning_kd.callbacks import Distillation, EMATeacher, WeightScheduler
from project import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import Term, losses, schedules, teachers


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(16, 6, generator=generator), torch.randint(0, 4, (16,), generator=generator))
    return DataLoader(data, batch_size=4)


def fit(module: LightningModule, *callbacks: Callback, ckpt_path: Path | None = None, **kwargs: Any) -> Trainer:
    if ckpt_path:  # Lightning wants what made the checkpoint
        callbacks = (*callbacks, ModelCheckpoint(ckpt_path.parent, filename="resumed"))
    saves = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    options = {"max_epochs": 2, "enable_checkpointing": saves, "num_sanity_val_steps": 0}
    run = Trainer(callbacks=list(callbacks), **QUIET | options | kwargs)
    run.fit(module, loader(), loader(), ckpt_path=ckpt_path, weights_only=True)
    return run


def mean_teacher(**kwargs: Any) -> EMATeacher:
    return EMATeacher({"consistency": Term(losses.KD(temperature=1.0))}, student="model", **{"decay": 0.9} | kwargs)


class Weights(Callback):
    """The student's weights after every batch, and at validation."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.steps.append(pl_module.model[0].weight.detach().clone())

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.validated.append(pl_module.model[0].weight.detach().clone())


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_it_moves_once_per_optimizer_step(accumulate: int) -> None:
    seed_everything(0)
    module, weights, callback = Lit(), Weights(), mean_teacher()
    expected = module.model[0].weight.detach().clone()
    fit(module, weights, callback, accumulate_grad_batches=accumulate)
    after_optimizer_steps = weights.steps[accumulate - 1 :: accumulate]
    assert len(after_optimizer_steps) == 8 // accumulate
    for student in after_optimizer_steps:
        expected = 0.9 * expected + 0.1 * student
    torch.testing.assert_close(callback.distiller.teacher.model[0].weight, expected)


def test_validation_and_checkpoints_may_use_the_average(tmp_path: Path) -> None:
    module, weights, callback = Lit(), Weights(), mean_teacher(evaluate=True)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    seed_everything(0)
    expected = module.model[0].weight.detach().clone()
    fit(module, weights, callback, keep)
    averages = []
    for student in weights.steps:
        expected = 0.9 * expected + 0.1 * student
        averages.append(expected)
    for epoch, average in enumerate((averages[3], averages[7])):
        torch.testing.assert_close(weights.validated[4 * epoch], average)
        state = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        torch.testing.assert_close(state["model.0.weight"], average)
        Lit().load_state_dict(state, strict=True)
    torch.testing.assert_close(module.model[0].weight, averages[7])
    seen = Weights()
    fit(Lit(), seen, mean_teacher(evaluate=True), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert torch.equal(seen.steps[0], weights.steps[4])  # it trained on from its own weights


def test_without_being_asked_they_are_the_students() -> None:
    module, weights = Lit(), Weights()
    fit(module, weights, mean_teacher())
    assert torch.equal(weights.validated[0], weights.steps[3])
    assert torch.equal(module.model[0].weight, weights.steps[-1])


def test_an_interrupted_validation_leaves_the_student_its_weights() -> None:
    class Interrupts(Weights):
        def on_validation_batch_start(self, *args: Any) -> None:
            raise ArithmeticError

    module, weights = Lit(), Interrupts()
    with pytest.raises(ArithmeticError):
        fit(module, weights, mean_teacher(evaluate=True))
    assert torch.equal(module.model[0].weight, weights.steps[3])


def test_a_run_that_had_no_average_goes_on_with_one_of_its_own_weights(tmp_path: Path) -> None:
    fit(Lit(), ModelCheckpoint(tmp_path, filename="it"), max_epochs=1)

    class First(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            self.same = torch.equal(callback.distiller.teacher.model[0].weight, pl_module.model[0].weight)
            trainer.should_stop = True

    callback, first = mean_teacher(), First()
    fit(Lit(), callback, first, ckpt_path=tmp_path / "it.ckpt")
    assert first.same


def test_another_teacher_does_not_resume_it(tmp_path: Path) -> None:
    def terms() -> dict[str, Term]:
        return {"hint": Term(losses.FitNet(), student="0", teacher="0", projector=nn.Linear(8, 8))}

    fit(Lit(), Distillation(teachers.EMA(), terms(), "model"), ModelCheckpoint(tmp_path, filename="it"), max_epochs=1)
    frozen = Distillation(Lit().model, terms(), "model")
    with pytest.raises(
        ValueError, match=r"remembered \['active', 'copies'\], and this one, a Frozen, remembers nothing"
    ):
        fit(Lit(), frozen, ckpt_path=tmp_path / "it.ckpt")


def test_a_second_fit_starts_from_the_student_of_then() -> None:
    module, callback = Lit(), mean_teacher(decay=1.0)
    fit(module, callback, max_epochs=1)
    assert not torch.equal(callback.distiller.teacher.model[0].weight, module.model[0].weight)
    between = module.model[0].weight.detach().clone()
    fit(module, callback, max_epochs=1)
    assert torch.equal(callback.distiller.teacher.model[0].weight, between)


def test_checkpoints_of_weights_alone_hold_the_average_too(tmp_path: Path) -> None:
    callback, keep = mean_teacher(evaluate=True), ModelCheckpoint(tmp_path, filename="it", save_weights_only=True)
    module = Lit()
    fit(module, callback, keep)
    state = torch.load(tmp_path / "it.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(state["model.0.weight"], callback.distiller.teacher.model[0].weight)
    assert "on_save_checkpoint" not in vars(module)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_what_is_saved_after_an_exception_or_after_the_fit_can_be_resumed(tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int) -> None:
            if trainer.global_step == 6:
                raise ArithmeticError

    callback = mean_teacher(evaluate=True)
    with pytest.raises(ArithmeticError):
        fit(Lit(), Breaks(), callback, ModelCheckpoint(tmp_path, filename="broken", save_on_exception=True))
    (broken,) = tmp_path.glob("broken*.ckpt")
    state = torch.load(broken, weights_only=True)["state_dict"]
    torch.testing.assert_close(state["model.0.weight"], callback.distiller.teacher.model[0].weight)
    fit(Lit(), mean_teacher(evaluate=True), ckpt_path=broken)
    module, last = Lit(), tmp_path / "last.ckpt"
    fit(module, mean_teacher(evaluate=True)).save_checkpoint(last)
    fit(Lit(), mean_teacher(evaluate=True), ckpt_path=last, max_epochs=3)


def test_after_the_fit_a_checkpoint_holds_what_the_module_holds(tmp_path: Path) -> None:
    module = Lit()
    run = fit(module, mean_teacher(evaluate=True))
    with torch.no_grad():
        module.model[0].weight.zero_()  # the user goes on with it
    run.save_checkpoint(tmp_path / "it.ckpt")
    assert not torch.load(tmp_path / "it.ckpt", weights_only=True)["state_dict"]["model.0.weight"].any()


def test_every_hook_of_validation_sees_the_average() -> None:
    class Looks(Lit):
        def look(self) -> None:
            seen.append(self.model[0].weight.detach().clone())

        on_validation_start = on_validation_epoch_start = on_validation_epoch_end = look

    seen: list[Tensor] = []
    weights, callback = Weights(), mean_teacher(evaluate=True)
    fit(Looks(), weights, callback, max_epochs=1)
    assert len(seen) == 3
    assert all(torch.equal(each, weights.validated[0]) for each in seen)
    assert not torch.equal(seen[0], weights.steps[-1])


@pytest.mark.parametrize("hook", ["on_validation_epoch_end", "on_validation_end"])
def test_a_checkpoint_saved_within_a_validation_holds_the_average_too(tmp_path: Path, hook: str) -> None:
    class Saves(Callback):
        pass

    def save(trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    saves, weights, callback = Saves(), Weights(), mean_teacher(evaluate=True)
    setattr(saves, hook, save)
    fit(Lit(), saves, weights, callback)
    state = torch.load(tmp_path / "1.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["model.0.weight"], callback.distiller.teacher.model[0].weight)
    resumed, again = Weights(), mean_teacher(evaluate=True)
    fit(Lit(), resumed, again, ckpt_path=tmp_path / "0.ckpt")
    assert torch.equal(again.distiller.teacher.model[0].weight, callback.distiller.teacher.model[0].weight)
    assert torch.equal(resumed.steps[-1], weights.steps[-1])


def test_validations_leave_the_average_as_precise_as_it_is() -> None:
    averages = []
    for options in ({}, {"limit_val_batches": 0}):
        seed_everything(0)
        callback = mean_teacher(evaluate=True, decay=0.99)
        fit(Lit(), callback, precision="bf16-true", **options)
        averages.append(callback.distiller.teacher.model[0].weight)
    assert averages[0].dtype == torch.float32
    assert torch.equal(*averages)


def test_the_average_has_no_hooks_of_what_distils_beside_it() -> None:
    terms = {"kd": Term(losses.KD()), "hint": Term(losses.FitNet(), student="0", teacher="0")}
    frozen = Distillation(Lit().model, terms, student="model")
    callback = mean_teacher()
    fit(Lit(), frozen, callback, max_epochs=1)
    average = callback.distiller.teacher.model
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in average.modules())
    pickle.dumps(average)


def test_two_averages_do_not_both_take_the_students_place() -> None:
    for callbacks in (
        [mean_teacher(evaluate=True), EMAWeightAveraging(decay=0.5)],
        [
            mean_teacher(evaluate=True),
            Distillation(teachers.EMA(evaluate=True), {"other": Term(losses.KD())}, student="model"),
        ],
    ):
        with pytest.raises(ValueError, match="both take the student's place in validation"):
            fit(Lit(), *callbacks)


def test_a_schedule_by_epochs_knows_a_limit_of_steps() -> None:
    values: list[float] = []

    class Looks(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            values.append(callback.distiller.weights()["consistency"])

    callback = mean_teacher()
    scheduler = WeightScheduler("consistency", schedules.Linear(1.0, 0.0), by="epoch")
    fit(Lit(), scheduler, callback, Looks(), max_epochs=1000, max_steps=16)
    assert values == [1.0] * 4 + [0.75] * 4 + [0.5] * 4 + [0.25] * 4
    accumulation = GradientAccumulationScheduler({0: 1, 1: 2})
    with pytest.raises(ValueError, match="with GradientAccumulationScheduler its length is not known"):
        fit(Lit(), scheduler, callback, accumulation)
