"""What others see of a module while it is distilled, and what one fit leaves for the next."""

import copy
import functools
import io
import pickle
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning_kd.callbacks import EMATeacher, MutualDistillation
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import Distillation, Term, losses, teachers

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_progress_bar": False,
    "enable_model_summary": False, "enable_checkpointing": False,
}  # fmt: skip


def _net(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4))


def _data() -> DataLoader[Any]:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(16, 6), torch.randint(0, 4, (16,))), batch_size=8)


class Project(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = _net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validated(Project):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.model(batch[0])


def _terms(learns: bool = True) -> dict[str, Term]:
    kd = {"kd": Term(losses.KD())}
    return {**kd, "hint": Term(losses.FitNet(), student="0", teacher="0")} if learns else kd


def _distillation(**kwargs: Any) -> Distillation:
    torch.manual_seed(2)
    return Distillation(_net(16), _terms(**kwargs), student="model")


class Do(Callback):
    """Does something in a hook of Lightning's, of which the result is kept."""

    def __init__(self, hook: str, what: Callable[..., Any]) -> None:
        self.results: list[Any] = []

        def act(trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            self.results.append(what(pl_module))

        setattr(self, hook, act)


def _fit(module: LightningModule, *callbacks: Callback, **kwargs: Any) -> Trainer:
    trainer = Trainer(callbacks=list(callbacks), **QUIET | kwargs)
    trainer.fit(module, _data(), _data() if isinstance(module, Validated) else None)
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
        _fit(Buffers(), *([] if weight is None else [Distillation(_net(16), {"h": hint}, student="model")]), average)
        found.append(average.average.module.state_dict())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert found[1]["mean"] == 0.5


def test_a_student_with_a_state_of_its_own_is_copied() -> None:
    module = Project()
    module.model = Packed()
    do = Do("on_train_batch_end", lambda module: copy.deepcopy(module.model))
    _fit(module, Distillation(_net(16), _terms(learns=False), student="model"), do)
    assert all(isinstance(each, Packed) and not each._forward_hooks for each in do.results)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _net()

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
    _fit(Project(), Distillation(_net(20_000), {"hint": Term(losses.RKD())}, student="model"), pickled)
    without = len(pickled.results[0])
    _fit(Project(), Distillation(_net(20_000), _terms(), student="model"), pickled)  # with a projector, 16 x 20,000
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
            module, _data(), ckpt_path=path, weights_only=True, verbose=False
        )
    see = Do("on_train_start", lambda _: callback.distiller.terms["hint"].projector.weight.detach().clone())
    _fit(module.train(), callback, see)
    assert torch.equal(see.results[0], learned)


def test_what_a_resumed_fit_that_failed_has_loaded_is_no_other_fits(tmp_path: Path) -> None:
    callback, path = EMATeacher({"c": Term(losses.KD())}, decay=0.9, student="model"), tmp_path / "early.ckpt"
    _fit(Project(), callback).save_checkpoint(path)
    with pytest.raises(RuntimeError, match="somebody else's"):
        Trainer(callbacks=[Fails("on_fit_start"), callback], **QUIET | {"max_epochs": 2}).fit(
            Project(), _data(), ckpt_path=path, weights_only=True
        )
    other = Project()
    nn.init.ones_(other.model[0].weight)
    see = Do("on_train_batch_start", lambda _: callback.distiller.teacher.model[0].weight.clone())
    _fit(other, callback, see)
    assert torch.equal(see.results[0], torch.ones(8, 6))


def test_labels_are_those_with_which_a_batch_comes() -> None:
    class Tidies(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.model(batch[0])
            batch[1][batch[1] == 255] = 0  # of what is ignored
            return F.cross_entropy(logits, batch[1])

    images, labels = torch.randn(8, 6), torch.tensor([0, 1, 255, 2, 255, 3, 1, 255])
    counts = (labels != 255)[:, None, None].expand(-1, 2, 2)
    found = []
    for kind, mask in ((Project, lambda batch: counts), (Tidies, lambda batch: batch[1] != 255)):
        torch.manual_seed(0)
        module, teacher = kind(), nn.Sequential(_net(16), Maps())
        module.model = nn.Sequential(_net(), Maps())
        target = labels[:, None, None].repeat(1, 2, 2).clamp(max=255 if kind is Tidies else 3)
        terms = {"kd": Term(losses.Pixelwise(losses.KD()))}
        callback = Distillation(teacher, terms, student="model", labels={"mask": mask})
        trainer = Trainer(callbacks=[callback], **QUIET)
        trainer.fit(module, DataLoader(TensorDataset(images, target), batch_size=8))
        found.append(float(trainer.callback_metrics["train/kd"]))
    assert found[0] == found[1] != 0


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_may_skip_a_batch_without_labels_or_put_them_there() -> None:
    class Skips(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self.model(batch["x"])
            if "late" in batch:
                batch["y"] = batch["late"]
            return F.cross_entropy(logits, batch["y"]) if "y" in batch else None

    x, y = torch.randn(4, 6), torch.arange(4)
    batches: Any = [{"x": x, "y": y}, {"x": x}, {"x": x, "late": y}]
    callback = Distillation(_net(16), {"dkd": Term(losses.DKD())}, student="model", target="y")
    trainer = Trainer(callbacks=[callback], **QUIET)
    trainer.fit(Skips(), DataLoader(batches, batch_size=None))
    assert trainer.callback_metrics["train/dkd"] > 0


@pytest.mark.parametrize(
    ("learns", "before"),  # with projectors, the step is rehearsed on another batch
    [(False, "nothing"), (True, "nothing"), (False, "None"), (True, "None"), (False, "a skipped step")],
)
@pytest.mark.parametrize("several", [False, True])
def test_labels_that_the_step_makes_are_those_of_its_batch(learns: bool, before: str, several: bool) -> None:
    class Mixing(Project):
        skips = before == "a skipped step"

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            mixed = batch[1].flip(0)
            self.mixed = (mixed, 0.5) if several else mixed
            self.skips, skip = False, self.skips
            return None if skip else super().training_step((batch[0], mixed), batch_idx)

    class Labelled(losses.KD):
        def forward(self, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
            seen.append(target[0] if several else target)
            return super().forward(student, teacher)

    seen: list[Tensor] = []
    module, terms = Mixing(), {**_terms(learns), "kd": Term(Labelled())}
    if before != "nothing":
        module.mixed = None
    distillation = Distillation(_net(16), terms, student="model", target=lambda _: module.mixed)
    _fit(module, distillation, max_epochs=2)
    expected = [batch[1].flip(0) for _ in range(2) for batch in _data()]
    skipped = int(before == "a skipped step")
    assert all(torch.equal(a, b) for a, b in zip(seen, expected[skipped:], strict=True))
    again = Distillation(_net(16), {"kd": Term(Labelled())}, student="model", target=lambda _: module.mixed)
    for callback in (distillation, again):  # whose first step finds what the last fit has left
        seen.clear()
        _fit(module, callback)
        assert all(torch.equal(a, b) for a, b in zip(seen, expected[:2], strict=True))


@pytest.mark.parametrize("asks", ["nobody", "student_input", "teacher_input", "a cache"])
@pytest.mark.parametrize("form", ["tensor", "beside the batch's own", "else the batch's own", "new"])
def test_labels_of_losses_are_those_of_this_step_whoever_asks_before(asks: str, form: str, tmp_path: Path) -> None:
    class Mixing(Project):
        mixed: Tensor | None = None

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.model(batch[0])
            self.mixed = batch[1].flip(0)
            return F.cross_entropy(logits, self.mixed)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

    class Labelled(losses.KD):
        def forward(self, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
            seen.append(target[0] if isinstance(target, tuple) else target)
            return super().forward(student, teacher)

    seen: list[Tensor] = []
    module, teacher = Mixing(), _net(16)
    fetch: dict[str, Any] = {
        "tensor": lambda _: module.mixed,
        "beside the batch's own": lambda batch: (module.mixed, batch[1]),
        "else the batch's own": lambda batch: batch[1] if module.mixed is None else module.mixed,
        "new": lambda _: module.mixed + 0,
    }
    inputs: dict[str, Any] = {
        "student_input": {"student_input": lambda x, *, teacher: x},
        "teacher_input": {"teacher_input": lambda x, *, target=None: x},
    }
    given = teachers.Cached(tmp_path, teacher) if asks == "a cache" else teacher
    distillation = Distillation(
        given, {"kd": Term(Labelled())}, student="model", target=fetch[form], **inputs.get(asks, {})
    )
    options = QUIET | {"max_epochs": 2, "num_sanity_val_steps": 2, "limit_val_batches": 2}
    Trainer(callbacks=[distillation], **options).fit(module, _data(), _data())
    expected = [batch[1].flip(0) for _ in range(2) for batch in _data()]
    assert len(seen) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_a_label_that_a_step_makes_of_none_is_that_of_its_batch() -> None:
    class Masking(Project):
        kept: Tensor | None = None

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.kept = batch[1] > 1
            return super().training_step(batch, batch_idx)

    class Masked(losses.KD):
        def forward(self, student: Tensor, teacher: Tensor, kept: Tensor | None = None) -> Tensor:
            seen.append(kept)
            return super().forward(student, teacher)

    seen: list[Tensor | None] = []
    module, terms = Masking(), {"kd": Term(Masked())}
    _fit(module, Distillation(_net(16), terms, student="model", labels={"kept": lambda _: module.kept}))
    assert all(torch.equal(a, b[1] > 1) for a, b in zip(seen, _data(), strict=True))


def test_a_label_function_may_return_another_number_of_tensors_each_time() -> None:
    class Several(losses.KD):
        def forward(self, student: Tensor, teacher: Tensor, parts: list[Tensor]) -> Tensor:
            return super().forward(student, teacher) * len(parts)

    asked: list[int] = []

    def parts(batch: Any) -> list[Tensor]:
        asked.append(0)
        return [batch[1]] * len(asked)

    distillation = Distillation(_net(16), {"kd": Term(Several())}, student="model", labels={"parts": parts})
    assert _fit(Project(), distillation).callback_metrics["train/kd"] > 0


def test_labels_in_an_object_are_read_before_the_step_takes_them_out() -> None:
    class Batch:
        def __init__(self, rows: Any) -> None:
            self.x, self.y = torch.utils.data.default_collate(rows)

    class Popping(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            y = vars(batch).pop("y", None)
            return None if y is None else super().training_step((batch.x, y), batch_idx)

    def unlabelled_first(rows: Any) -> Batch:
        batch = Batch(rows)
        if not torch.equal(batch.x, data.dataset[:8][0]):
            return batch
        del batch.y
        return batch

    data = _data()
    loader = DataLoader(data.dataset, batch_size=8, collate_fn=unlabelled_first)
    distillation = Distillation(_net(16), {"dkd": Term(losses.DKD())}, student="model", target=lambda batch: batch.y)
    trainer = Trainer(callbacks=[distillation], **QUIET | {"max_epochs": 2})
    trainer.fit(Popping(), loader)
    assert trainer.callback_metrics["train/dkd"] > 0


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_labels_may_be_taken_out_made_and_overwritten_in_one_step(kind: Any) -> None:
    class Tidying(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            y, batch["late"] = batch.pop("y"), batch["x"].sum(1)
            batch["z"] += 1
            return F.cross_entropy(self.model(batch.pop("x")), y)

    class Labelled(losses.KD):
        def forward(self, student: Tensor, teacher: Tensor, target: Any, late: Any, z: Any, odd: Any) -> Tensor:
            seen.append([target, late, z, odd])
            return super().forward(student, teacher)

    seen: list[list[Tensor]] = []
    labels: dict[str, Any] = {"late": "late", "z": "z", "odd": lambda batch: batch.pop("z") % 2 == 1}
    distillation = Distillation(_net(16), {"kd": Term(Labelled())}, student="model", target="y", labels=labels)
    x, y = next(iter(_data()))
    trainer = Trainer(callbacks=[distillation], **QUIET)
    trainer.fit(Tidying(), DataLoader([kind(x=x, y=y, z=y.clone())], batch_size=None))
    (found,) = seen
    for one, other in zip(found, (y, x.sum(1), y, y % 2 == 1), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class AttributeDict(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        return self[name]


class Slotted:
    __slots__ = ("x", "y")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


class Nested:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.all = x, {"y": [y], "itself": self}

    y = property(lambda self: self.all["y"].pop())


@pytest.mark.parametrize("kind", [AttributeDict, Slotted, Nested, SimpleNamespace])
def test_batches_of_any_kind_are_as_they_came(kind: Any) -> None:
    class Overwriting(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            y = batch.y
            loss = F.cross_entropy(self.model(batch.x), y.clone())
            y.fill_(0)
            return loss

    class Labelled(losses.KD):
        def forward(self, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
            seen.append(target)
            return super().forward(student, teacher)

    seen: list[Tensor] = []
    x, y = next(iter(_data()))
    batch = kind(x=x, y=y.clone())
    distillation = Distillation(_net(16), {"kd": Term(Labelled())}, student="model", target=lambda batch: batch.y)
    Trainer(callbacks=[distillation], **QUIET).fit(Overwriting(), DataLoader([batch], batch_size=None))
    assert torch.equal(seen[0], y)
    if kind is not Nested:
        assert not batch.y.any()


def test_a_label_that_is_none_stays_so_where_the_step_takes_out_what_it_is_of() -> None:
    class Popping(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["x"], batch.pop("y")), batch_idx)

    class Labelled(losses.KD):
        def forward(self, student: Tensor, teacher: Tensor, odd: Any = None) -> Tensor:
            seen.append(odd)
            return super().forward(student, teacher)

    seen: list[Any] = []
    odd = {"odd": lambda batch: batch["y"] if batch["y"].numel() == 1 else None}
    distillation = Distillation(_net(16), {"kd": Term(Labelled())}, student="model", labels=odd)
    batches: Any = [{"x": x, "y": y} for x, y in _data()]
    Trainer(callbacks=[distillation], **QUIET).fit(Popping(), DataLoader(batches, batch_size=None))
    assert seen == [None, None]


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_label_under_a_new_key_goes_before_the_one_that_came(kind: Any) -> None:
    class Mixing(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 1:
                batch["mixed"] = batch["y"].flip(0)
            return F.cross_entropy(self.model(batch["x"]), batch["y"])

    class Labelled(losses.KD):
        def forward(self, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
            seen.append(target)
            return super().forward(student, teacher)

    seen: list[Tensor] = []
    batches = [kind(x=x, y=y) for x, y in _data()]
    distillation = Distillation(
        _net(16), {"kd": Term(Labelled())}, student="model", target=lambda batch: batch.get("mixed", batch["y"])
    )
    Trainer(callbacks=[distillation], **QUIET).fit(Mixing(), DataLoader(batches, batch_size=None))
    (_, first), (_, second) = _data()
    assert torch.equal(seen[0], first)
    assert torch.equal(seen[1], second.flip(0))


class Maps(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits[:, :, None, None] * torch.arange(1.0, 5.0).view(2, 2)


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
        self.net = _net(width)
        self.positions = 0

    def forward(self, x: Tensor) -> Tensor:
        self.positions = (torch.arange(600) / 600).unique().numel()
        return self.net(x / 255)
