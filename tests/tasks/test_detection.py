import copy
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import lightning as L
import onnxruntime
import pytest
import torch
from lightning_kd.tasks import Detection
from processes import run_script
from project import QUIET
from torch import Tensor, nn
from torchvision.models import detection as torchvision_detection
from torchvision.models.detection import (
    fasterrcnn_mobilenet_v3_large_320_fpn,
    fcos_resnet50_fpn,
    retinanet_resnet50_fpn,
    ssd300_vgg16,
    ssdlite320_mobilenet_v3_large,
)

from lightning_kd import Distillation, DistillationModule, Distiller, Term, losses
from lightning_kd.cli import main
from lightning_kd.data.box_images import collate
from lightning_kd.data.box_scenes import BoxScenes
from lightning_kd.models import detectors

CLASSES = 10
KINDS = ("FCOS", "RetinaNet", "FasterRCNN")

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def detector(kind: str = "FCOS", backbone: str = "mobilenet_v3_small", channels: int = 32, **given: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"min_size": 64, "max_size": 64} | given
    return getattr(detectors, kind)(num_classes=CLASSES, backbone=backbone, channels=channels, **sizes)


@pytest.fixture(scope="module")
def scenes() -> BoxScenes:
    data = BoxScenes(train_size=6, val_size=2, test_size=4, batch_size=2)
    data.setup("fit")
    return data


@pytest.fixture
def batch(scenes: BoxScenes) -> Batch:
    return collate([scenes.splits["train"][i] for i in range(3)])


def trainer(*callbacks: L.Callback, **given: Any) -> L.Trainer:
    return L.Trainer(callbacks=list(callbacks), **QUIET | given)


class Plain(L.LightningModule):
    """A module as people have it, in torchvision's convention, that knows nothing of distillation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        found = self.model(images, [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets])
        return sum(found.values())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.001)


# What the task is


@pytest.mark.parametrize("classes", [0, -1])
def test_there_is_a_class(classes: int) -> None:
    with pytest.raises(ValueError, match="count the classes without the background"):
        Detection(classes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_sum_of_torchvisions_and_reaches_every_parameter(kind: str, batch: Batch) -> None:
    model, task = detector(kind).train(), Detection(CLASSES)
    images, targets = batch
    torch.manual_seed(1)  # Faster R-CNN samples its anchors
    loss = task.loss(task(model, batch), batch)
    assert loss is not None
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    torch.manual_seed(1)
    for module in model.modules():  # as it was before the first call
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    expected = model(images, [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets])
    torch.testing.assert_close(loss, sum(expected.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_in_evaluation_there_are_boxes_and_no_loss(kind: str, batch: Batch) -> None:
    model, task = detector(kind, **{"score_thresh": 0.0}).eval(), Detection(CLASSES)
    with torch.no_grad():
        output = task(model, batch)
        expected = model(batch[0])
    assert task.loss(output, batch) is None
    predicted = task.predict(output)
    assert len(predicted) == 3
    for mine, theirs in zip(predicted, expected, strict=True):
        assert torch.equal(mine["boxes"], theirs["boxes"])
        assert torch.equal(mine["labels"] + 1, theirs["labels"])
    metrics = task.metrics()
    task.update(metrics, output, batch)
    assert set(metrics.compute()) == {"mAP", "mAP50", "mAP75", "mAP/small", "mAP/medium", "mAP/large"}


def test_who_finds_everything_has_a_precision_of_one(batch: Batch) -> None:
    task = Detection(CLASSES)
    metrics = task.metrics()
    perfect = [{**t, "labels": t["labels"] + 1, "scores": torch.ones(len(t["labels"]))} for t in batch[1]]
    task.update(metrics, perfect, batch)
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert [found.pop(name) for name in ("mAP", "mAP50", "mAP75")] == pytest.approx([1.0] * 3)
    assert {value for value in found.values() if not math.isnan(value)} == {1.0}  # nan: there are none of that size


@pytest.mark.parametrize(
    "make",
    [
        *(retinanet_resnet50_fpn, fcos_resnet50_fpn, fasterrcnn_mobilenet_v3_large_320_fpn),
        *(ssd300_vgg16, ssdlite320_mobilenet_v3_large),
    ],
    ids=lambda make: make.__name__,
)
def test_what_torchvision_offers_fits(make: Any) -> None:
    model = make(weights=None, weights_backbone=None, num_classes=CLASSES + 1)
    task = Detection(CLASSES)
    task._check_classes(model)
    with pytest.raises(ValueError, match=rf"has {CLASSES + 1} classes .* make the model with num_classes=4"):
        Detection(3)._check_classes(model)
    terms = {name.replace(".", "_"): Term(nn.MSELoss(), student=name, teacher=name) for name in task.knowledge(model)}
    distiller = Distiller(terms, copy.deepcopy(model), knowledge=task.knowledge)
    distiller.attach(model)  # every path that is offered exists
    distiller.detach()


@pytest.mark.parametrize("output", [torch.zeros(3), [torch.zeros(3)], [{"boxes": torch.zeros(0, 4)}], None])
def test_what_other_models_return_is_refused(output: Any, batch: Batch) -> None:
    task = Detection(CLASSES)
    for use in (lambda: task.loss(output, batch), lambda: task.predict(output)):
        with pytest.raises(ValueError, match=r"override Detection\.forward"):
            use()


def test_sizes_drawn_at_random_are_refused_when_it_is_wired() -> None:
    model = detector()
    model.transform.min_size = (48, 64)
    with pytest.raises(ValueError, match=r"draws its images' size at random .*min_size=\(48, 64\).*RandomShortestSize"):
        Detection(CLASSES).knowledge(model)


# Odd data


def test_an_image_without_boxes_teaches_that_there_is_nothing(batch: Batch) -> None:
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    odd = batch[0][:2], [batch[1][0], nothing]
    task = Detection(CLASSES)
    for kind in KINDS:
        loss = task.loss(task(detector(kind).train(), odd), odd)
        assert loss is not None
        assert torch.isfinite(loss)
        assert loss > 0
    assert task.boxes(odd)[1].shape == (0, 4)


def test_boxes_without_an_area_and_ignored_ones_change_nothing(batch: Batch) -> None:
    images, targets = batch
    line, point = [5.0, 5.0, 5.0, 20.0], [7.0, 7.0, 7.0, 7.0]
    crowd = [0.0, 0.0, 60.0, 60.0]
    odd = [
        {
            "boxes": torch.cat([torch.tensor([line, point, crowd]), t["boxes"]]),
            "labels": torch.cat([torch.tensor([0, 1, 2]), t["labels"]]),
            "ignore": torch.tensor([False, False, True] + [False] * len(t["labels"])),
        }
        for t in targets
    ]
    task = Detection(CLASSES)
    expected = task.loss(task(detector().train(), batch), batch)
    assert torch.equal(task.loss(task(detector().train(), (images, odd)), (images, odd)), expected)
    for mine, theirs in zip(task.boxes((images, odd)), task.boxes(batch), strict=True):
        assert torch.equal(mine, theirs)
    perfect = [{**t, "labels": t["labels"] + 1, "scores": torch.ones(len(t["labels"]))} for t in targets]
    metrics = task.metrics()
    task.update(metrics, perfect, (images, odd))
    assert float(metrics.compute()["mAP"]) == pytest.approx(1.0)


def test_a_class_that_the_task_does_not_know_is_named(batch: Batch) -> None:
    targets = [{**t, "labels": torch.full_like(t["labels"], 12)} for t in batch[1]]
    with pytest.raises(ValueError, match=r"the classes \[12\], and the task num_classes=10"):
        Detection(CLASSES)(detector().train(), (batch[0], targets))


# Where the boxes lie for the network


@pytest.mark.parametrize(
    ("shorter", "longer", "fixed"), [(64, 64, None), (100, 90, None), (50, 999, None), (1, 1, (96, 64))]
)
def test_boxes_are_where_the_models_own_transform_puts_them(shorter: int, longer: int, fixed: Any) -> None:
    model = detector().train()
    model.transform.min_size, model.transform.max_size, model.transform.fixed_size = (shorter,), longer, fixed
    images = [torch.rand(3, *size) for size in ((64, 80), (70, 33), (123, 47))]
    corner = 20 * torch.rand(3, 4, 2)
    targets = [
        {"boxes": torch.cat([c, c + 1 + 10 * torch.rand(4, 2)], dim=1), "labels": torch.zeros(4, dtype=torch.int64)}
        for c in corner
    ]
    task = Detection(CLASSES)
    task(model, (images, targets))
    seen, moved = model.transform(images, targets)
    height, width = seen.tensors.shape[-2:]
    for mine, theirs in zip(task.boxes((images, targets)), moved, strict=True):
        torch.testing.assert_close(mine, theirs["boxes"] / torch.tensor([width, height, width, height]))


# Distillation


class Seen(nn.Module):
    """A loss that says which boxes it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes: list[Tensor] = []

    def forward(self, student: Tensor, teacher: Tensor, boxes: list[Tensor]) -> Tensor:
        self.boxes = boxes
        return (student - teacher).square().mean()


def small(kind: str, teacher: bool = False) -> nn.Module:
    return detector(kind, channels=64 if teacher else 32)


@pytest.mark.parametrize(
    ("student", "teacher", "path"),
    [
        ("FCOS", "RetinaNet", "features"),
        ("RetinaNet", "RetinaNet", "features[1:3]"),
        ("FasterRCNN", "FCOS", "features.0"),
        ("FCOS", "FCOS", "cls"),
        ("FCOS", "FCOS", "centerness"),
        ("RetinaNet", "RetinaNet", "reg"),
        ("FasterRCNN", "FasterRCNN", "objectness"),
    ],
)
def test_the_module_door(student: str, teacher: str, path: str, scenes: BoxScenes) -> None:
    loss = losses.FitNet() if path.startswith("features") else nn.MSELoss()
    seen = Term(Seen(), student='backbone["0"]', teacher='backbone["0"]', projector=nn.Conv2d(32, 64, 1))
    terms = {"kd": Term(loss, student=path, teacher=path), "seen": seen}
    model, expert = small(student), small(teacher, teacher=True)
    before = {key: value.clone() for key, value in expert.state_dict().items()}
    module = DistillationModule(Detection(CLASSES), model, expert, terms)
    run = trainer(limit_val_batches=1)
    run.fit(module, datamodule=scenes)
    logged = {key: float(value) for key, value in run.callback_metrics.items()}
    assert {"train/task", "train/kd", "val/mAP", "val/mAP50", "val/mAP75"} <= logged.keys()
    assert logged["train/kd"] > 0
    assert "val/loss" not in logged
    assert all(torch.equal(value, before[key]) for key, value in expert.state_dict().items())
    assert set(module.state_dict()) == {f"student.{key}" for key in small(student).state_dict()}
    assert isinstance(seen.loss, Seen)
    assert len(seen.loss.boxes) == 2
    assert all(0 <= float(b.min()) <= float(b.max()) <= 1 for b in seen.loss.boxes if len(b))


@pytest.mark.parametrize("kind", KINDS)
def test_the_callback_door_on_an_unmodified_module(kind: str, scenes: BoxScenes) -> None:
    teacher, module = small(kind, teacher=True), Plain(small(kind))
    hint = Term(losses.FitNet(), student="backbone[:]", teacher="backbone[:]")
    run = trainer(Distillation(teacher, {"hint": hint}, student="model"), limit_val_batches=0)
    run.fit(module, scenes.train_dataloader())
    assert float(run.callback_metrics["train/hint"]) > 0
    assert len(hint.projector.levels) == 4
    assert not any(m._forward_hooks for m in (*module.modules(), *teacher.modules()))


def test_both_doors_train_alike(scenes: BoxScenes) -> None:
    def terms() -> dict[str, Term]:
        return {"hint": Term(losses.FitNet(), student="backbone[:]", teacher="backbone[:]")}

    states = []
    for door in ("callback", "module"):
        student, teacher = small("FCOS"), small("FCOS", teacher=True)
        L.seed_everything(0)
        if door == "callback":
            run = trainer(Distillation(teacher, terms(), student="model"), limit_val_batches=0)
            run.fit(Plain(student), scenes.train_dataloader())
        else:
            sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.001)  # noqa: E731
            module = DistillationModule(Detection(CLASSES), student, teacher, terms(), optimizer=sgd)
            trainer(limit_val_batches=0).fit(module, datamodule=scenes)
        states.append(student.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_the_teacher_runs_no_further_than_its_features(scenes: BoxScenes) -> None:
    teacher, ran = small("FCOS", teacher=True), []
    teacher.head.register_forward_hook(lambda *_: ran.append(1))
    terms = {"hint": Term(losses.FitNet(), student="features", teacher="features")}
    module = DistillationModule(Detection(CLASSES), small("FCOS"), teacher, terms)
    run = trainer(limit_val_batches=0)
    run.fit(module, datamodule=scenes)
    assert run.global_step == 3
    assert len(ran) == 1  # only the rehearsal, in which it is learned how often each layer is called


def test_a_pruned_student_looks_where_its_teacher_does_inside_of_boxes(batch: Batch) -> None:
    student, teacher = small("FCOS"), small("FCOS", teacher=True)
    term = Term(losses.AT(), student="features", teacher="features")
    distiller = Distiller({"look": term}, teacher, Detection(CLASSES).teacher_input, Detection(CLASSES).knowledge)
    distiller.attach(student.train())
    targets = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in batch[1]]
    with distiller.watch() as calls:
        student(batch[0], targets)
    mask = torch.zeros(3, 64, 64, dtype=torch.bool)
    mask[:, 16:48, :32] = True
    value = distiller(calls, mask=mask)["look"]
    value.backward()
    assert not list(distiller.parameters())
    assert sum(p.grad.abs().sum() for p in student.backbone.parameters()) > 0
    levels = calls[0].teacher["backbone"][0]
    for name, level in levels.items():  # what it looks at elsewhere is not asked
        levels[name] = level + 5.0 * (torch.arange(level.shape[-1]) >= level.shape[-1] // 2)
    assert torch.equal(distiller(calls, mask=mask)["look"], value)
    assert distiller(calls)["look"] != value


def test_the_student_loads_into_torchvisions_own_class() -> None:
    assert type(detector()) is torchvision_detection.FCOS


# The command line


SHORT = [
    *("--data.init_args.train_size", "8", "--data.init_args.val_size", "2", "--data.init_args.test_size", "3"),
    *("--data.init_args.batch_size", "2", "--model.teacher.init_args.model.init_args.backbone", "mobilenet_v3_small"),
    *("--trainer.max_epochs", "1", "--teacher_fit.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
]


@pytest.mark.slow
def test_compare_predict_and_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = ["--config", "scenes_detection_cwd", *SHORT]
    assert main(["compare", *config, "--seeds", "0", "--traceback"]) == 0
    assert {"mAP", "mAP50"} <= set(
        Path("comparisons/scenes_detection_cwd/runs.csv").read_text().split("\n")[0].split(",")
    )
    assert Path("comparisons/scenes_detection_cwd/examples.png").is_file()
    assert main(["fit", *config, "--traceback"]) == 0
    (checkpoint,) = map(str, Path("runs").rglob("*.ckpt"))
    assert main(["predict", *config, "--ckpt_path", checkpoint, "--output", "found.pt", "--traceback"]) == 0
    batches = torch.load("found.pt", weights_only=True)
    assert [len(batch) for batch in batches] == [2, 1]
    assert set(batches[0][0]) == {"boxes", "scores", "labels"}
    for kind in ("onnx", "state_dict"):
        assert main(["export", checkpoint, "--format", kind, "--traceback"]) == 0
    student = detectors.FCOS(
        num_classes=4, backbone="mobilenet_v3_small", channels=32, strides=[4, 8], convs=1, min_size=64, max_size=64
    )
    student.load_state_dict(torch.load(Path(checkpoint).with_suffix(".state_dict.pt"), weights_only=True))
    file = Path(checkpoint).with_suffix(".onnx")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    image = torch.rand(3, 80, 72)  # of another size than it was traced with
    with torch.no_grad():
        (expected,) = student.eval()([image])
    boxes, scores, labels = (torch.from_numpy(each) for each in session.run(None, {"image": image.numpy()}))
    torch.testing.assert_close(scores.sort().values, expected["scores"].sort().values)
    assert boxes.shape == expected["boxes"].shape
    assert labels.shape == expected["labels"].shape
    assert main(["export", checkpoint, "--format", "torchscript"]) == 2
    assert "use onnx" in capsys.readouterr().err


SCRIPT = """
import sys
from pathlib import Path
import lightning as L
import torch
from lightning_kd import DistillationModule, Term, losses
from lightning_kd.models import detectors
from lightning_kd.data.box_scenes import BoxScenes
from lightning_kd.tasks import Detection

if __name__ == "__main__":
    kind, out, resume = sys.argv[1:4]
    L.seed_everything(0)
    size = dict(num_classes=10, backbone="mobilenet_v3_small", convs=1, min_size=64, max_size=64)
    student, teacher = detectors.FCOS(channels=32, **size), detectors.FCOS(channels=64, **size)
    terms = {name: Term(loss, student="features", teacher="features") for name, loss in
             {"cwd": losses.CWD(), "fgd": losses.FGD()}.items()}
    module = DistillationModule(Detection(10), student, teacher, terms)
    data = BoxScenes(train_size=8, val_size=3, test_size=2, batch_size=2)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    keep = L.pytorch.callbacks.ModelCheckpoint(Path(out).parent / "kept", filename="{epoch}", save_top_k=-1)
    devices = dict(strategy="ddp", devices=2) if kind == "ddp" else dict(devices=1)
    run = L.Trainer(accelerator="cpu", max_epochs=2, callbacks=[keep], **devices, **quiet)
    run.fit(module, datamodule=data, ckpt_path=None if resume == "-" else resume, weights_only=True)
    if run.is_global_zero:
        logged = {key: float(value) for key, value in run.callback_metrics.items()}
        torch.save({"state": module.state_dict(), "logged": logged}, out)
"""


@pytest.mark.slow
def test_resume_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    for kind, resume in (("whole", "-"), ("resumed", str(tmp_path / "kept" / "epoch=0.ckpt"))):
        monkeypatch.setattr(sys, "argv", ["train.py", kind, str(tmp_path / f"{kind}.pt"), resume])
        runpy.run_path(str(tmp_path / "train.py"), run_name="__main__")
    whole, resumed = (torch.load(tmp_path / f"{kind}.pt", weights_only=True) for kind in ("whole", "resumed"))
    torch.testing.assert_close(resumed["state"], whole["state"], rtol=0, atol=0)
    assert str(resumed["logged"]) == str(whole["logged"])  # text, as no number equals itself where none is found


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    run_script(SCRIPT, "ddp", str(tmp_path / "ddp.pt"), "-", folder=tmp_path, ranks=2)
    logged = torch.load(tmp_path / "ddp.pt", weights_only=True)["logged"]
    assert all(logged[f"train/{name}"] > 0 for name in ("loss", "task", "cwd", "fgd"))
    assert 0 <= logged["val/mAP"] <= 1
