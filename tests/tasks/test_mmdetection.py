"""Every family that people distil, small: mmdet's own losses and predictions are the oracle."""

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning_kd.tasks import MMDetection
from lightning_kd.tasks.mmdetection import ToTeacher
from processes import run_script
from project import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_kd import Distillation, DistillationModule, Term, losses
from lightning_kd.data.box_images import collate
from lightning_kd.data.box_scenes import BoxScenes
from lightning_kd.models.mmdet import MMDetModel
from lightning_kd.projectors import PerLevel, TeacherLayers

CLASSES = 10
RESNET = {
    "backbone.depth": 18,
    "backbone.base_channels": 8,
    "backbone.stem_channels": 8,
    "neck.in_channels": [8, 16, 32, 64],
    "neck.out_channels": 32,
}
HEAD = {"bbox_head.in_channels": 32, "bbox_head.feat_channels": 32, "bbox_head.stacked_convs": 1}
CSP = {"backbone.widen_factor": 0.125, "neck.in_channels": [32, 64, 128], "neck.out_channels": 32}
RPN = {"rpn_head.in_channels": 32, "rpn_head.feat_channels": 32}
ROI = {
    "roi_head.bbox_roi_extractor.out_channels": 32,
    "roi_head.bbox_head.in_channels": 32,
    "roi_head.bbox_head.fc_out_channels": 64,
}
QUERIES = {"num_queries": 10, "test_cfg.max_per_img": 10, "encoder.num_layers": 1, "decoder.num_layers": 1}
STEM = {"backbone.base_channels": 8, "backbone.stem_channels": 8}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "RetinaNet": ("retinanet/retinanet_r18_fpn_1x_coco", RESNET | HEAD),
    "GFL": ("gfl/gfl_r50_fpn_1x_coco", RESNET | HEAD),
    "FCOS": ("fcos/fcos_r50-caffe_fpn_gn-head_1x_coco", RESNET | HEAD),
    "FasterRCNN": ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco", RESNET | RPN | ROI),
    "YOLOX": ("yolox/yolox_tiny_8xb8-300e_coco", CSP | HEAD),
    "RTMDet": ("rtmdet/rtmdet_tiny_8xb32-300e_coco", CSP | HEAD),
    "DETR": ("detr/detr_r18_8xb2-500e_coco", STEM | {"neck.in_channels": [64]} | QUERIES),
    "TOOD": ("tood/tood_r50_fpn_1x_coco", RESNET | HEAD | {"bbox_head.stacked_convs": 2}),
}
KINDS = tuple(SMALL)

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def detector(kind: str = "RetinaNet", **given: Any) -> nn.Module:
    torch.manual_seed(0)
    config, overrides = SMALL[kind]
    return MMDetModel(config, **({"num_classes": CLASSES, "overrides": overrides} | given))


@pytest.fixture(scope="module")
def scenes() -> BoxScenes:
    data = BoxScenes(train_size=4, val_size=2, test_size=4, batch_size=2)
    data.setup("fit")
    return data


@pytest.fixture
def batch(scenes: BoxScenes) -> Batch:
    return collate([scenes.splits["train"][i] for i in range(3)])


@pytest.fixture
def task() -> MMDetection:
    return MMDetection(CLASSES)


def trainer(*callbacks: L.Callback, **given: Any) -> L.Trainer:
    return L.Trainer(callbacks=list(callbacks), **QUIET | given)


def know_something_else(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.001)


class Plain(L.LightningModule):
    """A module as people of mmdet write it, that knows nothing of distillation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        from mmdet.structures import DetDataSample  # noqa: PLC0415
        from mmengine.structures import InstanceData  # noqa: PLC0415

        images, targets = batch
        samples = []
        for image, target in zip(images, targets, strict=True):
            sample = DetDataSample(metainfo={"img_shape": tuple(image.shape[1:]), "scale_factor": (1.0, 1.0)})
            sample.gt_instances = InstanceData(bboxes=target["boxes"], labels=target["labels"])
            samples.append(sample)
        inputs = [(image[[2, 1, 0]] * 255) for image in images]
        data = self.model.data_preprocessor({"inputs": inputs, "data_samples": samples}, training=True)
        return self.model.parse_losses(self.model(**data, mode="loss"))[0]

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


# What the task is


@pytest.mark.parametrize("classes", [0, -1])
def test_there_is_a_class(classes: int) -> None:
    with pytest.raises(ValueError, match="count the classes without the background"):
        MMDetection(classes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_mmdets_own_and_reaches_every_parameter(kind: str, batch: Batch, task: MMDetection) -> None:
    model = detector(kind).train()
    L.seed_everything(1, verbose=False)  # some heads sample, some drop out
    loss = task.loss(task(model, batch), batch)
    assert loss is not None
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if kind != "YOLOX":  # whose configuration draws sizes at random in training: that is the data's matter here
        module = Plain(detector(kind).train())
        L.seed_everything(1, verbose=False)
        torch.testing.assert_close(loss, module.training_step(batch, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_in_evaluation_there_are_boxes_and_no_loss(kind: str, batch: Batch, task: MMDetection) -> None:
    model = detector(kind).eval()
    with torch.no_grad():
        output = task(model, batch)
    assert task.loss(output, batch) is None
    found = task.predict(output)
    assert len(found) == len(batch[0])
    for each in found:
        assert each["boxes"].shape == (len(each["scores"]), 4)
        assert ((each["labels"] >= 0) & (each["labels"] < CLASSES)).all()
    metrics = task.metrics()
    task.update(metrics, output, batch)
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert all(0 <= found[name] < 0.1 for name in ("mAP", "mAP50", "mAP75"))


@pytest.mark.slow
def test_a_detector_that_learned_a_scene_finds_it(scenes: BoxScenes, task: MMDetection) -> None:
    """Colours, scales and places agree between learning, finding and measuring."""
    batch = collate([scenes.splits["train"][0]])
    model = detector("RetinaNet")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = task.loss(task(model.train(), batch), batch)
        assert loss is not None
        loss.backward()
        optimizer.step()
    metrics = task.metrics()
    with torch.no_grad():
        task.update(metrics, task(model.eval(), batch), batch)
    assert float(metrics.compute()["mAP50"]) > 0.8


def test_pixels_are_bytes_or_fractions(batch: Batch, task: MMDetection) -> None:
    images, targets = batch
    seen = []
    model = detector().eval()
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for given in (images, [(image * 255).round().to(torch.uint8) for image in images]):
        with torch.no_grad():
            task(model, (given, targets))
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-4)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    torch.testing.assert_close(seen[0][0], (images[0] * 255 - mean) / std)  # RGB, as this configuration wants them
    with pytest.raises(ValueError, match=r"RGB images \(3, H, W\).*got \(1, 64, 64\)"):
        task(model, ([image[:1] for image in images], targets))


def test_other_models_are_refused(batch: Batch, task: MMDetection) -> None:
    with pytest.raises(ValueError, match=r"MMDetection calls detectors of mmdet, and the model is a Linear"):
        task(nn.Linear(3, 3), batch)
    with pytest.raises(ValueError, match=r"RetinaNet has 10 classes and MMDetection\(num_classes=3\)"):
        MMDetection(3)(detector(), batch)
    with pytest.raises(ValueError, match=r"FasterRCNN has 10 classes"):
        MMDetection(3)(detector("FasterRCNN"), batch)


# Targets


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS", "FasterRCNN", "YOLOX", "DETR"])
def test_images_without_boxes_teach_that_there_is_nothing(kind: str, batch: Batch, task: MMDetection) -> None:
    model = detector(kind).train()
    images, _ = batch
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    loss = task.loss(task(model, (images, [empty] * 3)), batch)
    assert loss is not None
    assert 0 < loss.item() < 100
    loss.backward()


def test_boxes_without_an_area_change_nothing(batch: Batch, task: MMDetection) -> None:
    images, targets = batch
    flat = torch.tensor([[5.0, 5.0, 5.0, 9.0], [7.0, 7.0, 7.0, 7.0]])
    more = [
        {"boxes": torch.cat((t["boxes"], flat)), "labels": torch.cat((t["labels"], torch.tensor([0, 1])))}
        for t in targets
    ]
    model = detector().train()
    assert torch.equal(task.loss(task(model, (images, more)), batch), task.loss(task(model, batch), batch))


def test_ignored_boxes_are_mmdets_ignored_instances(batch: Batch, task: MMDetection) -> None:
    images, targets = batch
    seen: list[Any] = []
    model = detector().train()
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.extend(kwargs["data_samples"]), with_kwargs=True)
    marked = [{**t, "ignore": torch.arange(len(t["labels"])) == 0} for t in targets]
    task(model, (images, marked))
    for sample, target in zip(seen, targets, strict=True):
        assert torch.equal(sample.ignored_instances.bboxes, target["boxes"][:1])
        assert torch.equal(sample.gt_instances.bboxes, target["boxes"][1:])


def test_a_class_that_the_task_does_not_know_is_named(batch: Batch, task: MMDetection) -> None:
    images, targets = batch
    wrong = [{**t, "labels": t["labels"] + CLASSES} for t in targets]
    with pytest.raises(ValueError, match="A target has the classes"):
        task(detector().train(), (images, wrong))


def test_boxes_are_fractions_of_the_padded_batch(task: MMDetection) -> None:
    images = [torch.rand(3, 50, 90), torch.rand(3, 70, 40)]
    box = {"boxes": torch.tensor([[10.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    model, seen = detector().train(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2:]))
    task(model, (images, [box, box]))
    assert seen == [(96, 96)]  # multiples of 32 around 70 and 90
    for found in task.labels()["boxes"]((images, [box, box])):
        torch.testing.assert_close(found * 96, box["boxes"])


def test_what_is_found_is_drawn(batch: Batch) -> None:
    task, model = MMDetection(CLASSES, class_names=list("abcdefghij")), detector("RTMDet").eval()
    images, targets = batch
    pictures = [image.mul(255).to(torch.uint8) for image in images]
    truth = task.draw(pictures, batch)
    assert set(truth.legend) == {"abcdefghij"[k] for target in targets for k in target["labels"]}
    with torch.no_grad():
        found = task.predict_batch(task(model, batch), batch)
    assert len(task.draw(pictures, batch, found).images) == len(images)


# The teacher


@pytest.mark.parametrize(
    ("student", "teacher"), [("RetinaNet", "FCOS"), ("FCOS", "YOLOX"), ("YOLOX", "GFL"), ("RTMDet", "RetinaNet")]
)
def test_the_teacher_sees_the_pixels_as_it_is_used_to(student: str, teacher: str) -> None:
    pair = {name: detector(name) for name in {student, teacher}}
    images = [(255 * torch.rand(3, *size)).round() for size in ((64, 32), (48, 64))]
    from mmdet.structures import DetDataSample  # noqa: PLC0415

    def prepared(name: str) -> dict[str, Any]:
        samples = [DetDataSample(metainfo={"img_shape": tuple(image.shape[1:])}) for image in images]
        return pair[name].data_preprocessor({"inputs": list(images), "data_samples": samples})

    own, wanted = prepared(student), prepared(teacher)
    got = ToTeacher(pair[student], pair[teacher])(**own)
    assert not torch.allclose(own["inputs"], wanted["inputs"])
    torch.testing.assert_close(got["inputs"], wanted["inputs"], rtol=1e-5, atol=1e-3)


def test_a_student_that_is_not_called_as_mmdet_calls_it_is_told() -> None:
    model = detector("RetinaNet")
    with pytest.raises(TypeError, match=r"as mmdet calls it, .* Got inputs of type list"):
        ToTeacher(model, model)([torch.rand(3, 32, 32)], [{}])  # type: ignore[arg-type]


def test_the_teacher_gets_no_labels_and_runs_as_far_as_its_deepest_tap(scenes: BoxScenes) -> None:
    student, teacher = detector("RetinaNet"), detector("GFL")
    calls: dict[str, int] = {"neck": 0, "bbox_head": 0, "student": 0}
    for name in ("neck", "bbox_head"):
        getattr(teacher, name).register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    student.neck.register_forward_hook(lambda *_: calls.update(student=calls["student"] + 1))

    def unlabelled(module: nn.Module, args: Any, kwargs: Any) -> None:
        assert kwargs["mode"] == "predict"
        assert all("gt_instances" not in sample for sample in kwargs["data_samples"])

    teacher.register_forward_pre_hook(unlabelled, with_kwargs=True)
    terms = {"hint": Term(losses.FitNet(), student="features", teacher="features")}
    run = trainer(limit_val_batches=0, max_epochs=2)
    run.fit(DistillationModule(MMDetection(CLASSES), student, teacher, terms), datamodule=scenes)
    assert run.global_step == 4
    # One more of each: a rehearsal. It alone runs the teacher to its end, to learn how often its parts are called.
    assert calls == {"neck": 4 + 1, "bbox_head": 1, "student": 4 + 1}


# The doors


@pytest.mark.parametrize(
    ("student", "teacher", "paths"),
    [
        *((kind, kind, {"hint": "features"}) for kind in KINDS if kind != "GFL"),
        ("GFL", "RetinaNet", {"hint": "features[:3]", "stride_8": "features.0"}),  # differing families
        ("RTMDet", "YOLOX", {"hint": "features", "kd": "cls"}),
        ("GFL", "FCOS", {"kd": "cls"}),
        ("GFL", "GFL", {"ld": "reg"}),
        ("FasterRCNN", "FasterRCNN", {"kd": "objectness", "reg": "proposals"}),
    ],
)
def test_the_module_door(student: str, teacher: str, paths: dict[str, str], scenes: BoxScenes) -> None:
    kinds = {"kd": lambda: losses.KD(activation="sigmoid"), "reg": nn.MSELoss, "ld": losses.LD}
    model, expert = detector(student), detector(teacher)
    know_something_else(expert)
    before = {key: value.clone() for key, value in expert.state_dict().items()}
    terms = {name: Term(kinds.get(name, losses.FitNet)(), student=path, teacher=path) for name, path in paths.items()}
    module = DistillationModule(MMDetection(CLASSES), model, expert, terms, optimizer=sgd)
    run = trainer(limit_val_batches=1)
    run.fit(module, datamodule=scenes)
    logged = {key: float(value) for key, value in run.callback_metrics.items()}
    assert {"train/task", "val/mAP", "val/mAP50", "val/mAP75"} <= logged.keys()
    assert all(logged[f"train/{name}"] > 0 for name in paths)
    assert all(torch.equal(value, before[key]) for key, value in expert.state_dict().items())
    assert set(module.state_dict()) == {f"student.{key}" for key in detector(student).state_dict()}


# The features of a head, and the teacher's layers behind them: all that CrossKD has to be told.
CROSSED = {
    "RetinaNet": {"cls": ("cls_convs", "retina_cls"), "reg": ("reg_convs", "retina_reg")},
    "GFL": {"cls": ("cls_convs", "gfl_cls"), "reg": ("reg_convs", "gfl_reg")},
}


@pytest.mark.parametrize("kind", CROSSED)
def test_the_students_features_go_through_the_teachers_head(kind: str, scenes: BoxScenes, tmp_path: Path) -> None:
    head = SMALL[kind][1] | {"bbox_head.stacked_convs": 2}
    student, teacher = (detector(kind, overrides=head) for _ in range(2))
    know_something_else(teacher)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    terms = {
        name: Term(
            losses.QFL() if name == "cls" else losses.LD() if kind == "GFL" else nn.L1Loss(),
            student=f"bbox_head.{convs}.0",
            teacher=f"bbox_head.{last}",
            projector=TeacherLayers([f"bbox_head.{convs}[1:]", f"bbox_head.{last}"]),
        )
        for name, (convs, last) in CROSSED[kind].items()
    }
    module = DistillationModule(MMDetection(CLASSES), student, teacher, terms, optimizer=sgd)
    run = trainer(limit_val_batches=0, limit_train_batches=1)
    run.fit(module, datamodule=scenes)
    assert all(float(run.callback_metrics[f"train/{name}"]) > 0 for name in terms)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    run.save_checkpoint(tmp_path / "it.ckpt")
    saved = torch.load(tmp_path / "it.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"student.{key}" for key in student.state_dict()}
    assert not any(callback.get("learned") for callback in saved["callbacks"].values())


def test_regions_of_the_first_step_are_those_of_the_padded_batch() -> None:
    images = [torch.rand(3, 100, 120) for _ in range(2)]  # padded to 128 x 128
    target = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0]]), "labels": torch.tensor([1])}
    student, teacher = (detector("GFL") for _ in range(2))
    know_something_else(teacher)
    terms = {"ld": Term(losses.LD(), student="reg", teacher="reg")}
    module = DistillationModule(MMDetection(CLASSES), student, teacher, terms, optimizer=sgd)
    run = trainer(limit_val_batches=0)
    data = DataLoader([(images, [target, target])], batch_size=None)
    run.fit(module, data, data)
    assert float(run.callback_metrics["train/ld"]) > 0


def test_the_whole_head_of_a_teacher_ends_in_the_scale_of_each_level(scenes: BoxScenes) -> None:
    student, teacher = detector("GFL"), detector("GFL")
    know_something_else(teacher)
    for i, scale in enumerate(teacher.bbox_head.scales):
        scale.scale.data.fill_(0.5 + i)
    paths = [["bbox_head.reg_convs[:]", "bbox_head.gfl_reg", f"bbox_head.scales.{i}"] for i in range(5)]
    term = Term(losses.GIoU(), student="features", teacher="reg", projector=PerLevel(map(TeacherLayers, paths)))
    module = DistillationModule(MMDetection(CLASSES), student, teacher, {"box": term}, optimizer=sgd)
    run = trainer(limit_val_batches=0, limit_train_batches=1)
    run.fit(module, datamodule=scenes)
    assert 0 < float(run.callback_metrics["train/box"]) < 10
    term.meet(teacher)
    with torch.no_grad():
        levels = teacher.extract_feat(torch.rand(2, 3, 64, 64))
        torch.testing.assert_close(term.projector(levels), list(teacher.bbox_head(levels)[1]), rtol=0, atol=0)


@pytest.mark.parametrize(("student", "teacher"), [("RetinaNet", "RetinaNet"), ("FCOS", "GFL")])
def test_the_callback_door_on_an_unmodified_module(student: str, teacher: str, scenes: BoxScenes) -> None:
    module, expert = Plain(detector(student)), detector(teacher)
    terms = {
        "hint": Term(losses.FitNet(), student="neck[:]", teacher="neck[:]"),
        "kd": Term(losses.KD(activation="sigmoid"), student="bbox_head[0][:]", teacher="bbox_head[0][:]"),
    }
    know_something_else(expert)
    # Called as the student, where both are used to the same pixels.
    ask = None if student == teacher else ToTeacher(module.model, expert)
    run = trainer(Distillation(expert, terms, student="model", teacher_input=ask), limit_val_batches=0)
    run.fit(module, scenes.train_dataloader())
    assert all(float(run.callback_metrics[f"train/{name}"]) > 0 for name in terms)
    for each in (*module.modules(), *expert.modules()):
        assert not each._forward_hooks


def test_both_doors_train_alike(scenes: BoxScenes) -> None:
    states = []
    for door in ("callback", "module"):
        student, teacher = detector("RetinaNet"), detector("GFL")
        L.seed_everything(0, verbose=False)
        path = {"callback": "neck[:]", "module": "features"}[door]
        terms = {"hint": Term(losses.FitNet(), student=path, teacher=path)}
        if door == "callback":
            callback = Distillation(teacher, terms, student="model", teacher_input=ToTeacher(student, teacher))
            trainer(callback, limit_val_batches=0).fit(Plain(student), scenes.train_dataloader())
        else:
            module = DistillationModule(MMDetection(CLASSES), student, teacher, terms, optimizer=sgd)
            trainer(limit_val_batches=0).fit(module, datamodule=scenes)
        states.append(student.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_a_head_that_changes_with_the_epochs_hears_of_them(scenes: BoxScenes) -> None:
    student = detector("TOOD")
    student.bbox_head.initial_epoch = 1
    ways: list[str] = []
    for name in ("initial_assigner", "alignment_assigner"):
        assigner = getattr(student.bbox_head, name)

        def noted(*args: Any, name: str = name, assign: Any = assigner.assign, **kwargs: Any) -> Any:
            ways.append(name)
            return assign(*args, **kwargs)

        assigner.assign = noted
    module = DistillationModule(MMDetection(CLASSES), student, optimizer=sgd)
    trainer(max_epochs=2, limit_train_batches=1, limit_val_batches=0).fit(module, datamodule=scenes)
    assert ways == ["initial_assigner"] * 2 + ["alignment_assigner"] * 2


def test_detectors_copy_and_pickle(batch: Batch, task: MMDetection) -> None:
    model = detector("RTMDet").eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            a, b = (task.predict(task(m, batch)) for m in (model, other))
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    again = pickle.loads(pickle.dumps(task))
    assert again.num_classes == CLASSES


SCRIPT = """
import sys
import torch

if __name__ == "__main__":
    folder, strategy, devices = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.path.insert(0, folder)
    import test_mmdetection as cases
    data = cases.BoxScenes(train_size=4, val_size=2, test_size=2, batch_size=4 // devices)
    data.setup("fit")
    student, teacher = cases.detector("GFL"), cases.detector("RetinaNet")
    student.backbone.norm_eval = True  # statistics of half a batch would be others
    student.train()
    terms = {"hint": cases.Term(cases.losses.FitNet(), student="features", teacher="features")}
    module = cases.DistillationModule(cases.MMDetection(10), student, teacher, terms, torch.optim.SGD, task_weight=0.0)
    loader = torch.utils.data.DataLoader(data.splits["train"], 4 // devices, collate_fn=cases.collate)
    run = cases.trainer(strategy=strategy, devices=devices, limit_val_batches=0, max_epochs=2)
    run.fit(module, loader, loader)
    if run.is_global_zero:
        logged = {key: float(value) for key, value in run.callback_metrics.items()}
        torch.save({"state": module.state_dict(), "logged": logged}, f"{strategy}.pt")
"""


def train_in_processes(folder: Path, strategy: str, devices: int) -> dict[str, Any]:
    arguments = str(Path(__file__).parent), strategy, str(devices)
    said = run_script(SCRIPT, *arguments, folder=folder, ranks=None if devices == 1 else devices)
    assert "unused" not in said
    result: dict[str, Any] = torch.load(folder / f"{strategy}.pt", weights_only=True)
    return result


@pytest.mark.slow
def test_the_terms_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """Without mmdet's own losses: their averages, over the positives of a process, are mmdet's matter."""
    one, two = train_in_processes(tmp_path, "auto", 1), train_in_processes(tmp_path, "ddp", 2)
    assert all(two["logged"][f"train/{name}"] > 0 for name in ("task", "hint"))
    torch.testing.assert_close(two["state"], one["state"])
