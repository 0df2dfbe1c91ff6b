"""What can be gone on with, and what says why not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from project import Project, fit, hint, kd, logged, net
from torch import nn

from lightning_kd import Distillation, Term, losses, teachers


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (hint("a", "b"), hint("a"), "b.projector.weight .* is gone"),
        (hint("a"), hint("a", "b"), "b.projector.weight is new"),
        (hint("a"), hint("a", width=12), r"was \(16, 8\) and is \(12, 8\)"),
        (hint("a", "b"), hint("b", "a"), "their order was a, b"),
        (kd(), hint("a"), "parameters to learn: a"),
        (None, hint("a"), "parameters to learn: a"),
    ],
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # Lightning's: other terms, another callback
def test_resuming_with_other_terms_says_what_differs(before: Any, after: Any, message: str, tmp_path: Path) -> None:
    fit(Project(), *([before] if before else [])).save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=message):
        fit(Project(), after, max_epochs=2, resume=tmp_path / "run.ckpt")


def test_two_teachers_with_terms_of_their_own_resume_exactly(tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> Project:
        torch.manual_seed(0)
        model = Project()
        trainer = fit(model, hint("a"), hint("b", width=12), max_epochs=epochs, resume=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    run(1)
    resumed, whole = run(2, tmp_path / "1.ckpt"), run(2)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])


def test_what_was_learned_with_another_student_is_no_others(tmp_path: Path) -> None:
    callback = hint()
    fit(Project(), callback).save_checkpoint(tmp_path / "run.ckpt")
    fit(Project(), callback, max_epochs=2, resume=tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="the fit of another student taught hint"):
        fit(Project(), callback)
    without = kd()
    fit(Project(), without)
    fit(Project(), without)  # which learns nothing


def test_a_finished_run_that_is_resumed_has_learned_with_its_student(tmp_path: Path) -> None:
    fit(Project(), hint()).save_checkpoint(tmp_path / "run.ckpt")
    callback = hint()
    fit(Project(), callback, resume=tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="the fit of another student taught hint"):
        fit(Project(), callback)


def test_a_loss_that_only_looks_at_shapes_is_for_every_student(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def build(self, student: torch.Tensor, teacher: torch.Tensor) -> None:
            self.scale = 1.0 / student.shape[1]

        def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            return self.scale * (student - teacher).square().mean()

    callback = Distillation(net(16), {"scaled": Term(Scaled())}, student="model")
    fit(Project(), callback).save_checkpoint(tmp_path / "run.ckpt")
    run = fit(Project(), callback, max_epochs=2, resume=tmp_path / "run.ckpt")
    assert logged(run)["train/scaled"] > 0


def test_callbacks_in_another_order_do_not_resume(tmp_path: Path) -> None:
    fit(Project(), hint("a"), hint("b", width=12)).save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="had its callbacks in the order"):
        fit(Project(), hint("b", width=12), hint("a"), max_epochs=2, resume=tmp_path / "run.ckpt")


def test_a_network_that_is_compiled_anew_is_the_same_student() -> None:
    class Compiled(Project):
        def configure_model(self) -> None:
            network = getattr(self.model, "_orig_mod", self.model)
            self.model = torch.compile(network, backend="eager")

    module, callback = Compiled(), hint()
    for _ in range(2):
        assert logged(fit(module, callback))["train/hint"] > 0


@pytest.mark.parametrize("teacher", [teachers.EMA, teachers.PastSelf])
def test_copies_of_the_student_are_resumed_with_terms_that_need_no_projector(teacher: Any, tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = Project()
        terms = {"hint": Term(losses.FitNet(), student="0", teacher="0")}
        callback = Distillation(teacher(), terms, student="model")
        fit(module, callback, max_epochs=epochs, resume=resume).save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return [p.detach() for p in (*module.parameters(), *callback.distiller.teacher.model.parameters())]

    run(1)
    assert all(map(torch.equal, run(2, tmp_path / "1.ckpt"), run(2)))
