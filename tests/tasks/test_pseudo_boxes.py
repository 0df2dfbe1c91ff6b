"""Boxes that a teacher finds are the student's targets: torchvision's own losses on them are the oracle."""

import copy
from typing import Any

import lightning as L
import pytest
import torch
from lightning_kd.tasks import Detection, PseudoBoxes
from project import QUIET
from torch import Tensor, nn
from torchvision.transforms import v2

from lightning_kd import DistillationModule, Term, losses, teachers
from lightning_kd.data.box_images import collate
from lightning_kd.data.box_scenes import BoxScenes
from lightning_kd.models import detectors

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def detector(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    size = {"min_size": 64, "max_size": 64, "score_thresh": 0.0}
    return detectors.FCOS(num_classes=10, backbone="mobilenet_v3_small", channels=32, convs=1, **size)


@pytest.fixture(scope="module")
def scenes() -> BoxScenes:
    data = BoxScenes(train_size=4, val_size=2, test_size=2, batch_size=4, labelled=0.5)
    data.setup("fit")
    return data


@pytest.fixture
def batch(scenes: BoxScenes) -> Batch:
    return collate([scenes.splits["train"][i] for i in range(4)])


def found(*scores: float) -> dict[str, Tensor]:
    n = len(scores)
    boxes = torch.tensor([[2.0, 4.0, 12.0, 24.0], [30.0, 30.0, 60.0, 62.0]])[:n]
    return {"boxes": boxes, "scores": torch.tensor(scores), "labels": torch.arange(1, n + 1)}


def test_half_of_the_scenes_have_a_target(batch: Batch) -> None:
    assert [bool(target) for target in batch[1]] == [True, True, False, False]
    with pytest.raises(ValueError, match=r"is unlabelled: tasks\.PseudoBoxes learns from such"):
        Detection(10)(detector().train(), batch)
    with pytest.raises(ValueError, match=r"labelled: expected a fraction"):
        BoxScenes(labelled=0.0)


def test_what_passes_the_score_becomes_the_target() -> None:
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    task = PseudoBoxes(10, score=0.5, strong=[])
    views, targets = task.student_input(images, None, teacher=[found(0.9, 0.2), found(0.4)])
    assert all(torch.equal(view, image) for view, image in zip(views, images, strict=True))
    assert targets[0]["boxes"].tolist() == [[2.0, 4.0, 12.0, 24.0]]
    assert targets[0]["labels"].tolist() == [1]
    assert targets[1]["boxes"].shape == (0, 4)
    given = [{"boxes": torch.zeros(0, 4)}]
    assert task.student_input(images[:1], given, teacher=[found(0.9)]) == (images[:1], given)


def test_boxes_follow_a_view_that_moves_pixels() -> None:
    image = torch.rand(3, 64, 64)
    task = PseudoBoxes(10, score=0.5, strong=[v2.RandomHorizontalFlip(p=1.0)])
    (view,), (target,) = task.student_input([image], None, teacher=[found(0.9, 0.9)])
    assert torch.equal(view, image.flip(-1))
    assert target["boxes"].tolist() == [[52.0, 4.0, 62.0, 24.0], [4.0, 30.0, 34.0, 62.0]]
    strong, _ = PseudoBoxes(10).student_input([image], None, teacher=[found()])
    assert strong[0].shape == image.shape


class Answer(nn.Module):
    """A student in whose place ``student_input`` is called as the engine does it."""

    def __init__(self, model: nn.Module, task: PseudoBoxes, answer: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.model, self.task, self.answer = model, task, answer

    def forward(self, images: Any, targets: Any) -> Any:
        return self.model(*self.task.student_input(images, targets, teacher=self.answer))


@pytest.mark.parametrize("zeroed", [("bbox_regression",), ()])
def test_the_loss_is_torchvisions_on_labels_and_on_pseudo_boxes(batch: Batch, zeroed: tuple[str, ...]) -> None:
    images, targets = batch
    model = detector().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    task = PseudoBoxes(10, score=0.5, weight=3.0, strong=[], zeroed=zeroed)
    task.meet(model, model)
    answer = [found(0.9, 0.8), found(0.1)]
    loss = task.loss(task(Answer(model, task, answer), batch), batch)
    assert loss is not None
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    known = model(images[:2], [{**t, "labels": t["labels"] + 1} for t in targets[:2]])
    pseudo = model(images[2:], [{key: answer[0][key] for key in ("boxes", "labels")}, nothing])
    expected = sum(value for name, value in pseudo.items() if name not in zeroed)
    torch.testing.assert_close(loss, sum(known.values()) + 3.0 * expected)
    assert task.values()["pseudo_boxes"] == 1.0
    torch.testing.assert_close(task.values()["pseudo"], expected.detach())


def test_where_nothing_passes_nothing_is_learned_and_it_is_told(batch: Batch) -> None:
    model = detector().train()
    task = PseudoBoxes(10, score=0.95)
    task.meet(model, model)
    unlabelled = batch[0][2:], batch[1][2:]
    loss = task.loss(task(Answer(model, task, [found(0.9), found(0.1)]), unlabelled), unlabelled)
    assert loss is not None
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    assert dict(task.values()) == {"pseudo": torch.tensor(0.0), "pseudo_boxes": 0.0}


def test_without_a_teacher_unlabelled_images_are_left_out(batch: Batch) -> None:
    task, known = PseudoBoxes(10), (batch[0][:2], batch[1][:2])
    loss = task.loss(task(detector().train(), batch), batch)
    plain = Detection(10)
    torch.testing.assert_close(loss, plain.loss(plain(detector().train(), known), known))
    unlabelled = batch[0][2:], batch[1][2:]
    assert task.loss(task(detector().train(), unlabelled), unlabelled) == 0
    assert not task.values()


def test_arguments_that_make_no_sense_are_refused() -> None:
    for wrong in ({"score": 0.0}, {"score": 1.0}, {"weight": -1.0}, {"burn_in": -1}):
        with pytest.raises(ValueError, match=r"score is in \(0, 1\), weight and burn_in are not negative"):
            PseudoBoxes(10, **wrong)


def test_a_burn_in_without_labels_teaches_nothing(batch: Batch) -> None:
    model, unlabelled = detector().train(), (batch[0][2:], batch[1][2:])
    task = PseudoBoxes(10, burn_in=1)
    task.meet(model, model)
    loss = task.loss(task(Answer(model, task, [found(0.9), found(0.9)]), unlabelled), unlabelled)
    assert loss == 0
    assert not task.values()
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["semi-supervised", "source-free"])
def test_the_module_door(kind: str, scenes: BoxScenes) -> None:
    samples = [scenes.splits["train"][i] for i in range(4)]
    if kind == "source-free":
        samples = [(image, {}) for image, _ in samples]
    loader = torch.utils.data.DataLoader(samples, 4, collate_fn=collate)
    teacher = teachers.EMA(decay=0.9) if kind == "semi-supervised" else teachers.Frozen(detector(1))
    terms = {"scores": Term(losses.QFL(), student="cls", teacher="cls", weight=0.0)}
    student = detector()
    before = copy.deepcopy(student.state_dict())
    burn_in = int(kind == "semi-supervised")
    module = DistillationModule(PseudoBoxes(10, score=0.02, burn_in=burn_in), student, teacher, terms)
    run = L.Trainer(**QUIET | {"max_epochs": 1 + burn_in, "limit_val_batches": 0})
    seen: list[tuple[int, bool]] = []

    def note(_: nn.Module, args: Any) -> None:
        if len(args) == 2:  # a copy of the student, its teacher, has this hook, too
            seen.append((run.current_epoch, args[1] is None))

    student.register_forward_pre_hook(note)
    run.fit(module, loader, loader)
    logged = {key: float(value) for key, value in run.callback_metrics.items()}
    assert {"train/task", "train/scores", "train/pseudo", "train/pseudo_boxes"} <= logged.keys()
    assert logged["train/pseudo"] > 0
    assert logged["train/pseudo_boxes"] >= 1
    assert seen == {"semi-supervised": [(0, False), (1, False), (1, True)], "source-free": [(0, True)]}[kind]
    assert any(not torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert set(module.state_dict()) == {f"student.{key}" for key in before}
