"""What a callback cannot distil, and what it says to do instead."""

import copy
import math
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_kd.callbacks import EMATeacher
from lightning_kd.tasks import Classification
from project import QUIET, Direct, Project, fit, hint, kd, loader, logged, net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_kd import Distillation, DistillationModule, Distiller, Term, losses, schedules, teachers


def test_manual_optimization_is_told_what_to_call() -> None:
    class Manual(Project):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match=r"manual optimization.*distiller\.watch\(\)"):
        fit(Manual(), kd())


@pytest.mark.parametrize("hook", ["setup", "configure_optimizers", "on_train_start"])
def test_manual_optimization_that_is_said_late_is_told_too(hook: str) -> None:
    """It would step its optimizers, and the terms would be silently nothing."""

    class Late(Project):
        def _late(self, *args: object, **kwargs: object) -> object:
            self.automatic_optimization = False
            return getattr(super(), hook)(*args, **kwargs)

    setattr(Late, hook, Late._late)
    with pytest.raises(ValueError, match="uses manual optimization"):
        fit(Late(), kd())


def test_what_manual_optimization_calls_works() -> None:
    class Manual(Project):
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
    with pytest.raises(RuntimeError, match=r"did not call the student \(Project.forward\).*'model'"):
        fit(Project(), kd(None))


def test_a_student_of_which_a_method_is_called() -> None:
    class Methods(Project):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.model.forward(batch[0]), batch[1])

    told = r"\('model'\).* A call is self\.model\(x\): forward\(x\) and other methods .* one of its submodules\."
    with pytest.raises(RuntimeError, match=told):
        fit(Methods(), kd("model"))


def test_a_student_that_is_called_only_sometimes() -> None:
    class Sometimes(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx < 2 else self.model[0].weight.square().sum()

    with pytest.raises(RuntimeError, match=r"called the student \('model'\) before, and not in step 2, epoch 0"):
        fit(Sometimes(), kd())


def test_an_unknown_path_lists_the_closest_and_leaves_nothing_behind() -> None:
    module = Project()
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


@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
def test_two_callbacks_that_contradict_each_other_are_refused() -> None:
    module = DistillationModule(Classification(4), net(8), net(16), {"kd": Term(losses.KD())})
    with pytest.raises(ValueError, match="More than one callback has a term named kd"):
        fit(module, kd())
    weighed = EMATeacher({"past": Term(losses.KD())}, student="model", task_weight=0.1)
    with pytest.raises(ValueError, match="first of the Trainer's callbacks that distil, Distillation, to give"):
        fit(Project(), kd(), weighed)


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


@pytest.mark.parametrize("returned", [(torch.ones(()), 1), 1.0, "loss"])
def test_what_is_no_loss_is_lightnings_to_tell(returned: Any) -> None:
    class Odd(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            return returned

    with pytest.raises(MisconfigurationException, match="training_step"):
        fit(Odd(), kd())


def test_two_callbacks_share_nothing_that_is_bound_or_learned() -> None:
    teacher, loss = teachers.Frozen(net(16)), losses.FitNet()
    terms: list[dict[str, Term]] = [{n: Term(losses.FitNet(), student="0", teacher="0")} for n in "ab"]
    with pytest.raises(ValueError, match="one Frozen"):
        fit(Project(), *(Distillation(teacher, each, "model") for each in terms))
    terms = [{n: Term(loss, student="0", teacher="0")} for n in "ab"]
    with pytest.raises(ValueError, match="one FitNet"):
        fit(Project(), *(Distillation(net(16), each, "model") for each in terms))


def test_a_student_that_no_optimizer_knows_is_told() -> None:
    class Forgotten(Project):
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
            fit(Project(), Distillation(net(16), {"odd": term}, student="model"))


def test_a_teacher_that_overwrites_its_input_is_refused() -> None:
    class InPlace(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    teacher = InPlace(*net(16))
    with pytest.raises(ValueError, match=r"overwrites its input .*teacher_input=lambda x: x\.clone\(\)"):
        fit(Project(), kd(teacher=teacher))
    fit(Project(), kd(teacher=teacher, teacher_input=torch.clone))


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")  # Lightning's, of its feature
def test_a_step_that_fetches_its_own_batch() -> None:
    class Fetching(Project):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            batch, _, _ = next(dataloader_iter)
            return super().training_step(batch, 0)

    with pytest.raises(ValueError, match="takes its batch from a dataloader_iter"):
        fit(Fetching(), hint())


def test_a_teacher_without_weights_is_refused() -> None:
    with torch.device("meta"):
        teacher = net(16)
    with pytest.raises(ValueError, match="has no weights: it is on the meta device"):
        fit(Project(), kd(teacher=teacher))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_student_without_weights_yet_is_refused_where_they_are_needed_before() -> None:
    class Lazy(Project):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(6, 8), nn.LazyBatchNorm1d(), nn.Linear(8, 4))

    for callback in (hint(), EMATeacher({"kd": Term(losses.KD())}, student="model")):
        with pytest.raises(ValueError, match=r"the student has lazy layers.*1\.weight, (model\.)?1\.bias, "):
            fit(Lazy(), callback)
    assert logged(fit(Lazy(), kd()))["train/kd"] > 0
    with pytest.raises(ValueError, match=r"student_input, has lazy layers.*\(student_input\.weight, "):
        fit(Project(), kd(student_input=nn.LazyLinear(6)))

    class Probed(Direct):
        def __init__(self) -> None:
            super().__init__()
            self.probe = nn.LazyLinear(3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + self.probe(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    terms = {"hint": Term(losses.FitNet(), student="model.0", teacher="0")}
    assert logged(fit(Probed(), Distillation(net(16), terms)))["train/hint"] > 0  # whose lazy layer nobody rehearses


def test_muon_is_told_what_it_cannot_optimize() -> None:
    class Matrices(Project):
        def configure_optimizers(self) -> Any:
            return torch.optim.Muon([p for p in self.parameters() if p.ndim == 2], lr=0.01)

    with pytest.raises(ValueError, match="Muon optimizes matrices only"):
        fit(Matrices(), hint())


def test_a_loss_of_each_sample_is_refused() -> None:
    class Unreduced(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1], reduction="none")

    with pytest.raises(ValueError, match=r"a loss of shape \(\d+,\), and a loss is one number"):
        fit(Unreduced(), kd())


def test_an_own_loss_without_a_gradient_is_not_hidden_by_the_terms() -> None:
    class Counting(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": (self.model(batch[0]).argmax(1) == batch[1]).float().mean()}

    with pytest.raises(ValueError, match=r"a loss without a gradient.*task_weight=0"):
        fit(Counting(), kd())
    assert logged(fit(Counting(), kd(task_weight=0.0)))["train/kd"] > 0

    class Unlabelled(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(batch[0]).new_zeros(())

    assert logged(fit(Unlabelled(), kd()))["train/kd"] > 0
    late = schedules.Piecewise([(0.0, 0.0), (0.5, 1.0)], interpolate=False)
    with pytest.raises(ValueError, match="a loss without a gradient"):
        fit(Counting(), kd(task_weight=late))


def test_masked_classes_are_told_apart_from_a_training_that_diverged() -> None:
    class Masking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).masked_fill(torch.arange(4) == 3, -math.inf)

    class Masked(Project):
        def __init__(self) -> None:
            super().__init__()
            self.model = Masking()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(batch[0])[:, :3].square().mean()

    with pytest.raises(FloatingPointError, match=r"Step 0: .*'kd' is nan .*The teacher says -inf.*-1e4"):
        fit(Masked(), kd(teacher=Masking()))


@pytest.mark.parametrize("task_weight", [0.0, 1.0])
def test_the_modules_own_loss_is_blamed_where_it_is_not_finite(task_weight: float) -> None:
    class Broken(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(batch[0]).mean() * math.nan

    with pytest.raises(FloatingPointError, match=r"Step 1: .*after the module's own loss was not finite"):
        fit(Broken(), kd(task_weight=task_weight), max_epochs=2)


def test_an_iterator_is_not_robbed_of_a_batch() -> None:
    with pytest.raises(ValueError, match="can be read only once"):
        fit(Project(), hint(), batches=iter(list(loader())))


def test_an_error_in_the_teacher_is_said_to_be_there() -> None:
    with pytest.raises(RuntimeError) as error:
        fit(Project(), kd(teacher=nn.Linear(7, 4)))
    assert "teacher_input=" in error.value.__notes__[0]


@pytest.mark.parametrize("shared", ["callback", "terms", "loss", "projector", "a layer", "a copy"])
def test_what_learned_with_another_student_is_not_for_this_one(shared: str) -> None:
    """As in a loop over seeds, above which it was made."""
    above = hint(), {"hint": Term(losses.FitNet(), student="0", teacher="0")}, losses.VID(), nn.Linear(8, 16)

    def made() -> Distillation:
        callback, terms, loss, projector = above
        copied = {"callback": lambda: callback, "a copy": lambda: copy.deepcopy(callback)}
        if shared in copied:
            return copied[shared]()
        anew = {
            "loss": {"hint": Term(loss, student="0", teacher="0")},
            "projector": {"hint": Term(losses.FitNet(), student="0", teacher="0", projector=projector)},
            "a layer": {
                "hint": Term(losses.FitNet(), student="0", teacher="0", projector=nn.Sequential(nn.ReLU(), projector))
            },
        }
        return Distillation(net(16), anew.get(shared, terms), student="model")

    project = Project()
    fit(project, above[0] if "cop" in shared else made())
    fit(project, made())  # the same goes on
    with pytest.raises(ValueError, match=r"what the fit of another student taught hint would be what this one begins"):
        fit(Project(), made())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_terms_are_for_one_student_in_the_module_door_too() -> None:
    terms = {"hint": Term(losses.FitNet(), student="0", teacher="0")}

    def distil() -> None:
        fit(DistillationModule(Classification(num_classes=4), net(), net(16), terms))

    distil()
    with pytest.raises(ValueError, match="another student taught hint"):
        distil()


@pytest.mark.parametrize("how", ["copied", "saved"])
def test_what_is_copied_with_its_student_goes_on(how: str) -> None:
    pair = Project(), hint()
    fit(*pair)
    again = copy.deepcopy(pair) if how == "copied" else pickle.loads(pickle.dumps(pair))
    before = again[1].distiller.terms["hint"].projector.weight.clone()
    fit(*again)
    assert not torch.equal(again[1].distiller.terms["hint"].projector.weight, before)
    fit(*pair)


@pytest.mark.parametrize("anew", [False, True])
def test_what_was_only_tuned_has_learned_nothing(anew: bool, tmp_path: Path) -> None:
    class Late(Project):
        def setup(self, stage: str) -> None:
            self.lr, self.model = 0.1, net()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module, callback = Late(), hint()
    module.lr = 0.1
    run = Trainer(callbacks=[callback], **QUIET | {"default_root_dir": tmp_path, "enable_checkpointing": True})
    Tuner(run).lr_find(module, loader(), num_training=3, early_stop_threshold=None)
    run.fit(Late() if anew else module, loader())
    assert logged(run)["train/hint"] > 0
    with pytest.raises(ValueError, match="another student taught hint"):
        fit(Project(), callback)


def test_a_copy_of_the_whole_module_is_not_taught_with_terms_that_learn() -> None:
    with pytest.raises(ValueError, match=r"the student is all of Direct, whose copy teaches.*student='model'"):
        fit(Direct(), EMATeacher({"vid": Term(losses.VID(), student="model.0", teacher="model.0")}))
    assert "train/kd" in logged(fit(Direct(), EMATeacher({"kd": Term(losses.KD())})))


@pytest.mark.parametrize("loss", [losses.RKD(), losses.FitNet()], ids=["RKD", "FitNet"])
def test_a_backbone_may_be_unfrozen_later(loss: nn.Module) -> None:
    class Backboned(Project):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = self.model[0], self.model[2]
            del self.model

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    class Steps(Callback):
        def __init__(self) -> None:
            self.gradients: list[float] = []

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            grad = pl_module.backbone.weight.grad
            self.gradients.append(0.0 if grad is None else float(grad.norm()))

    def gradients(weight: float) -> list[float]:
        term = Term(copy.deepcopy(loss), weight, student="output", teacher="0")
        steps = Steps()
        unfreezing = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
        callback = Distillation(net(16), {"it": term}, student="backbone")
        with pytest.warns(UserWarning, match="teaches nothing yet") if weight else nullcontext():
            fit(Backboned(), unfreezing, callback, steps, max_epochs=2)
        return steps.gradients

    alone, taught = gradients(0.0), gradients(5.0)
    assert alone[:4] == taught[:4] == [0.0] * 4
    assert all(a > 0 and a != b for a, b in zip(alone[4:], taught[4:], strict=True))


def test_what_is_unfrozen_by_hand_is_not_warned_of_while_its_weight_is_zero() -> None:
    class ByHand(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            pl_module.model[0].requires_grad_(trainer.current_epoch > 0)

    later = schedules.Piecewise([(0.0, 0.0), (0.5, 1.0)], interpolate=False)
    term = Term(losses.FitNet(), later, student="0", teacher="0")
    run = fit(Project(), ByHand(), Distillation(net(16), {"it": term}, student="model"), max_epochs=2)
    assert logged(run)["train/it/weight"] == 1.0


def test_what_never_learns_is_refused_beside_a_finetuning_too() -> None:
    class Cut(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self[0](x)
            return self[2](self[1](x))

    class OfTheHead(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            pl_module.model[2].weight.requires_grad_(False)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            pass

    module = Project()
    module.model = Cut(*net())
    term = Term(losses.FitNet(), student="0", teacher="0")
    with pytest.raises(ValueError, match="'0' carries no gradient"):
        fit(module, OfTheHead(), Distillation(net(16), {"it": term}, student="model"))
    assert not term.unfreezes


def test_terms_that_learn_nothing_are_for_every_student() -> None:
    terms = {"kd": Term(losses.KD())}
    runs = [fit(Project(), Distillation(net(16), terms, student="model")) for _ in range(2)]
    assert all(logged(run)["train/kd"] > 0 for run in runs)


def test_a_term_of_layers_that_no_optimizer_has_is_told() -> None:
    class OfTheHead(Project):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model[2].parameters(), lr=0.1)

    with pytest.warns(UserWarning, match=r"Term 'hint' teaches nothing: of the parameters that the student's '0'"):
        fit(OfTheHead(), hint())
    assert logged(fit(OfTheHead(), kd()))["train/kd"] > 0
    weightless = hint()
    weightless.distiller.terms["hint"].weight = 0.0
    fit(OfTheHead(), weightless)  # is only watched


def test_what_the_graph_hides_is_not_told() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = net()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inside, x.requires_grad_(), use_reentrant=True)

    module = Project()
    module.model = Checkpointed()
    assert logged(fit(module, kd()))["train/kd"] > 0


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # what is tried
def test_torchscript_is_one_piece() -> None:
    class Scripted(Project):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.jit.script(net(8))

    with pytest.raises(ValueError, match="is TorchScript, whose calls cannot be watched"):
        fit(Scripted(), kd())
    with pytest.raises(ValueError, match=r"Term 'hint': the teacher .* is TorchScript, inside of which nothing"):
        fit(
            Project(),
            Distillation(torch.jit.script(net(16)), {"hint": hint().distiller.terms["hint"]}, student="model"),
        )
    run = fit(Project(), kd(teacher=torch.jit.script(net(16))))
    assert logged(run)["train/kd"] > 0
