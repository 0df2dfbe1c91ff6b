"""What every task adapter owes to the engine and to its users, with a real network and data of its own."""

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_kd.callbacks import Distillation
from project import QUIET, logged
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import Tensor, nn

from lightning_kd import DistillationModule, Term, data, losses, models, tasks

Terms = dict[str, tuple[Callable[[], nn.Module], str]]
"""Losses by their names, each with the path that it compares."""


class Case(NamedTuple):
    """A task, with what is distilled in it.

    Attributes:
        task: Makes the adapter.
        network: Makes a student, or the larger teacher.
        terms: Of paths, not of names of the task: both doors know them.
        data: Makes the data.
        labels: What the terms ask the task for.
        alone: Whether a student learns without a teacher.
    """

    task: Callable[[], tasks.TaskAdapter]
    network: Callable[[bool], nn.Module]
    terms: Terms
    data: Callable[[], LightningDataModule]
    labels: tuple[str, ...] = ()
    alone: bool = True


def classifier(large: bool) -> nn.Module:
    return models.CifarResNet(8, in_channels=1, width=8 if large else 4)


def segmenter(large: bool, channels: int = 3) -> nn.Module:
    width = 16 if large else 8
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 11, 3, 1, 1)
    )


def pose(large: bool, head: Any) -> nn.Module:
    backbone = "resnet10t" if large else "mobilenetv3_small_050"
    return models.PoseNet(backbone, 9, (32, 32), head=head, channels=16, stride=16)


def embedder(large: bool) -> nn.Module:
    return models.SmallEmbedder(8, 16, in_channels=1, width=8 if large else 4)


def anomalies(large: bool) -> nn.Module:
    return models.AnomalyNet(width=8) if large else models.AnomalyNet(width=4, level_channels=(8, 16, 32))


def efficient_ad(large: bool) -> nn.Module:
    if large:
        return models.PatchDescriber(channels=8, width=8)
    return models.EfficientADStudent(channels=8, image_size=(64, 64), width=4)


def torchvisions(large: bool) -> nn.Module:
    backbone = "resnet18" if large else "mobilenet_v3_small"
    return models.FCOS(
        10, backbone=backbone, channels=64 if large else 32, strides=[8, 16], convs=1, min_size=64, max_size=64
    )


def mmdets(large: bool) -> nn.Module:
    width = 8 if large else 4
    smaller = {
        "backbone.depth": 18,
        "backbone.base_channels": width,
        "backbone.stem_channels": width,
        "neck.in_channels": [width, 2 * width, 4 * width, 8 * width],
        "neck.out_channels": 4 * width,
        "bbox_head.in_channels": 4 * width,
        "bbox_head.feat_channels": 4 * width,
        "bbox_head.stacked_convs": 1,
    }
    return models.MMDetModel("retinanet/retinanet_r18_fpn_1x_coco", num_classes=10, overrides=smaller)


def images_of(kind: Any, **given: Any) -> Callable[[], LightningDataModule]:
    return partial(kind, **{"train_size": 8, "val_size": 4, "test_size": 4, "batch_size": 4} | given)


jointwise = partial(losses.Jointwise, losses.FitNet())
digits = partial(data.Digits, batch_size=256)
scenes = images_of(data.MaskScenes, size=32)
points = images_of(data.KeypointScenes, size=32)
boxes = images_of(data.BoxScenes, batch_size=2)
some_boxes = images_of(data.BoxScenes, batch_size=4, labelled=0.5)
textures = images_of(data.Textures, synthetic=0.25)
logits: Terms = {"kd": (losses.KD, "output")}
pyramid: Terms = {"pyramid": (losses.FitNet, "backbone[:]")}
neck: Terms = {"neck": (losses.FitNet, "neck[:]")}
levels = ["level1", "level2"]

CASES = {
    "Classification": Case(partial(tasks.Classification, 10), classifier, logits, digits),
    "Segmentation": Case(
        partial(tasks.Segmentation, 11), segmenter, {"cwd": (losses.CWD, "output")}, scenes, ("mask",)
    ),
    "LabelAssisted": Case(partial(tasks.LabelAssisted, 11), partial(segmenter, channels=4), {}, scenes),
    "Detection": Case(partial(tasks.Detection, 10), torchvisions, pyramid, boxes),
    "PseudoBoxes": Case(partial(tasks.PseudoBoxes, 10), torchvisions, pyramid, some_boxes, alone=False),
    "MMDetection": Case(partial(tasks.MMDetection, 10), mmdets, neck, boxes),
    "MMPseudoBoxes": Case(partial(tasks.MMPseudoBoxes, 10), mmdets, neck, some_boxes, alone=False),
    "Pose of heatmaps": Case(
        partial(tasks.Pose, 9),
        partial(pose, head="heatmap"),
        {"said": (jointwise, "output.heatmaps")},
        points,
        ("joints",),
    ),
    "Pose of bins": Case(
        partial(tasks.Pose, 9),
        partial(pose, head="simcc"),
        {"said": (partial(losses.Jointwise, losses.KD(temperature=1.0)), "output.simcc_x")},
        points,
        ("joints",),
    ),
    "Pose of coordinates": Case(
        partial(tasks.Pose, 9),
        partial(pose, head="coordinates"),
        {"said": (jointwise, "output.coordinates")},
        points,
        ("joints",),
    ),
    "AnomalyDetection by a map": Case(
        tasks.AnomalyDetection, anomalies, {"map": (losses.PKD, "output"), "hint": (losses.FitNet, "level1")}, textures
    ),
    "AnomalyDetection by a difference": Case(
        partial(tasks.AnomalyDetection, levels),
        anomalies,
        {level: (losses.STFPM, level) for level in levels},
        textures,
        ("mask",),
        alone=False,
    ),
    "EfficientAD": Case(
        tasks.EfficientAD,
        efficient_ad,
        {"hard": (losses.EfficientAD, "output.local"), "autoencoder": (losses.FitNet, "output.autoencoder")},
        textures,
        alone=False,
    ),
    "Retrieval": Case(
        lambda: tasks.Retrieval(MultiSimilarityLoss()),
        embedder,
        {"leaf": (losses.LEAF, "output"), "rkd": (losses.RKD, "output")},
        data.UnseenDigits,
    ),
}
TAUGHT = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items() if case.terms])
BOTH_WAYS = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in CASES.items() if case.terms and case.alone]
)
EACH = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


def made(case: Case, *, taught: bool = True, weight: float = 1.0) -> DistillationModule:
    """Makes a student, always the same, with a teacher or without."""
    seed_everything(1, verbose=False)
    student, teacher = case.network(False), case.network(True)
    with_teacher = {"teacher": teacher, "terms": terms(case, weight)} if taught and case.terms else {}
    return DistillationModule(case.task(), student, optimizer=sgd, **with_teacher)


def terms(case: Case, weight: float = 1.0) -> dict[str, Term]:
    return {
        name: Term(loss(), student=path, teacher=_of_teacher(path), weight=weight)
        for name, (loss, path) in case.terms.items()
    }


def _of_teacher(path: str) -> str:
    """EfficientAD's student says two things, and its teacher one."""
    return path.partition(".")[0] if path in ("output.local", "output.autoencoder") else path


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def fit(module: LightningModule, case: Case, *callbacks: Any, resume: Path | None = None, **given: Any) -> Trainer:
    seed_everything(2, verbose=False)
    quiet = QUIET | {"limit_train_batches": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    run = Trainer(callbacks=list(callbacks), **quiet | given)
    run.fit(module, datamodule=case.data(), ckpt_path=resume, weights_only=True if resume else None)
    return run


def state(network: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(network.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Own(LightningModule):
    """A user's module, whose loss is the task's: it never heard of a teacher."""

    def __init__(self, task: tasks.TaskAdapter, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.task.loss(self.task(self.model, batch), batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.parameters())


def test_every_adapter_has_a_case() -> None:
    adapters = {name for name in tasks.__all__ if name != "TaskAdapter"}
    assert adapters == {name.partition(" ")[0] for name in CASES}


@TAUGHT
def test_a_student_learns_of_a_teacher_that_stands_still_and_is_measured(case: Case) -> None:
    module = made(case)
    student, teacher = state(module.student), state(module.teacher)
    found = logged(fit(module, case))
    assert all(found[f"train/{name}"] > 0 for name in case.terms)
    assert same(state(module.teacher), teacher)
    assert any(not torch.equal(student[name], learned) for name, learned in module.student.named_parameters())
    measured = {name.removeprefix("val/") for name in found if name.startswith("val/")}
    assert module.task.main_metric in measured or not module.task.main_metric
    assert all(math.isfinite(value) for name, value in found.items() if name.startswith("train/"))


@BOTH_WAYS
def test_terms_that_weigh_nothing_leave_the_student_as_it_is_alone(case: Case) -> None:
    alone, weightless, taught = made(case, taught=False), made(case, weight=0.0), made(case)
    for module in (alone, weightless, taught):
        fit(module, case)
    assert same(state(weightless.student), state(alone.student))
    assert not same(state(taught.student), state(alone.student))


@BOTH_WAYS
def test_both_doors_train_the_same_student(case: Case) -> None:
    module = made(case)
    ours = logged(fit(module, case, limit_val_batches=0))
    seed_everything(1, verbose=False)
    own, teacher = Own(case.task(), case.network(False)), case.network(True)
    asked = {name: get for name, get in own.task.labels().items() if name in case.labels}
    found = logged(
        fit(own, case, Distillation(teacher, terms(case), student="model", labels=asked), limit_val_batches=0)
    )
    assert same(state(own.model), state(module.student))
    assert {name: found[f"train/{name}"] for name in case.terms} == {name: ours[f"train/{name}"] for name in case.terms}


@TAUGHT
def test_a_resumed_run_is_the_whole_one_and_a_checkpoint_holds_the_student(case: Case, tmp_path: Path) -> None:
    states, steps = [], []
    for resume in (None, tmp_path / "epoch=0.ckpt"):
        module, kept = made(case), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        run = fit(module, case, kept, resume=resume, max_epochs=2, enable_checkpointing=True)
        states.append(state(module))
        steps.append({name: value for name, value in logged(run).items() if name.startswith("train/")})
    assert same(*states)
    assert steps[0] == steps[1]
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    plain = case.network(False)
    plain.load_state_dict(
        {key.removeprefix("student."): value for key, value in saved.items() if key.startswith("student.")}
    )
    assert not [key for key in saved if "teacher" in key]


@EACH
def test_images_are_predicted_and_nothing_is_left_behind(case: Case) -> None:
    module = made(case)
    run = fit(module, case)
    batches = run.predict(module, datamodule=case.data())
    assert batches
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.student.modules())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert same(state(copied.student), state(module.student))


@EACH
def test_images_without_labels_are_no_batch_of_a_training(case: Case) -> None:
    module, source = made(case), case.data()
    source.setup("fit")
    images, _ = source.on_after_batch_transfer(next(iter(source.train_dataloader())), 0)[:2]
    task, student = module.task.train(), module.student.train()
    if module.teacher is not None:
        task.meet(student, module.teacher.model)
    told = "takes batches|wants (batches|masks)|The target of an image is"
    with pytest.raises(ValueError, match=rf"({told}).*(this one is|got)"):
        task.loss(task(student, images), images)
