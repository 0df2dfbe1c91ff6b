"""Mean teacher on a module that knows nothing of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_kd.callbacks import Distillation, EMATeacher
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import Term, losses, teachers


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
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "num_sanity_val_steps": 0,
    }
    if ckpt_path:  # Lightning wants what made the checkpoint
        options["enable_checkpointing"], callbacks = (
            True,
            (*callbacks, ModelCheckpoint(ckpt_path.parent, filename="resumed")),
        )
    run = Trainer(callbacks=list(callbacks), **options | kwargs)
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
