"""What others see of a module while it is distilled, and what one fit leaves for the next."""

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning_kd.callbacks import EMATeacher, MutualDistillation
from project import QUIET, Project, fit, kd, loader, net
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import Distillation, Term, losses, schedules, teachers


class Validated(Project):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.model(batch[0])


def _terms(learns: bool = True) -> dict[str, Term]:
    kd = {"kd": Term(losses.KD())}
    return {**kd, "hint": Term(losses.FitNet(), student="0", teacher="0")} if learns else kd


def _distillation(**kwargs: Any) -> Distillation:
    torch.manual_seed(2)
    return Distillation(net(16), _terms(**kwargs), student="model")


class Do(Callback):
    """Does something in a hook of Lightning's, of which the result is kept."""

    def __init__(self, hook: str, what: Callable[..., Any]) -> None:
        self.results: list[Any] = []

        def act(trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            self.results.append(what(pl_module))

        setattr(self, hook, act)


def _fit(module: LightningModule, *callbacks: Callback, **kwargs: Any) -> Trainer:
    trainer = Trainer(callbacks=list(callbacks), **QUIET | kwargs)
    trainer.fit(module, loader(8), loader(8) if isinstance(module, Validated) else None)
    return trainer


def _is_the_users_own(module: nn.Module) -> bool:
    hooks = [hook for part in module.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]
    replaced = {"training_step", "configure_optimizers", "configure_model", "on_save_checkpoint", "__reduce_ex__"}
    return not hooks and not replaced & vars(module).keys()


@pytest.mark.parametrize("learns", [False, True])
def test_a_copy_that_is_taken_in_a_fit_is_the_users_own(learns: bool) -> None:
    module, keep = Project(), Do("on_train_epoch_end", copy.deepcopy)
    _fit(module, _distillation(learns=learns), keep)
    (best,) = keep.results
    assert _is_the_users_own(best)
    assert _is_the_users_own(module)
    assert not any("_dist" in name for name, _ in module.named_modules())
    assert torch.equal(best.model[0].weight, module.model[0].weight)
    before, expected = copy.deepcopy(module.state_dict()), copy.deepcopy(module)
    _fit(best)  # it is the copy that learns, and nothing else does
    _fit(expected)
    assert not torch.equal(best.model[0].weight, before["model.0.weight"])
    torch.testing.assert_close(best.state_dict(), expected.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    other = _fit(best, _distillation(learns=learns))  # whose terms are made anew
    assert other.callback_metrics["train/kd"] > 0
    assert not any("_dist" in name for name, _ in best.named_modules())


def test_torchs_average_of_the_module_is_that_without_distillation() -> None:
    class Buffers(Project):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor(0.5))
            self.model.insert(1, nn.BatchNorm1d(8))

    class Average(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.average = AveragedModel(pl_module, use_buffers=True)

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            self.average.update_parameters(pl_module)

    found = []
    for weight in (None, 0.0):
        average, hint = Average(), Term(losses.FitNet(), weight=0.0, student="0", teacher="0")
        _fit(Buffers(), *([] if weight is None else [Distillation(net(16), {"h": hint}, student="model")]), average)
        found.append(average.average.module.state_dict())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert found[1]["mean"] == 0.5


def test_a_student_with_a_state_of_its_own_is_copied() -> None:
    module = Project()
    module.model = Packed()
    do = Do("on_train_batch_end", lambda module: copy.deepcopy(module.model))
    _fit(module, Distillation(net(16), _terms(learns=False), student="model"), do)
    assert all(isinstance(each, Packed) and not each._forward_hooks for each in do.results)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def __getstate__(self) -> dict[str, Any]:
        return {"weights": self.net.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        self.net.load_state_dict(state["weights"])


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_batch_end", "on_validation_end"])
def test_a_student_is_copied_and_pickled_at_any_moment(hook: str) -> None:
    def taken(module: LightningModule) -> tuple[nn.Module, nn.Module]:
        file = io.BytesIO()
        torch.save(module.model, file)
        file.seek(0)
        return copy.deepcopy(module.model), torch.load(file, weights_only=False)

    do = Do(hook, taken)
    _fit(Validated(), _distillation(), do)
    assert do.results
    for copies in do.results:
        assert all(_is_the_users_own(each) for each in copies)
        torch.testing.assert_close(copies[0].state_dict(), copies[1].state_dict(), rtol=0, atol=0)


def test_a_module_that_is_pickled_in_a_fit_has_no_teacher() -> None:
    pickled = Do("on_train_epoch_end", pickle.dumps)
    _fit(Project(), Distillation(net(20_000), {"hint": Term(losses.RKD())}, student="model"), pickled)
    without = len(pickled.results[0])
    _fit(Project(), Distillation(net(20_000), _terms(), student="model"), pickled)  # with a projector, 16 x 20,000
    projector = 4 * 9 * 20_000
    assert without < 10_000
    assert projector < len(pickled.results[1]) < projector + 20_000


def test_a_module_is_pickled_in_a_fit_with_two_callbacks_and_methods_of_its_own() -> None:
    module = Project()
    module.configure_optimizers = own = functools.partial(_sgd, module.model)  # type: ignore[method-assign]
    do = Do("on_train_batch_end", lambda module: pickle.loads(pickle.dumps(module)))
    consistency = {"c": Term(losses.KD())}
    _fit(module, _distillation(), EMATeacher(consistency, decay=0.9, student="model"), do)
    for each in do.results:
        assert isinstance(each.configure_optimizers, functools.partial)
        assert "training_step" not in vars(each)
        assert not each.model._forward_hooks
    assert module.configure_optimizers is own
    assert "__reduce_ex__" not in {name for part in module.modules() for name in vars(part)}


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_layers_that_the_strategy_replaces_are_tapped_where_they_are_then() -> None:
    """As Lightning does it for sync_batchnorm, which torch has on GPUs alone."""

    class Other(nn.BatchNorm1d):
        pass

    class Replacing(SingleDeviceStrategy):
        def setup(self, trainer: Trainer) -> None:
            old = self.lightning_module.model[1]
            new = Other(8)
            new.weight, new.bias = old.weight, old.bias
            self.lightning_module.model[1] = new
            super().setup(trainer)

    def network(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Linear(width, 4))

    for teacher in (network(16), teachers.Itself()):
        module = Project()
        module.model = network(8)
        terms = {
            "hint": Term(losses.FitNet(), student="0" if isinstance(teacher, teachers.Itself) else "1", teacher="1")
        }
        distillation = Distillation(teacher, terms, student="model")
        trainer = _fit(module, distillation, strategy=Replacing("cpu"), accelerator="auto")
        assert isinstance(module.model[1], Other)
        assert trainer.callback_metrics["train/hint"] > 0
        assert _is_the_users_own(module)


class Fails(Callback):
    def __init__(self, *hooks: str) -> None:
        for hook in hooks:
            setattr(self, hook, self.fail)

    def fail(self, *args: Any) -> None:
        raise RuntimeError("somebody else's")


def test_what_a_validation_that_failed_has_loaded_is_no_other_fits(tmp_path: Path) -> None:
    module, callback, path = Validated(), _distillation(), tmp_path / "early.ckpt"
    _fit(module, callback).save_checkpoint(path)
    _fit(module, callback, max_epochs=2)
    learned = callback.distiller.terms["hint"].projector.weight.detach().clone()
    with pytest.raises(RuntimeError, match="somebody else's"):
        Trainer(callbacks=[callback, Fails("on_validation_start")], **QUIET).validate(
            module, loader(8), ckpt_path=path, weights_only=True, verbose=False
        )
    see = Do("on_train_start", lambda _: callback.distiller.terms["hint"].projector.weight.detach().clone())
    _fit(module.train(), callback, see)
    assert torch.equal(see.results[0], learned)


def test_what_a_resumed_fit_that_failed_has_loaded_is_no_other_fits(tmp_path: Path) -> None:
    callback, path = EMATeacher({"c": Term(losses.KD())}, decay=0.9, student="model"), tmp_path / "early.ckpt"
    _fit(Project(), callback).save_checkpoint(path)
    with pytest.raises(RuntimeError, match="somebody else's"):
        Trainer(callbacks=[Fails("on_fit_start"), callback], **QUIET | {"max_epochs": 2}).fit(
            Project(), loader(8), ckpt_path=path, weights_only=True
        )
    other = Project()
    nn.init.ones_(other.model[0].weight)
    see = Do("on_train_batch_start", lambda _: callback.distiller.teacher.model[0].weight.clone())
    _fit(other, callback, see)
    assert torch.equal(see.results[0], torch.ones(8, 6))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_a_teacher_computes_in_its_own_type(precision: Any) -> None:
    """In a true precision the Trainer changes torch's default type, in which constants are made."""
    torch.manual_seed(0)
    frozen, term, seen = OfBytes(16), {"kd": Term(losses.KD())}, []
    watching = frozen.register_forward_hook(lambda m, args, output: seen.append((args[0], output, m.positions)))
    batches = DataLoader(TensorDataset(torch.randint(0, 256, (16, 6), dtype=torch.uint8), torch.arange(16) % 4), 8)
    own = {"student": "model"}
    for callback in (
        Distillation(frozen, term, **own), Distillation(teachers.Frozen(frozen, precision="32-true"), term, **own),
        EMATeacher({"kd": Term(losses.KD())}, decay=0.5, **own), MutualDistillation([OfBytes(8)], term, **own),
    ):  # fmt: skip
        module = Project()
        module.model = OfBytes(8)
        trainer = Trainer(callbacks=[callback], precision=precision, **QUIET)
        trainer.fit(module, batches)
        assert torch.get_default_dtype() == torch.float32
    watching.remove()
    assert len(seen) == 4
    for given, output, positions in seen:
        assert positions == 600
        torch.testing.assert_close(output, frozen(given), rtol=0, atol=0)


def test_a_teacher_in_half_precision_whose_first_weights_stay_float32() -> None:
    class Positions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.linspace(0, 1, 6)

    teacher = nn.Sequential(nn.BatchNorm1d(6), Positions(), nn.Linear(6, 4))
    callback = Distillation(teachers.Frozen(teacher, precision="bf16-true"), {"kd": Term(losses.KD())}, student="model")
    assert _fit(Project(), callback, precision="bf16-true").callback_metrics["train/kd"] > 0


class OfBytes(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = net(width)
        self.positions = 0

    def forward(self, x: Tensor) -> Tensor:
        self.positions = (torch.arange(600) / 600).unique().numel()
        return self.net(x / 255)


@pytest.mark.parametrize(("ends", "told"), [(True, [0.125 * i for i in range(1, 9)]), (False, [math.nan] * 3)])
def test_a_teacher_is_told_how_far_the_run_is(ends: bool, told: list[float]) -> None:
    class Fading(teachers.Teacher):
        def __init__(self) -> None:
            super().__init__()
            self.told: list[float] = []

        def bind(self, student: nn.Module, paths: Any) -> None:
            pass

        def unbind(self) -> None:
            pass

        def update(self, moment: schedules.Moment) -> None:
            self.told.append(moment.progress)

        def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
            return {"output": [x.new_zeros(len(x), 4)]}

    teacher = Fading()

    class Stopping(Project):
        def on_train_batch_end(self, *args: object) -> None:
            self.trainer.should_stop = not ends and self.global_step == 3

    fit(Stopping(), kd(teacher=teacher), max_epochs=2 if ends else -1)
    assert teacher.told == pytest.approx(told, nan_ok=True)


class Encoder(nn.Linear):
    """What makes a teacher's arguments, a network."""

    def __init__(self) -> None:
        super().__init__(6, 6)


@pytest.mark.parametrize("learns", [False, True])
def test_a_network_that_makes_the_teachers_arguments_does_not_learn(learns: bool, tmp_path: Path) -> None:
    encoder = Encoder()
    weights = copy.deepcopy(encoder.state_dict())
    distillation = Distillation(net(16), _terms(learns), student="model", teacher_input=encoder)
    states = Do("on_train_epoch_end", lambda _: (distillation.state_dict(), encoder.training))
    trainer = _fit(Project(), distillation, states)
    ((state, training),) = states.results
    assert not any("teacher_input" in key for key in state.get("learned", {}))
    assert training  # as it was given
    torch.testing.assert_close(encoder.state_dict(), weights, rtol=0, atol=0)
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in encoder.parameters()}


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.arange(4.0))

    weights: Tensor

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return ((student - teacher).square() * self.weights).mean()


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rotation", torch.eye(8, 16))

    rotation: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.rotation


def _on_buffers() -> tuple[list[nn.Module], Distillation]:
    """Parts of a distillation in which nothing learns, with buffers."""
    same = [0.0] * 6, [1.0] * 6
    views = [teachers.Renormalize(*same, *same) for _ in range(2)]
    loss, projector = Weighted(), Turned()
    hint = Term(nn.MSELoss(), student="0", teacher="0", projector=projector)
    terms = {"weighted": Term(loss), "hint": hint}
    made = {"teacher_input": views[0], "student_input": views[1]}
    return [loss, projector, *views], Distillation(net(16), terms, student="model", **made)


def test_what_has_buffers_comes_to_the_students_device() -> None:
    parts, distillation = _on_buffers()
    distillation._move_parts(torch.device("meta"))
    buffers = [*distillation.distiller.teacher.parameters(), *(b for part in parts for b in part.buffers())]
    assert {b.device.type for b in buffers} == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("learns", [False, True])
def test_on_a_gpu_what_has_buffers_is_there_and_comes_back(learns: bool) -> None:
    parts, distillation = _on_buffers()
    extra = [Distillation(net(16), _terms(), student="model")] if learns else []
    _fit(Project(), distillation, *extra, accelerator="gpu", devices=1)
    assert {b.device.type for part in parts for b in part.buffers()} == {"cpu"}
