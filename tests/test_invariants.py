"""The invariants of the design, for every loss, through the callback on a module that knows nothing of it."""

import copy
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning_kd.callbacks import (
    EMATeacher,
    MutualDistillation,
    TeacherCache,
    TemperatureScheduler,
    WeightScheduler,
)
from lightning_kd.tasks import Classification
from processes import run_script
from project import QUIET
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import Distillation, DistillationModule, Term, losses, schedules, teachers
from lightning_kd.finite import FiniteCheck

LOGITS = ("output", "output")
MAPS = ("stem", "stem")
VECTORS = ("pool", "pool")
PLACES = ("places", "places")
DENSE = ["stem", "stem"]  # a list: tuples that are equal are one object
"""Maps with a label for each pixel, and the teacher's channels as classes."""
WIRING = {
    "ALoss": (lambda: losses.ALoss(inner=0.0), PLACES),
    "AT": (losses.AT, MAPS),
    "BDKD": (losses.BDKD, LOGITS),
    "BPKD": (lambda: losses.BPKD(width=1), DENSE),
    "BSD": (losses.BSD, DENSE),
    "CIRKD": (losses.CIRKD, MAPS),
    "CRD": (lambda: losses.CRD(dim=8), VECTORS),
    "CTKD": (lambda: losses.CTKD(losses.KD()), LOGITS),
    "CWD": (losses.CWD, MAPS),
    "DIST": (losses.DIST, LOGITS),
    "DKD": (losses.DKD, LOGITS),
    "DTS": (lambda: losses.DTS(losses.KD()), LOGITS),
    "EfficientAD": (losses.EfficientAD, MAPS),
    "FGD": (losses.FGD, MAPS),
    "FitNet": (losses.FitNet, MAPS),
    "GIoU": (lambda: losses.GIoU(bins=2), DENSE),
    "IFVD": (lambda: losses.IFVD(8), DENSE),
    "InBatch": (lambda: losses.InBatch(losses.KD()), VECTORS),
    "InfoNCE": (losses.InfoNCE, VECTORS),
    "Jointwise": (lambda: losses.Jointwise(losses.FitNet()), DENSE),
    "KD": (losses.KD, LOGITS),
    "LD": (lambda: losses.LD(bins=2), DENSE),
    "LEAF": (losses.LEAF, LOGITS),
    "MarginMSE": (losses.MarginMSE, LOGITS),
    "Matryoshka": (lambda: losses.Matryoshka(losses.LEAF(), [2, 5]), LOGITS),
    "MGD": (lambda: losses.MGD(alpha=1e-3), MAPS),
    "NKD": (losses.NKD, LOGITS),
    "OFA": (losses.OFA, LOGITS),
    "PKD": (losses.PKD, MAPS),
    "PKT": (losses.PKT, VECTORS),
    "Pixelwise": (lambda: losses.Pixelwise(losses.DKD(), samples=40), DENSE),
    "PLD": (losses.PLD, LOGITS),
    "QFL": (losses.QFL, LOGITS),
    "RD4AD": (losses.RD4AD, MAPS),
    "RegionBSD": (lambda: losses.RegionBSD(8), DENSE),
    "RKD": (losses.RKD, VECTORS),
    "SampleTemperature": (lambda: losses.SampleTemperature(losses.KD()), LOGITS),
    "SEED": (lambda: losses.SEED(queue=24), VECTORS),
    "SKD": (losses.SKD, MAPS),
    "SP": (losses.SP, VECTORS),
    "Standardized": (lambda: losses.Standardized(losses.KD()), LOGITS),
    "STFPM": (losses.STFPM, MAPS),
    "VID": (losses.VID, MAPS),
}


class Net(nn.Module):
    def __init__(self, width: int, stride: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=stride, padding=1),
            nn.BatchNorm2d(width) if norm else nn.Identity(),
            nn.ReLU(),
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.drop = nn.Dropout(0.1 if norm else 0.0)
        self.head = nn.Linear(width, 5)
        self.places = Places()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.drop(self.pool(self.stem(x))))
        self.places(logits)
        return logits


class Places(nn.Module):
    """Some of the logits as two points: what only a term reads."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :4].unflatten(1, (2, 2))


class Plain(LightningModule):
    """A user's module: no trace of distillation."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.model = Net(4, stride=2, norm=norm)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.log("my_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)


class Validated(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self.model(batch[0]), batch[1]))


class History(Logger):
    """What was logged, step by step."""

    name, version = "history", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, float]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "train/loss" in metrics:
            self.steps.append({name: value for name, value in metrics.items() if "train/" in name})


def loader(batch_size: int = 8, shuffle: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(32, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 5, (32,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=shuffle)


def trainer(*callbacks: Callback | History, epochs: int = 2, **kwargs: Any) -> Trainer:
    histories = [history for history in callbacks if isinstance(history, History)]
    options = {"max_epochs": epochs, "logger": histories, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    hooks = [callback for callback in callbacks if isinstance(callback, Callback)]
    return Trainer(callbacks=hooks, **QUIET | options | kwargs)


def ema(buffers: Any = "average", **options: Any) -> Callable[..., Callback]:
    return lambda terms, **kwargs: EMATeacher(terms, 0.9, "model", buffers=buffers, **options, **kwargs)


# Callbacks of terms, for every teacher that changes while the student learns.
TEACHERS: dict[str, Callable[..., Any]] = {
    "EMA": ema(),
    "EMA own": ema("own", warm_up=True),
    "EMA copy": ema("copy", count=2, start_step=2),
    "EMA evaluated": ema(evaluate=True),
    "EMA scheduled": lambda terms, **kwargs: EMATeacher(terms, schedules.Cosine(0.5, 1.0), "model", **kwargs),
    "Ensemble": lambda terms, **kwargs: Distillation(teachers.Ensemble([Net(8), Net(5)]), terms, "model", **kwargs),
    "Ensemble routed": lambda terms, **kwargs: Distillation(
        teachers.Ensemble([Net(8), Net(5)], weights=teachers.Router(2, 5)), terms, "model", **kwargs
    ),
    "Cached": lambda terms, **kwargs: Distillation(teachers.Cached(mkdtemp(), Net(8)), terms, "model", **kwargs),
    "Itself": lambda terms, **kwargs: Distillation(teachers.Itself(), terms, "model", **kwargs),
    "PastSelf": lambda terms, **kwargs: Distillation(teachers.PastSelf(), terms, "model", **kwargs),
    "Peers": lambda terms, **kwargs: MutualDistillation([Net(8), Net(5)], terms, "model", **kwargs),
    "Peers ensemble": lambda terms, **kwargs: MutualDistillation([Net(8)], terms, "model", "ensemble", **kwargs),
}


def distillation(name: str = "FitNet", teacher: nn.Module | None = None, **kwargs: Any) -> Any:
    if name in TEACHERS:
        logits = Term(losses.KD(), weight=0.5)
        if name.startswith(("Peers", "Ensemble", "Cached")):
            return TEACHERS[name]({"it": logits}, **kwargs)
        hint = Term(losses.FitNet(), student="stem", teacher="stem", projector=nn.Conv2d(4, 4, 1))
        if name == "Itself":  # whose own logits would teach nothing
            logits = Term(losses.FitNet(), 0.5, "stem", "stem", nn.Conv2d(4, 4, 1))
        return TEACHERS[name]({"it": logits, "hint": hint}, **kwargs)
    loss, paths = WIRING[name]
    labels = {"boxes": one_box} if name in ("FGD", "GIoU", "LD") else {"points": one_place} if name == "ALoss" else None
    projector = None
    if paths is DENSE:
        projector = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Upsample(scale_factor=2))
        kwargs = {"target": areas} | kwargs
    terms = {"it": Term(loss(), weight=0.5, student=paths[0], teacher=paths[1], projector=projector)}
    return Distillation(teacher or Net(8), terms, **{"student": "model", "labels": labels} | kwargs)


def one_box(batch: Any) -> list[Tensor]:
    """Return the same box for every sample."""
    return [torch.tensor([[0.1, 0.2, 0.6, 0.9]])] * len(batch[0])


def one_place(batch: Any) -> Tensor:
    """Return the same points for every sample."""
    return torch.tensor([[0.1, 0.2], [0.6, 0.9]]).expand(len(batch[0]), 2, 2)


def areas(batch: Any) -> Tensor:
    """Labels of pixels: the left half of the image is the image's class, the right half the next."""
    return batch[1][:, None, None] + (torch.arange(8, device=batch[1].device) >= 4).long().expand(8, 8)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key, value in a.items() if not torch.equal(value, b[key])] == []


def assert_same_memory(a: Callback, b: Callback) -> None:
    leaves, structure = tree_flatten(a.state_dict())
    others, other_structure = tree_flatten(b.state_dict())
    assert structure == other_structure
    for one, other in zip(leaves, others, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.fixture(params=[*losses.__all__, *TEACHERS])
def name(request: pytest.FixtureRequest) -> str:
    known = request.param in (*WIRING, *TEACHERS)
    assert known, f"losses.{request.param} needs an entry in WIRING of {__file__}"
    return request.param


def test_every_teacher_is_tested() -> None:
    exported = [getattr(teachers, name) for name in teachers.__all__ if isinstance(getattr(teachers, name), type)]
    kinds = {kind.__name__ for kind in exported if issubclass(kind, teachers.Teacher)}
    assert {name.split()[0] for name in TEACHERS} == kinds - {"Teacher", "Frozen"}


@pytest.mark.parametrize("name", losses.__all__)
def test_the_teacher_stands_still_and_is_asked_once_per_training_batch(name: str) -> None:
    teacher = Net(8)
    before, calls, modes = state_of(teacher), [], []
    teacher.stem.register_forward_hook(lambda module, args, output: calls.append(output.requires_grad))
    teacher.stem.register_forward_hook(lambda module, args, output: modes.append(module.training))

    class Meddler(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            teacher.train()

    callback = distillation(name, teacher)
    trainer(Meddler(), callback, num_sanity_val_steps=2).fit(Validated(), loader(), loader())
    assert_same(before, state_of(teacher))
    rehearsals = int(distillation(name).distiller.needs_sample)
    assert len(calls) == 2 * 4 + rehearsals
    assert not any(calls)
    assert not any(modes)


def test_every_term_is_logged_and_moves_the_student(name: str) -> None:
    history = History()
    seed_everything(0)
    module = Plain()
    trainer(distillation(name, task_weight=0.0), history, epochs=1).fit(module, loader())
    better = name == "ALoss"  # which is negative where the student is better than its teacher
    assert all(step["train/it"] > 0 or (better and step["train/it"] != 0) for step in history.steps)
    for step in history.steps:
        terms = [0.5 * value for key, value in step.items() if key.endswith("train/it")]
        others = step.get("train/hint", 0.0) + step.get("train/teacher/router", 0.0)
        assert step["train/loss"] == pytest.approx(sum(terms) + others, rel=1e-5)
    seed_everything(0)
    assert not torch.equal(module.model.stem[0].weight, Plain().model.stem[0].weight)


def test_the_checkpoint_holds_the_student_alone(name: str, tmp_path: Path) -> None:
    module, run = Plain(), trainer(distillation(name), epochs=1)
    run.fit(module, loader())
    file = tmp_path / "it.ckpt"
    run.save_checkpoint(file, weights_only=False)
    checkpoint = torch.load(file, weights_only=True)
    fresh = Plain()
    fresh.load_state_dict(checkpoint["state_dict"], strict=True)
    assert_same(state_of(fresh), state_of(module))
    sizes = sum(v.numel() for v in checkpoint["state_dict"].values())
    assert sizes == sum(v.numel() for v in Plain().state_dict().values())
    (saved,) = [*checkpoint["callbacks"].values()] or [{}]
    learned = ("terms.it.", "terms.hint.projector.", "teacher_learner.")
    assert all(key.startswith(learned) for key in saved.get("learned", {}))
    assert ("teacher" in saved) == name.startswith(("EMA", "PastSelf"))
    assert list(saved.get("peers", {})) == {"Peers": ["peer1", "peer2"], "Peers ensemble": ["peer1"]}.get(name, [])


def test_resume_is_exact(name: str, tmp_path: Path) -> None:
    def run(history: History, resume: Path | None = None) -> tuple[LightningModule, Callback]:
        seed_everything(3)
        module, callback = Plain(), distillation(name)
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer(callback, history, keep, enable_checkpointing=True).fit(
            module, loader(shuffle=True), ckpt_path=resume, weights_only=True
        )
        return module, callback

    whole, rest = History(), History()
    module, callback = run(whole)
    resumed, resumed_callback = run(rest, tmp_path / "epoch=0.ckpt")
    assert_same(state_of(module), state_of(resumed))
    assert_same_memory(callback, resumed_callback)
    assert whole.steps[4:] == rest.steps


def test_resume_is_exact_for_everything_together(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        terms = {
            "kd": Term(losses.KD(), weight=schedules.Linear(1.0, 0.5)),
            "ctkd": Term(losses.CTKD(losses.KD())),
            "hint": Term(losses.FitNet(), student="stem", teacher="stem"),
        }
        past = Term(losses.FitNet(), student="stem", teacher="stem", projector=nn.Conv2d(4, 4, 1))
        return [
            Distillation(Net(8), terms, student="model", task_weight=schedules.Cosine(1.0, 0.5)),
            EMATeacher({"past": past}, schedules.Cosine(0.5, 1.0), "model", count=2, evaluate=True),
            TemperatureScheduler("kd", schedules.Exponential(8.0, 1.0)),
            WeightScheduler("hint", schedules.Piecewise([(0.0, 2.0), (0.5, 1.0), (1.0, 3.0)]), by="epoch"),
        ]

    def run(history: History, resume: Path | None = None) -> tuple[LightningModule, list[Callback]]:
        seed_everything(3)
        module, attached = Validated(), callbacks()
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer(*attached, history, keep, epochs=4, enable_checkpointing=True).fit(
            module, loader(shuffle=True), loader(), ckpt_path=resume, weights_only=True
        )
        return module, attached

    whole, rest = History(), History()
    module, attached = run(whole)
    resumed, resumed_attached = run(rest, tmp_path / "epoch=1.ckpt")
    assert_same(state_of(module), state_of(resumed))
    for one, other in zip(attached[:2], resumed_attached[:2], strict=True):
        assert_same_memory(one, other)
    assert whole.steps[8:] == rest.steps
    assert len({step["train/kd/temperature"] for step in whole.steps}) == 16
    assert {step["train/hint/weight"] for step in whole.steps} == {2.0, 1.5, 1.0}


def test_nothing_is_left_behind(name: str) -> None:
    module, teacher = Plain(), Net(8)
    callback = distillation(name, teacher)
    trainer(callback, epochs=1).fit(module, loader())
    never_distilled = Plain()
    trainer(epochs=1).fit(never_distilled, loader())
    assert vars(module).keys() == vars(never_distilled).keys()
    module.trainer = None
    assert list(module._modules) == ["model"]
    for net in (module, teacher):
        for part in net.modules():
            assert not part._forward_hooks
            assert not part._forward_pre_hooks
    pickle.loads(pickle.dumps(module))
    copy.deepcopy(module)
    pickle.loads(pickle.dumps(callback))
    copy.deepcopy(callback)
    trainer(callback, epochs=1).fit(module, loader())


@pytest.mark.parametrize("optimizer", ["model", "all", "groups", "scheduler", "lists", "one-cycle", "adagrad", "named"])
def test_projectors_learn_however_configure_optimizers_is_written(optimizer: str) -> None:
    class Configured(Plain):
        def configure_optimizers(self) -> Any:  # noqa: PLR0911  # one return per way to write it
            mine: Any = self.model.parameters()
            if optimizer == "all":
                return torch.optim.SGD(self.parameters(), lr=0.1)
            if optimizer == "groups":
                return torch.optim.SGD(
                    [{"params": self.model.head.parameters()}, {"params": self.model.stem.parameters()}], 0.1
                )
            if optimizer == "adagrad":
                return [torch.optim.Adagrad(mine, initial_accumulator_value=0.5)]
            if optimizer == "named":
                return torch.optim.SGD(self.model.named_parameters(), lr=0.1)
            made = torch.optim.SGD(mine, lr=0.1, momentum=0.9)
            if optimizer == "scheduler":
                return {
                    "optimizer": made,
                    "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(made, [lambda step: 0.5**step]),
                }
            if optimizer == "lists":
                return [made], [{"scheduler": torch.optim.lr_scheduler.StepLR(made, 1), "interval": "step"}]
            if optimizer == "one-cycle":
                cycle = torch.optim.lr_scheduler.OneCycleLR(made, 0.1, total_steps=8)
                return {"optimizer": made, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
            return made

    class Grab(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.before = [p.detach().clone() for p in callback.distiller.parameters()]

    callback, grab = distillation("FitNet"), Grab()
    run = trainer(callback, grab)
    run.fit(Configured(), loader())
    assert grab.before
    assert all(not torch.equal(a, b) for a, b in zip(grab.before, callback.distiller.parameters(), strict=True))
    groups = [id(p) for group in run.optimizers[0].param_groups for p in group["params"]]
    assert len(groups) == len(set(groups))
    if optimizer == "scheduler":
        assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.25)


OPTIONS = ["frozen", *TEACHERS]
WAITING_FOR_NOBODY = [name for name in OPTIONS if name != "Cached"]  # which copies what it writes to the host


def of_any_teacher(name: str) -> Any:
    """Every teacher on networks without BatchNorm and dropout, on which a batch may be split."""
    hint = Term(losses.FitNet(), student="stem", teacher="stem", weight=10.0, projector=nn.Conv2d(4, 4, 1))
    logits = Term(losses.KD(), weight=0.5)
    if name == "frozen":
        built = Term(losses.FitNet(), student="stem", teacher="stem", weight=10.0)
        return Distillation(Net(6, norm=False), {"it": logits, "hint": built}, "model")
    if name == "Cached":
        cached = teachers.Cached(mkdtemp(), Net(6, norm=False), storage="float32")
        return Distillation(cached, {"it": logits}, "model")
    if name.startswith("Ensemble"):
        weights = teachers.Router(2, 5) if name == "Ensemble routed" else None
        ensemble = teachers.Ensemble([Net(6, norm=False), Net(5, norm=False)], weights=weights)
        return Distillation(ensemble, {"it": logits}, "model")
    if name.startswith("Peers"):
        peers = [Net(width, norm=False) for width in ((6,) if name == "Peers ensemble" else (6, 5))]
        return MutualDistillation(peers, {"it": logits}, "model", "ensemble" if name == "Peers ensemble" else "each")
    if name == "Itself":
        logits = Term(losses.FitNet(), 0.5, "stem", "stem", nn.Conv2d(4, 4, 1))
    return TEACHERS[name]({"it": logits, "hint": hint})


def learned(
    name: str, change: Callable[[nn.Module], nn.Module] = lambda net: net, batch_size: int = 8, **options: Any
) -> Any:
    """Returns the student, what the callback remembers and the logged steps of a fit with a changed student."""
    seed_everything(0)
    module, history = Plain(norm=False), History()
    callback = of_any_teacher(name)
    module.model = change(module.model)
    trainer(callback, history, **options).fit(module, loader(batch_size=batch_size))
    student = [p.detach() for p in module.model.parameters()]
    return student, [x for x in tree_leaves(callback.state_dict()) if isinstance(x, Tensor)], history.steps


@pytest.mark.parametrize("name", OPTIONS)
def test_accumulated_micro_batches_give_the_full_batch(name: str) -> None:
    student, memory, _ = learned(name, batch_size=16)
    micro, micro_memory, _ = learned(name, batch_size=4, accumulate_grad_batches=4)
    torch.testing.assert_close(micro, student)
    torch.testing.assert_close(micro_memory, memory)  # an average has moved as often


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(checkpoint(self.stem, x, use_reentrant=False)))


def checkpointed(net: nn.Module) -> nn.Module:
    net.__class__ = Checkpointed
    return net


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda net: torch.compile(net, backend="aot_eager"),
    "checkpointed": checkpointed,
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo at a graph break
def test_a_compiled_or_checkpointed_student_learns_the_same(change: str, name: str) -> None:
    student, memory, steps = learned(name)
    changed, changed_memory, changed_steps = learned(name, CHANGES[change])
    assert [step.keys() for step in changed_steps] == [step.keys() for step in steps]
    for step, plain in zip(changed_steps, steps, strict=True):
        assert step == pytest.approx(plain, rel=1e-4, abs=1e-6)
    assert steps[-1]["train/it"] > 1e-5  # a copy of the student begins as the student
    torch.testing.assert_close(changed, student)
    torch.testing.assert_close(changed_memory, memory)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_on_a_gpu_no_step_waits_in_mixed_precision(precision: Any, name: str) -> None:
    class NoSync(Callback):
        """Watches training_step; Lightning itself waits in the first, where it makes what it logs."""

        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
            torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")

        def on_before_backward(self, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    def update(moment: schedules.Moment) -> None:
        torch.cuda.set_sync_debug_mode("error")
        own_update(moment)
        torch.cuda.set_sync_debug_mode("default")
        updated.append(moment.step)

    seed_everything(0)
    history, callback, updated = History(), of_any_teacher(name), []
    options: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "precision": precision, "epochs": 1}
    if name not in WAITING_FOR_NOBODY:  # the cache waits until it is filled
        trainer(callback, **options).fit(Plain(norm=False), loader())
    teacher = callback.distiller.teacher
    own_update, teacher.update = teacher.update, update
    try:
        trainer(callback, NoSync(), history, **options).fit(Plain(norm=False), loader())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert updated == [1, 2, 3, 4]
    assert all(0 < step["train/it"] < float("inf") for step in history.steps)


class Waits(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: reading a number, or shapes that depend on numbers.

    Args:
        device: What would be on the GPU; what is computed of it is, too. Unless given, everything.
    """

    def __init__(self, device: Iterable[Tensor] | None = None) -> None:
        super().__init__()
        self.operations = 0
        self.device = None if device is None else {id(tensor): tensor for tensor in device}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, self.operations = torch.ops.aten, self.operations + 1
        waiting = (aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.masked_select, aten._unique2)
        there = self.device is None or any(id(leaf) in self.device for leaf in tree_leaves((args, kwargs)))
        assert not there or func.overloadpacket not in waiting, func
        result = func(*args, **kwargs or {})
        if there and self.device is not None:
            self.device |= {id(leaf): leaf for leaf in tree_leaves(result)}
        return result


@pytest.mark.parametrize("door", ["callback", "module"])
@pytest.mark.parametrize("name", WAITING_FOR_NOBODY)
def test_no_step_reads_a_number(name: str, door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Waits():
        torch.ones(1).item()
    # On a CPU it stops the step itself; on a GPU it waits for nobody: test_on_a_gpu_no_step_waits.
    monkeypatch.setattr(FiniteCheck, "__call__", lambda *args: None)
    modes: list[Waits] = []

    class NoWaiting(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            modes.append(Waits())
            modes[-1].__enter__()

        def on_before_backward(self, *args: Any) -> None:
            modes[-1].__exit__(None, None, None)

    def update(moment: schedules.Moment) -> None:
        with Waits():
            own_update(moment)

    callback = of_any_teacher(name)
    teacher, terms = callback.distiller.teacher, dict(callback.distiller.named_terms())
    own_update, teacher.update = teacher.update, update
    if door == "module":
        module = DistillationModule(Classification(5), Net(4, stride=2, norm=False), teacher, terms)
        trainer(NoWaiting(), epochs=1).fit(module, loader(), loader())
    else:
        trainer(callback, NoWaiting(), epochs=1).fit(Plain(norm=False), loader())
    assert len(modes) == 4
    assert all(mode.operations > 20 for mode in modes)


@pytest.mark.parametrize("door", ["callback", "module"])
@pytest.mark.parametrize("storage", ["float16", "top2"])
def test_no_step_of_a_cached_epoch_reads_a_number(
    storage: str, door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.ones(2)
    with Waits([images]):
        torch.zeros(1).item()  # of the host
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            (images + torch.ones(2)).sum().item()
    monkeypatch.setattr(FiniteCheck, "__call__", lambda *args: None)  # as in test_no_step_reads_a_number
    modes: list[Waits] = []

    class NoWaiting(Callback):
        """Watches each step but the first, which compares the inputs with those that the teacher saw."""

        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
            modes.append(Waits([*batch, *module.parameters(), *module.buffers()]))
            if batch_idx:
                modes[-1].__enter__()

        def on_before_backward(self, *args: Any) -> None:
            if len(modes) % 4 != 1:
                modes[-1].__exit__(None, None, None)

    def fit(*callbacks: Callback) -> None:
        terms = {"it": Term(losses.KD())}
        if door == "module":
            student, teacher = Net(4, stride=2, norm=False), Net(6, norm=False)
            module = DistillationModule(Classification(5), student, teacher, terms)
            run = trainer(*callbacks, epochs=1)
            run.fit(module, loader(), loader())
        else:
            run = trainer(Distillation(Net(6, norm=False), terms, "model"), *callbacks, epochs=1)
            run.fit(Plain(norm=False), loader())

    for callbacks in ([], [NoWaiting()]):
        torch.manual_seed(0)  # the same teacher
        fit(TeacherCache(tmp_path, storage), *callbacks)
    assert [mode.operations > 20 for mode in modes] == [False, True, True, True]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_terms_are_alive_in_other_precisions(precision: Any, name: str) -> None:
    history = History()
    trainer(distillation(name), history, epochs=1, precision=precision).fit(Plain(), loader())
    assert all(0 < step["train/it"] < float("inf") for step in history.steps)


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_gradient_clipping(clip: str) -> None:
    trainer(distillation(), gradient_clip_val=0.01, gradient_clip_algorithm=clip).fit(Plain(), loader())


def test_a_term_that_is_not_finite_stops_the_run_with_its_name_step_and_ranges() -> None:
    class Explodes(nn.Module):
        calls = 0

        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            self.calls += 1
            return (student - teacher).square().mean() / (0.0 if self.calls == 3 else 1.0)

    callback = Distillation(Net(8), {"boom": Term(Explodes())}, student="model")
    with pytest.raises(FloatingPointError, match=r"Step 2: the distillation term 'boom' is inf \(student in \[-?\d"):
        trainer(callback).fit(module := Plain(), loader())
    assert "training_step" not in vars(module)
    assert not module.model._forward_hooks


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["KD", "FitNet", "EMA", "Peers"])
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_beside_weight_averaging(order: str, name: str, tmp_path: Path) -> None:
    average, callback = EMAWeightAveraging(decay=0.9), distillation(name)
    callbacks = [callback, average] if order == "before" else [average, callback]
    run = trainer(*callbacks)
    module = Validated()
    if order == "after" and name != "KD":
        with pytest.raises(ValueError, match=f"comes before {type(callback).__name__}"):
            run.fit(module, loader(), loader())
        return
    keep = ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(*callbacks, keep, enable_checkpointing=True)
    run.fit(module, loader(), loader())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for state in (checkpoint["state_dict"], checkpoint["current_model_state"]):
        Plain().load_state_dict(state, strict=True)
    trainer(*callbacks, keep, epochs=3, enable_checkpointing=True).fit(
        Validated(), loader(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )


def test_the_module_door_is_the_callback_door() -> None:
    def terms() -> dict[str, Term]:
        torch.manual_seed(7)
        return {
            "kd": Term(losses.KD(), weight=schedules.Linear(0.0, 2.0)),
            "hint": Term(losses.FitNet(), student="stem", teacher="stem"),
        }

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    seed_everything(0)
    teacher, plain = Net(8), Validated()
    module = DistillationModule(Classification(5), copy.deepcopy(plain.model), teacher, terms(), optimizer=sgd)
    histories = History(), History()
    for history, door, callbacks in (
        (histories[0], plain, [Distillation(teacher, terms(), student="model")]),
        (histories[1], module, []),
    ):
        torch.manual_seed(11)
        trainer(*callbacks, history).fit(door, loader(), loader())
    assert histories[0].steps == histories[1].steps
    assert histories[0].steps[4]["train/kd/weight"] == 1.0
    assert_same(state_of(plain.model), state_of(module.student))
    assert all(key.startswith("student.") for key in module.state_dict())


SCRIPT = """
import sys, torch
from test_invariants import Net, Plain, loader, trainer
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler
from lightning_kd import Distillation, Term, losses, schedules, teachers
from lightning_kd.attachment import attachments_of
from lightning_kd.callbacks import EMATeacher, MutualDistillation

class Halves(LightningDataModule):
    # Lightning's own sampler shuffles training data anew for each number of processes.
    def train_dataloader(self):
        data, trainer = loader().dataset, self.trainer
        halves = DistributedSampler(data, trainer.world_size, trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=8 // trainer.world_size, sampler=halves)

class SameOnAllRanks(Callback):
    def on_train_end(self, trainer, pl_module):
        for callback in attachments_of(trainer):
            held = [x.flatten().double() for x in tree_leaves(callback.state_dict()) if torch.is_tensor(x)]
            if trainer.world_size > 1 and held:
                own = torch.cat(held)
                ranks = trainer.strategy.all_gather(own)
                assert torch.equal(ranks[0], ranks[1]), type(callback)

def train(kind, strategy, devices):
    norm = kind == "norm"  # statistics of half a batch are others, but equal on all ranks
    seed_everything(0)
    module, kd = Plain(norm=norm), Term(losses.KD(), weight=schedules.Linear(1.0, 0.5))
    # of the two projectors one is the user's, one is built
    hint = Term(losses.FitNet(), student="stem", teacher="stem", weight=10.0)
    own = Term(losses.FitNet(), student="stem", teacher="stem", projector=torch.nn.ConvTranspose2d(4, 6, 2, 2))
    if kind == "mutual":
        callbacks = [MutualDistillation([Net(6, norm=False)], {"kd": kd, "hint": hint}, student="model")]
    elif kind == "past and ensembles":
        both = teachers.Ensemble([Net(6, norm=False), Net(5, norm=False)], weights="entropy")
        routed = teachers.Ensemble([Net(6, norm=False), Net(5, norm=False)], weights=teachers.Router(2, 5))
        callbacks = [
            Distillation(teachers.PastSelf(), {"kd": kd, "hint": hint}, student="model"),
            Distillation(both, {"both": Term(losses.KD(), weight=schedules.Linear(0.1, 0.5))}, student="model"),
            Distillation(routed, {"routed": Term(losses.KD(), weight=0.5)}, student="model"),
            Distillation(
                teachers.Itself(),
                {"itself": Term(losses.FitNet(), student="stem", teacher="stem", projector=torch.nn.Conv2d(4, 4, 1))},
                student="model",
            ),
        ]
    else:
        ctkd = Term(losses.CTKD(losses.KD()), weight=0.1)
        terms = {"kd": kd, "dkd": Term(losses.DKD(), weight=0.1), "ctkd": ctkd, "hint": hint, "own": own}
        past = {"past": Term(losses.KD(), weight=2.0)}
        average = EMATeacher(past, 0.9, student="model", buffers="own" if norm else "average", evaluate=norm)
        callbacks = [Distillation(Net(6, norm=norm), terms, student="model"), average]
        if norm:
            of_past = {"of_past": Term(losses.KD(), weight=0.1)}
            callbacks.append(Distillation(teachers.PastSelf(), of_past, student="model"))
    run = trainer(*callbacks, SameOnAllRanks(), strategy=strategy, devices=devices, use_distributed_sampler=False)
    seed_everything(0)  # as DDP does by itself before the projectors are made
    run.fit(module, Halves())
    if run.is_global_zero:
        logged = {k: float(v) for k, v in run.callback_metrics.items()}
        memory = [x for callback in callbacks for x in tree_leaves(callback.state_dict()) if torch.is_tensor(x)]
        torch.save({"state": module.state_dict(), "logged": logged, "memory": memory}, f"{kind}.pt")

if __name__ == "__main__":
    for kind in sys.argv[3:]:
        train(kind, sys.argv[1], int(sys.argv[2]))
"""
KINDS = ("frozen and EMA", "mutual", "past and ensembles")
CTKD = ("ctkd", "ctkd/temperature", "ctkd/reversal")
FROZEN_AND_EMA = {
    "my_loss",
    *(f"train/{name}" for name in ("loss", "task", "kd", "kd/weight", "dkd", *CTKD, "hint", "own", "past")),
}
LOGGED = {
    "frozen and EMA": FROZEN_AND_EMA,
    "norm": {*FROZEN_AND_EMA, "train/of_past"},
    "past and ensembles": {
        "my_loss",
        *(f"train/{name}" for name in ("loss", "task", "kd", "kd/weight", "hint")),
        *(f"train/{name}" for name in ("both", "both/weight", "routed", "teacher/router", "itself")),
    },
    "mutual": {
        *("my_loss", "peer1/my_loss", "train/loss"),
        *(f"{peer}train/{name}" for peer in ("", "peer1/") for name in ("task", "kd", "kd/weight", "hint")),
    },
}


def train_in_processes(strategy: str, devices: int, folder: Path, *kinds: str) -> dict[str, dict[str, Any]]:
    ranks = None if strategy in ("auto", "ddp_spawn") else devices
    said = run_script(SCRIPT, strategy, str(devices), *kinds, folder=folder, ranks=ranks)
    assert "unused" not in said
    results: dict[str, dict[str, Any]] = {kind: torch.load(folder / f"{kind}.pt", weights_only=True) for kind in kinds}
    assert {kind: set(result["logged"]) for kind, result in results.items()} == {kind: LOGGED[kind] for kind in kinds}
    return results


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return train_in_processes("auto", 1, tmp_path_factory.mktemp("one"), *KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_find_unused_parameters_false"])
def test_two_processes_are_the_same_training(
    strategy: str, one_process: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    two = train_in_processes(strategy, 2, tmp_path, *KINDS)
    for kind, one in one_process.items():
        assert all(value > 0 for value in two[kind]["logged"].values()), kind
        torch.testing.assert_close(two[kind]["state"], one["state"], msg=lambda text, kind=kind: f"{kind}: {text}")
        if strategy != "ddp_spawn":  # Lightning brings back from spawned processes the module, but not the callbacks
            assert one["memory"], kind
            torch.testing.assert_close(two[kind]["memory"], one["memory"])


@pytest.mark.slow
def test_copies_are_the_same_on_all_ranks_with_statistics_of_their_own(tmp_path: Path) -> None:
    train_in_processes("ddp", 2, tmp_path, "norm")
