"""The task of finding anomalies, and its way through the module."""

import copy
import pickle
from types import SimpleNamespace

import lightning as pl
import pytest
import torch
from lightning_kd.tasks import AnomalyDetection
from project import QUIET
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.models import squeezenet1_1

from lightning_kd import DistillationModule, Term, losses
from lightning_kd.anomalies import StudentTeacher
from lightning_kd.data import Textures
from lightning_kd.models import AnomalyNet
from lightning_kd.teachers import Frozen

LAYERS = ["level1", "level2", "level3"]


def _batch(anomalous: bool = True) -> tuple[Tensor, Tensor]:
    masks = torch.zeros(4, 32, 32, dtype=torch.bool)
    if anomalous:
        masks[1, 4:9, 4:9] = True
    return torch.randn(4, 3, 32, 32), masks


def _module() -> DistillationModule:
    return DistillationModule(
        task=AnomalyDetection(difference=LAYERS),
        student=AnomalyNet(width=4, level_channels=(8, 16, 32)),
        teacher=AnomalyNet(width=8),
        terms={f"stfpm{i}": Term(losses.STFPM(), student=name, teacher=name) for i, name in enumerate(LAYERS)},
        optimizer=torch.optim.AdamW,
    )


@pytest.mark.parametrize(
    "given",
    [
        lambda masks: masks,
        lambda masks: masks.unsqueeze(1).float(),
        lambda masks: {"mask": masks},
        lambda masks: {"mask": masks, "label": masks.flatten(1).any(1)},
    ],
)
def test_masks_come_in_several_ways(given):
    images, masks = _batch()
    mask, label = AnomalyDetection().target((images, given(masks)))
    assert torch.equal(mask, masks)
    assert label.tolist() == [False, True, False, False]


def test_batches_of_anomalib_are_read():
    images, masks = _batch()
    batch = SimpleNamespace(image=images, gt_mask=masks, gt_label=masks.flatten(1).any(1))
    task = AnomalyDetection()
    assert torch.equal(task.inputs(batch), images)
    assert torch.equal(task.target(batch).mask, masks)
    assert task.index(batch) is None
    batch.gt_mask, batch.gt_label = None, torch.zeros(4, dtype=torch.bool)
    assert not task.target(batch).mask.any()  # of normal images a label will do


def test_a_missing_or_wrong_mask_is_told():
    images, masks = _batch()
    task = AnomalyDetection()
    for wrong in (masks[:, :8], {"label": torch.ones(4)}, None):
        with pytest.raises(ValueError, match=r"wants masks \(4, 32, 32\) of the images' size"):
            task.target((images, wrong))


@pytest.mark.parametrize("label", [torch.zeros(4, 1), torch.zeros(3), [0, 0, 0, 0]], ids=["column", "three", "list"])
def test_labels_are_one_for_each_image(label):
    images, masks = _batch()
    with pytest.raises(ValueError, match=r"wants labels \(4,\), one for each image, True where it is anomalous; got"):
        AnomalyDetection().target((images, {"mask": masks, "label": label}))


def test_an_anomaly_that_nobody_marked_is_not_learned():
    images, masks = _batch(anomalous=False)
    batch = images, {"mask": masks, "label": torch.tensor([False, True, False, True])}
    with pytest.raises(ValueError, match="2 anomalous images in a training batch, and no mask says where"):
        AnomalyDetection().loss(torch.zeros(4, 1, 32, 32, requires_grad=True), batch)
    AnomalyDetection().eval().target(batch)  # in evaluation it counts as an anomalous image without a pixel


def test_the_loss_is_the_cross_entropy_of_the_masks():
    images, masks = _batch()
    logits = torch.randn(4, 1, 32, 32)
    expected = F.binary_cross_entropy(logits.sigmoid().squeeze(1), masks.float())
    torch.testing.assert_close(AnomalyDetection().loss(logits, (images, masks)), expected)
    with pytest.raises(ValueError, match=r"wants maps \(4, 32, 32\) of the images' size"):
        AnomalyDetection().loss(logits[..., ::2], (images, masks))


def test_terms_leave_anomalous_pixels_out():
    images, masks = _batch()
    assert torch.equal(AnomalyDetection(LAYERS).labels()["mask"]((images, masks)), ~masks)
    assert "mask" not in AnomalyDetection().labels()  # what a teacher's map says of them is to be learned


def test_features_without_a_teacher_teach_nothing():
    with pytest.raises(ValueError, match="no teacher to learn from"):
        AnomalyDetection().loss(torch.randn(4, 64, 4, 4, requires_grad=True), _batch())
    with pytest.raises(ValueError, match="wants an anomaly map in evaluation"):
        AnomalyDetection().predict(torch.randn(4, 64, 4, 4))


@pytest.mark.parametrize("difference", ["layer1", []])
def test_layers_are_a_list(difference):
    with pytest.raises(ValueError, match="difference names layers"):
        AnomalyDetection(difference=difference)
    with pytest.raises(ValueError, match="combine is"):
        AnomalyDetection(["layer1"], combine="mean")


@pytest.mark.parametrize("smoothing", [-1.0, float("nan"), "4"])
def test_smoothing_is_a_number_of_pixels(smoothing):
    with pytest.raises(ValueError, match="smoothing is a standard deviation in pixels, 0 for none; got"):
        AnomalyDetection(difference=LAYERS, smoothing=smoothing)


def test_the_difference_is_what_is_predicted():
    module = _module().eval().requires_grad_(False)
    images, masks = _batch()
    prediction = module.predict_step((images, masks), 0)
    detector = StudentTeacher(module.student, module.teacher.model, LAYERS).eval()
    torch.testing.assert_close(prediction, detector(images))
    deployed = module.task.deployed(module.student).eval()
    torch.testing.assert_close(deployed(images), prediction)
    assert not any("teacher" in key for key in module.state_dict())
    torch.testing.assert_close(copy.deepcopy(module).predict_step((images, masks), 0), prediction)
    torch.testing.assert_close(pickle.loads(pickle.dumps(module)).predict_step((images, masks), 0), prediction)


@pytest.mark.parametrize("of_the_module", [True, False])
def test_what_the_teacher_is_called_with_is_followed_in_evaluation(of_the_module):
    """A teacher of grey images: without its input they would not fit."""
    teacher = AnomalyNet(width=8, in_channels=1)
    grey = {"teacher_input" if of_the_module else "input": lambda images: images.mean(1, keepdim=True)}
    module = DistillationModule(
        task=AnomalyDetection(difference=LAYERS),
        student=AnomalyNet(width=4, level_channels=(8, 16, 32)),
        teacher=Frozen(teacher, **({} if of_the_module else grey), precision=None if of_the_module else "bf16-true"),
        terms={name: Term(losses.STFPM(), student=name, teacher=name) for name in LAYERS},
        **(grey if of_the_module else {}),
    )
    images, masks = _batch()
    found = module.eval().predict_step((images, masks), 0)
    detector = StudentTeacher(module.student, teacher.float(), LAYERS, teacher_input=lambda x: x.mean(1, keepdim=True))
    torch.testing.assert_close(found, detector.eval()(images), rtol=0.1, atol=0.02)
    assert found.anomaly_map.shape == (4, 32, 32)
    assert not any("taught" in key for key in module.state_dict())


def test_any_network_of_features_is_a_student_and_a_teacher():
    """As most papers have it: two of one kind, nothing but normal images."""
    layers = ["features.4", "features.7"]
    module = DistillationModule(
        task=AnomalyDetection(difference=layers),
        student=squeezenet1_1(),
        teacher=squeezenet1_1(),
        terms={f"stfpm{i}": Term(losses.STFPM(), student=name, teacher=name) for i, name in enumerate(layers)},
    )
    images, masks = _batch(anomalous=False)
    loader = DataLoader([*zip(images, masks, strict=True)], batch_size=4)
    before = copy.deepcopy(module.teacher.model.state_dict())
    trainer = pl.Trainer(**QUIET, max_steps=1, limit_val_batches=0)
    trainer.fit(module, loader, loader)
    assert all(trainer.callback_metrics[f"train/stfpm{i}"] > 0 for i in range(2))
    assert trainer.callback_metrics["train/task"] == 0
    assert all(torch.equal(value, before[key]) for key, value in module.teacher.model.state_dict().items())


def test_pictures_have_a_heat_map_and_the_outline_of_the_truth():
    module = _module().eval().requires_grad_(False)
    batch = _batch()
    looks = [torch.full((3, 32, 32), 100, dtype=torch.uint8)] * 4
    drawn = module.task.draw(looks, batch, module.predict_step(batch, 0))
    assert [picture.shape for picture in drawn.images] == [(3, 320, 320)] * 4
    assert (drawn.images[1] == 255).all(0).any()
    assert not (drawn.images[0] == 255).all(0).any()
    assert drawn.captions[0].startswith("score")
    assert len(module.task.draw(looks, batch).images) == 4


@pytest.mark.slow
def test_a_student_learns_to_differ_from_its_teacher_where_something_is_not_normal():
    data = Textures(train_size=96, test_size=32, batch_size=16)
    how = {**QUIET, "limit_val_batches": 0}
    teacher = DistillationModule(task=AnomalyDetection(), student=AnomalyNet(width=8))
    pl.Trainer(**how | {"max_epochs": 3}).fit(teacher, datamodule=data)
    module = DistillationModule(
        task=AnomalyDetection(difference=LAYERS),
        student=AnomalyNet(width=4, level_channels=(8, 16, 32)),
        teacher=teacher.student,
        terms={name: Term(losses.STFPM(), student=name, teacher=name) for name in LAYERS},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3),
    )
    trainer = pl.Trainer(**how | {"max_epochs": 4})
    (before,) = trainer.test(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    (after,) = trainer.test(module, datamodule=data, verbose=False)
    assert after["test/image_auroc"] > max(0.7, before["test/image_auroc"])
    assert after["test/pixel_auroc"] > max(0.7, before["test/pixel_auroc"])
