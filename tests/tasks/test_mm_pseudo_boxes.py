"""Boxes that a teacher finds are the targets of mmdet's detectors: their own losses on them are the oracle."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_kd.tasks import MMDetection, MMPseudoBoxes
from processes import run_script
from project import QUIET
from torch import Tensor, nn
from torchvision.transforms import v2

from lightning_kd import DistillationModule, Term, losses, teachers
from lightning_kd.data.box_images import collate
from lightning_kd.data.box_scenes import BoxScenes
from lightning_kd.models.mmdet import MMDetModel

RESNET = {
    "backbone": {"depth": 18, "base_channels": 8, "stem_channels": 8},
    "neck": {"in_channels": [8, 16, 32, 64], "out_channels": 32, "num_outs": 3},
    "bbox_head": {"in_channels": 32, "feat_channels": 32, "stacked_convs": 1},
    "bbox_head.anchor_generator.strides": [8, 16, 32],  # the last is of 2x2, enough for a norm over one image
    "test_cfg.score_thr": 0.0,
    "test_cfg.max_per_img": 5,
}
KINDS = {"GFL": "gfl/gfl_r50_fpn_1x_coco", "RetinaNet": "retinanet/retinanet_r18_fpn_1x_coco"}

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def detector(kind: str = "GFL", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MMDetModel(KINDS[kind], num_classes=10, overrides=RESNET)


def scenes() -> list[Any]:
    """Labelled and unlabelled ones in turn."""
    data = BoxScenes(train_size=4, val_size=2, test_size=2)
    data.setup("fit")
    return [(image, target if i % 2 == 0 else {}) for i, (image, target) in enumerate(data.splits["train"])]


@pytest.fixture(scope="module")
def batch() -> Batch:
    return collate(scenes())


def trainer(**given: Any) -> L.Trainer:
    return L.Trainer(**QUIET | {"limit_val_batches": 0} | given)


def self_training(task: MMPseudoBoxes, student: nn.Module, teacher: nn.Module | None = None) -> DistillationModule:
    terms = {"scores": Term(losses.QFL(), student="cls", teacher="cls", weight=0.0)}
    return DistillationModule(task, student, teacher or teachers.EMA(decay=0.9), terms)


class Answered(nn.Module):
    """A student in whose place ``student_input`` is called as the engine does it."""

    def __init__(self, model: nn.Module, task: MMPseudoBoxes, answer: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.model, self.task, self.answer = model, task, answer
        self.data_preprocessor, self.extract_feat = model.data_preprocessor, model.extract_feat
        self.seen: list[Tensor] = []

    def forward(self, inputs: Tensor, data_samples: Any, mode: str) -> Any:
        from mmdet.structures import DetDataSample  # noqa: PLC0415
        from mmengine.structures import InstanceData  # noqa: PLC0415

        found = []
        for each in self.answer:
            sample = DetDataSample()
            sample.pred_instances = InstanceData(bboxes=each["boxes"], scores=each["scores"], labels=each["labels"])
            found.append(sample)
        given = self.task.student_input(inputs, data_samples, mode, teacher=found)
        self.seen.append(given["inputs"])
        return self.model(**given)


def found(*scores: float) -> dict[str, Tensor]:
    boxes = torch.tensor([[2.0, 4.0, 12.0, 24.0], [30.0, 30.0, 60.0, 62.0]])[: len(scores)]
    return {"boxes": boxes, "scores": torch.tensor(scores), "labels": torch.arange(len(scores))}


@pytest.mark.parametrize(("kind", "zeroed"), [("GFL", ("loss_bbox", "loss_dfl")), ("RetinaNet", ())])
def test_the_loss_is_mmdets_on_labels_and_on_pseudo_boxes(kind: str, zeroed: tuple[str, ...], batch: Batch) -> None:
    images, targets = batch
    model = detector(kind).train()
    task = MMPseudoBoxes(10, score=0.5, weight=3.0, strong=[], zeroed=zeroed)
    task.meet(model, model)
    answered = Answered(model, task, [found(0.9, 0.8), found(0.9, 0.1)])
    loss = task.loss(task(answered, batch), batch)
    assert loss is not None
    plain = MMDetection(10)
    known = plain.loss(plain(model, (images[::2], targets[::2])), batch)
    surely = [{key: found(*scores)[key] for key in ("boxes", "labels")} for scores in ((0.9, 0.8), (0.9,))]
    by_name = plain(model, (images[1::2], surely))
    pseudo = plain.loss({name: value for name, value in by_name.items() if name not in zeroed}, batch)
    torch.testing.assert_close(loss, known + 3.0 * pseudo)
    assert task.values()["pseudo_boxes"] == 1.5
    torch.testing.assert_close(task.values()["pseudo"], pseudo.detach())


def test_the_strong_view_is_the_students_and_its_boxes_follow(batch: Batch) -> None:
    images, _ = batch
    model, task = detector().train(), MMPseudoBoxes(10, score=0.5, strong=[v2.RandomHorizontalFlip(p=1.0)])
    task.meet(model, model)
    answered = Answered(model, task, [found(0.9)])
    samples: list[Any] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: samples.extend(kwargs["data_samples"]), with_kwargs=True)
    for image in (images[1], (images[1] * 255).round().to(torch.uint8)):  # bytes are seen as fractions are
        task(answered, ([image], [{}]))
    assert samples[0].gt_instances.bboxes.tolist() == [[52.0, 4.0, 62.0, 24.0]]
    some = {"boxes": torch.ones(1, 4), "labels": torch.ones(1).long()}
    own = MMDetection(10)._preprocessed(model, ([images[1].flip(-1)], [some]))
    torch.testing.assert_close(answered.seen[0], own["inputs"])
    torch.testing.assert_close(answered.seen[1], own["inputs"], atol=0.02, rtol=0)  # half a step of 255, over std


def test_where_nothing_passes_nothing_is_learned_and_it_is_told(batch: Batch) -> None:
    model, unlabelled = detector().train(), (batch[0][1::2], batch[1][1::2])
    for task in (MMPseudoBoxes(10, score=0.95), MMPseudoBoxes(10, score=0.5, burn_in=1)):
        task.meet(model, model)
        model.zero_grad()
        loss = task.loss(task(Answered(model, task, [found(0.9), found(0.8)]), unlabelled), unlabelled)
        assert loss == 0
        loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)
        assert dict(task.values()) == ({} if task.training_on.burn_in else {"pseudo": 0.0, "pseudo_boxes": 0.0})


def test_without_a_teacher_unlabelled_images_are_left_out(batch: Batch) -> None:
    task, known = MMPseudoBoxes(10), (batch[0][::2], batch[1][::2])
    plain, model = MMDetection(10), detector().train()
    torch.testing.assert_close(task.loss(task(model, batch), batch), plain.loss(plain(model, known), known))
    unlabelled = batch[0][1::2], batch[1][1::2]
    loss = task.loss(task(model, unlabelled), unlabelled)
    assert loss == 0
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not task.values()


def test_arguments_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"score is in \(0, 1\), weight and burn_in are not negative"):
        MMPseudoBoxes(10, score=1.5)


@pytest.mark.parametrize("kind", ["semi-supervised", "source-free"])
def test_the_module_door(kind: str) -> None:
    samples = scenes() if kind == "semi-supervised" else [(image, {}) for image, _ in scenes()]
    loader = torch.utils.data.DataLoader(samples, 4, collate_fn=collate)
    student = detector()
    before = copy.deepcopy(student.state_dict())
    burn_in = int(kind == "semi-supervised")
    teacher = None if burn_in else teachers.Frozen(detector(seed=1))
    module = self_training(MMPseudoBoxes(10, score=0.001, burn_in=burn_in), student, teacher)
    run = trainer(max_epochs=1 + burn_in)
    seen: list[tuple[int, int]] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        if kwargs["mode"] == "loss":  # a copy of the student, its teacher, has this hook, too
            seen.append((run.current_epoch, len(kwargs["data_samples"])))

    student.register_forward_pre_hook(note, with_kwargs=True)
    run.fit(module, loader, loader)
    logged = {key: float(value) for key, value in run.callback_metrics.items()}
    assert {"train/task", "train/scores", "train/pseudo", "train/pseudo_boxes"} <= logged.keys()
    assert logged["train/pseudo"] > 0
    assert logged["train/pseudo_boxes"] >= 1
    assert seen == {"semi-supervised": [(0, 2), (1, 2), (1, 2)], "source-free": [(0, 4)]}[kind]
    assert any(not torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert set(module.state_dict()) == {f"student.{key}" for key in before}


@pytest.mark.slow
# Lightning's own, of a run that is resumed into another folder: what it forgets is which checkpoints were best.
@pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning")
def test_resume_is_exact(tmp_path: Path) -> None:
    """Views are drawn at random, and the moving average is the teacher: both go on where they were."""
    states, logged = [], []
    for folder in ("whole", "rest"):
        L.seed_everything(0, verbose=False)
        module = self_training(MMPseudoBoxes(10, score=0.001), detector())
        loader = torch.utils.data.DataLoader(scenes(), 2, shuffle=True, collate_fn=collate)
        saving = ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        run = trainer(max_epochs=2, enable_checkpointing=True, callbacks=[saving])
        resumed = tmp_path / "whole" / "epoch=0.ckpt" if folder == "rest" else None
        run.fit(module, loader, loader, ckpt_path=resumed, weights_only=True if resumed else None)
        states.append(module.state_dict())
        logged.append(run.callback_metrics)
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    torch.testing.assert_close(logged[1], logged[0], rtol=0, atol=0)
    assert logged[0]["train/pseudo"] > 0


SCRIPT = """
import os, sys
import torch

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import test_mm_pseudo_boxes as cases
    module = cases.self_training(cases.MMPseudoBoxes(10, score=0.001), cases.detector())
    samples = cases.scenes()[int(os.environ["LOCAL_RANK"]) :: 2]  # all labelled here, none there
    loader = torch.utils.data.DataLoader(samples, 1, collate_fn=cases.collate)
    run = cases.trainer(strategy="ddp", devices=2, max_epochs=2, use_distributed_sampler=False)
    run.fit(module, loader, loader)
    values = {name: float(value) for name, value in module.task.values().items()}
    learned = dict(module.named_parameters())
    torch.save({"learned": learned, "values": values}, f"{run.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_of_which_one_has_all_labels(tmp_path: Path) -> None:
    """mmdet averages over all processes, so each has to call its detector as often as the others."""
    run_script(SCRIPT, str(Path(__file__).parent), folder=tmp_path, ranks=2)
    labelled, unlabelled = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(labelled["learned"], unlabelled["learned"], rtol=0, atol=0)
    assert labelled["values"] == {"pseudo": 0.0, "pseudo_boxes": 0.0}
    assert unlabelled["values"]["pseudo"] > 0
    assert unlabelled["values"]["pseudo_boxes"] >= 1
