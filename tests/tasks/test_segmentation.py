from collections.abc import Callable
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from lightning import LightningModule, Trainer
from lightning_kd.callbacks import Distillation
from lightning_kd.tasks import Segmentation
from sklearn.metrics import f1_score, jaccard_score
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from lightning_kd import DistillationModule, Term, losses
from lightning_kd.data import MaskScenes

CLASSES = 4
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def masks(n: int = 3, size: int = 16, classes: int = CLASSES) -> Tensor:
    return torch.randint(0, classes, (n, size, size))


# Construction


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"num_classes": 1}, "num_classes=2"),
        ({"num_classes": 2, "mode": "binary"}, "binary has one output"),
        ({"num_classes": 3, "mode": "panoptic"}, "mode is"),
        ({"num_classes": 3, "class_names": ["a"]}, "expected 3 names"),
        ({"num_classes": 3, "ignore_index": 255, "criterion": nn.CrossEntropyLoss()}, "give both the same"),
        ({"num_classes": 3, "ignore_index": 255, "criterion": nn.BCEWithLogitsLoss()}, "has no ignore_index"),
        ({"num_classes": 3, "class_weights": [1.0, 2.0]}, "expected 3 positive numbers"),
        ({"num_classes": 2, "class_weights": [0.0, 1.0]}, "expected 2 positive numbers"),
        ({"num_classes": 1, "mode": "binary", "class_weights": [1.0]}, "default loss with mode='multiclass'"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Segmentation(**wrong)


def test_classes_are_a_number() -> None:
    with pytest.raises(TypeError, match="num_classes is a whole number, got None"):
        Segmentation(None)  # type: ignore[arg-type]


# The loss


def test_ignored_and_unlabelled_pixels_have_no_part_in_the_loss() -> None:
    task, logits, target = Segmentation(CLASSES, ignore_index=255), torch.randn(3, CLASSES, 16, 16), masks()
    target[0, :8], target[1] = 255, -100
    known = (target >= 0) & (target < CLASSES)
    expected = F.cross_entropy(logits.movedim(1, -1)[known], target[known])
    torch.testing.assert_close(task.loss(logits, (None, target)), expected)


def test_the_loss_of_nothing_is_zero() -> None:
    target = torch.full((2, 8, 8), -100)
    for task in (Segmentation(CLASSES), Segmentation(1, mode="binary")):
        assert float(task.loss(torch.randn(2, task.num_classes, 8, 8), (None, target))) == 0.0


@pytest.mark.parametrize("ignored", [None, 255])
def test_classes_weigh_as_in_torch(ignored: int | None) -> None:
    weights = [0.2, 1.0, 3.0, 0.5]
    task, logits, target = (
        Segmentation(CLASSES, ignore_index=ignored, class_weights=weights),
        torch.randn(3, CLASSES, 16, 16),
        masks(),
    )
    target[0, :8], target[1] = -100 if ignored is None else ignored, -100
    known = (target >= 0) & (target < CLASSES)
    expected = F.cross_entropy(logits.movedim(1, -1)[known], target[known], torch.tensor(weights))
    torch.testing.assert_close(task.loss(logits, (None, target)), expected)
    assert float(task.loss(logits, (None, torch.full_like(target, -100)))) == 0.0
    assert not task.state_dict()


def test_torchs_own_default_of_what_is_ignored_is_none_to_the_task() -> None:
    task, target, logits = (
        Segmentation(CLASSES, criterion=nn.CrossEntropyLoss()),
        masks(),
        torch.randn(3, CLASSES, 16, 16),
    )
    torch.testing.assert_close(task.loss(logits, (None, target)), F.cross_entropy(logits, target))


def test_logits_of_any_stride_meet_the_labels() -> None:
    task, target, logits = Segmentation(CLASSES), masks(), torch.randn(3, CLASSES, 4, 4)
    expected = F.cross_entropy(F.interpolate(logits, size=(16, 16), mode="bilinear"), target)
    torch.testing.assert_close(task.loss(logits, (None, target)), expected)


def test_a_float_for_every_label_is_binary_cross_entropy() -> None:
    target = torch.randint(0, 2, (3, CLASSES, 8, 8))
    logits = torch.randn(3, CLASSES, 8, 8)
    expected = F.binary_cross_entropy_with_logits(logits, target.float())
    torch.testing.assert_close(Segmentation(CLASSES, mode="multilabel").loss(logits, (None, target)), expected)
    first = F.binary_cross_entropy_with_logits(logits[:, 0], target[:, 0].float())
    binary = Segmentation(1, mode="binary")
    torch.testing.assert_close(binary.loss(logits[:, :1], (None, target[:, 0])), first)
    torch.testing.assert_close(binary.loss(logits[:, :1], (None, target[:, :1])), first)


@pytest.mark.parametrize("mode", ["multiclass", "binary", "multilabel"])
def test_dice_and_criteria_of_smp(mode: str) -> None:
    classes = 1 if mode == "binary" else CLASSES
    target = masks() if mode == "multiclass" else torch.randint(0, 2, (3, classes, 16, 16))
    logits = torch.randn(3, classes, 16, 16)
    dice = smp.losses.DiceLoss(mode)(logits, target)
    plain = Segmentation(classes, mode=mode).loss(logits, (None, target))  # type: ignore[arg-type]
    both = Segmentation(classes, mode=mode, dice=0.5).loss(logits, (None, target))  # type: ignore[arg-type]
    torch.testing.assert_close(both, plain + 0.5 * dice)
    given = Segmentation(classes, mode=mode, criterion=smp.losses.DiceLoss(mode))  # type: ignore[arg-type]
    torch.testing.assert_close(given.loss(logits, (None, target)), dice)


def test_auxiliary_outputs_have_their_weight() -> None:
    task, target = Segmentation(CLASSES, aux_weight=0.3), masks()
    out, aux = torch.randn(3, CLASSES, 16, 16), torch.randn(3, CLASSES, 4, 4)
    expected = task.loss(out, (None, target)) + 0.3 * task.loss(aux, (None, target))
    torch.testing.assert_close(task.loss({"out": out, "aux": aux}, (None, target)), expected)


# What comes in


@pytest.mark.parametrize("output", [torch.zeros(2, 3, 8, 8), torch.zeros(2, CLASSES), "text", {"mask": 1}])
def test_what_is_no_logits_is_refused(output: Any) -> None:
    with pytest.raises(ValueError, match="same number of classes"):
        Segmentation(CLASSES).loss(output, (None, masks(2, 8)))


@pytest.mark.parametrize(
    ("mode", "labels"),
    [
        ("multiclass", torch.zeros(2, 1, 8, 8)),
        ("multiclass", torch.zeros(2)),
        ("multiclass", [1, 2]),
        ("multilabel", torch.zeros(2, 8, 8)),
        ("multiclass", torch.zeros(2, 8, 8)),
    ],
)
def test_labels_of_another_kind_are_refused(mode: Any, labels: Any) -> None:
    with pytest.raises(ValueError, match=r"wants labels|class numbers"):
        Segmentation(CLASSES, mode=mode).target((None, labels))


@pytest.mark.parametrize("mode", ["binary", "multilabel"])
def test_masks_that_were_scaled_are_no_background(mode: Any) -> None:
    task = Segmentation(1, mode=mode, ignore_index=255)
    whole = torch.randint(0, 2, (2, 1, 8, 8)).float()
    whole[0, 0, 0] = 255
    assert torch.equal(task.target((None, whole)).flatten(), whole.long().flatten())
    for wrong in (whole / 255, 0.99 * whole, whole.where(whole < 2, torch.nan)):
        with pytest.raises(ValueError, match=r"zeros and ones; got torch\.float32 with (0\.|nan)"):
            task.target((None, wrong))


@pytest.mark.parametrize("wrong", [{"ignore_index": "255"}, {"dice": -1.0}, {"aux_weight": "1"}], ids=str)
def test_options_out_of_range_are_told(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} is "):
        Segmentation(CLASSES, **wrong)


@pytest.mark.parametrize("wrong", [CLASSES, -1, 255])
def test_labels_that_are_no_class_are_told(wrong: int) -> None:
    target = masks()
    target[0, 3, 4] = wrong
    with pytest.raises(ValueError, match=rf"\[{wrong}\]"):
        Segmentation(CLASSES).loss(torch.zeros(3, CLASSES, 16, 16), (None, target))


def test_the_mask_is_of_what_counts() -> None:
    target = masks()
    target[0, :4], target[1] = 255, -100
    task = Segmentation(CLASSES, ignore_index=255)
    counted = task.labels()["mask"]((None, target))
    assert not counted[0, :4].any()
    assert counted[0, 4:].all()
    assert counted[1].all()  # unlabelled pixels are what terms can still use
    assert Segmentation(CLASSES).labels()["mask"]((None, target)) is None
    one_off = torch.zeros(2, CLASSES, 8, 8, dtype=torch.long)
    one_off[0, 1, 2, 3] = 255
    counted = Segmentation(CLASSES, mode="multilabel", ignore_index=255).mask((None, one_off))
    assert counted is not None
    assert (~counted).nonzero().tolist() == [[0, 2, 3]]


# Metrics


def measured(task: Segmentation, outputs: Tensor, target: Tensor) -> dict[str, float]:
    metrics = task.metrics()
    for part in (slice(0, 2), slice(2, None)):
        task.update(metrics, outputs[part], (None, target[part]))
    return {name: float(value) for name, value in metrics.compute().items()}


def test_metrics_are_scikit_learns() -> None:
    logits, target = torch.randn(5, CLASSES, 16, 16), masks(5)
    logits += 2 * F.one_hot(target, CLASSES).movedim(-1, 1)
    target[0, :3], target[1, 4:] = 255, -100
    known = (target >= 0) & (target < CLASSES)
    true, said = target[known], logits.argmax(1)[known]
    found = measured(Segmentation(CLASSES, ignore_index=255, class_names=["a", "b", "c", "d"]), logits, target)
    each = jaccard_score(true, said, average=None)
    assert found["miou"] == pytest.approx(each.mean())
    assert [found[f"iou/{name}"] for name in "abcd"] == pytest.approx(each.tolist())
    assert found["dice"] == pytest.approx(f1_score(true, said, average="macro"))
    assert found["pixel_accuracy"] == pytest.approx(float((true == said).float().mean()))
    assert 0 < found["boundary_f1"] <= 1


def test_binary_and_multilabel_metrics_are_scikit_learns() -> None:
    logits = torch.randn(4, 2, 16, 16)
    target = (logits + torch.randn_like(logits) > 0).long()
    said = (logits > 0).long()
    found = measured(Segmentation(2, mode="multilabel"), logits, target)
    flat, guess = target.movedim(1, -1).reshape(-1, 2), said.movedim(1, -1).reshape(-1, 2)
    assert found["miou"] == pytest.approx(jaccard_score(flat, guess, average="macro"))
    assert found["dice"] == pytest.approx(f1_score(flat, guess, average="macro"))
    found = measured(Segmentation(1, mode="binary"), logits[:, :1], target[:, 0])
    assert found["iou"] == pytest.approx(jaccard_score(flat[:, 0], guess[:, 0]))
    assert found["dice"] == pytest.approx(f1_score(flat[:, 0], guess[:, 0]))


@pytest.mark.parametrize(("mode", "classes"), [("multiclass", 3), ("binary", 1), ("multilabel", 2)])
def test_agreement_meets_at_the_finer_resolution(mode: Any, classes: int) -> None:
    task = Segmentation(classes, mode=mode)
    fine = torch.randn(2, classes, 8, 8)
    metric = task.agreement()
    task.update_agreement(metric, fine, {"out": fine})
    assert float(metric.compute()) == 1.0
    metric = task.agreement()
    task.update_agreement(metric, torch.randn(2, classes, 4, 4), fine)
    assert 0 < float(metric.compute()) < 1


def test_predictions_are_masks_of_the_images_size() -> None:
    task, images = Segmentation(CLASSES), torch.rand(2, 3, 16, 16)
    logits = torch.randn(2, CLASSES, 4, 4)
    assert task.predict(logits).shape == (2, 4, 4)
    found = task.predict_batch(logits, (images, masks(2)))
    assert found.dtype == torch.uint8
    assert torch.equal(found, F.interpolate(logits, size=(16, 16), mode="bilinear").argmax(1).to(torch.uint8))


# Real models, through both doors


def segformer() -> nn.Module:
    config = SegformerConfig(
        num_labels=11,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        output_hidden_states=True,
    )
    return SegformerForSemanticSegmentation(config)


def from_torchvision(name: str, **options: Any) -> nn.Module:
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, weights_backbone=None, num_classes=11, **options
    )
    return model


def from_smp(architecture: str, encoder: str) -> nn.Module:
    model: nn.Module = getattr(smp, architecture)(encoder, encoder_weights=None, classes=11)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "smp Unet": (lambda: from_smp("Unet", "resnet18"), "features.3", "features.3"),
    "smp FPN": (lambda: from_smp("FPN", "tu-mobilenetv3_small_050"), "features.4", "features.4"),
    "smp DeepLabV3Plus": (lambda: from_smp("DeepLabV3Plus", "mobilenet_v2"), "decoder", "decoder"),
    "smp Segformer": (lambda: from_smp("Segformer", "mit_b0"), "features.2", "features.2"),
    "torchvision LRASPP": (lambda: from_torchvision("lraspp_mobilenet_v3_large"), "features.1", "features.5"),
    "torchvision DeepLabV3": (
        lambda: from_torchvision("deeplabv3_mobilenet_v3_large", aux_loss=True),
        "features.1",
        "features.4",
    ),
    "transformers Segformer": (segformer, "features.2", "features.4"),
}


@pytest.fixture(scope="module")
def scenes() -> MaskScenes:
    data = MaskScenes(batch_size=4, train_size=8, val_size=4, test_size=4)
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return from_smp("FPN", "resnet18")


@pytest.mark.parametrize("name", MODELS)
def test_real_models_are_distilled_with_kd_and_features(name: str, scenes: MaskScenes, teacher: nn.Module) -> None:
    make, feature, of_teacher = MODELS[name]
    student = make()
    module = DistillationModule(
        Segmentation(11),
        student,
        teacher,
        {
            "kd": Term(losses.KD(), student="logits", teacher="logits"),
            "hint": Term(losses.FitNet(), student=feature, teacher=of_teacher, weight=0.1),
        },
    )
    trainer = Trainer(max_steps=2, **QUIET, limit_val_batches=1)
    trainer.fit(module, datamodule=scenes)
    logged = trainer.callback_metrics
    assert all(float(logged[f"train/{key}"]) > 0 for key in ("task", "kd", "hint"))
    (found,) = trainer.test(module, datamodule=scenes, verbose=False)
    assert {"test/miou", "test/boundary_f1", "test/agreement", "test/iou/3"} <= found.keys()
    predicted = trainer.predict(module, datamodule=scenes)
    assert predicted is not None
    assert predicted[0].shape == (4, 64, 64)


class Plain(LightningModule):
    """What a user has: it never heard of distillation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_an_unmodified_module_is_distilled_by_the_callback(scenes: MaskScenes, teacher: nn.Module) -> None:
    task = Segmentation(11)
    callback = Distillation(
        teacher,
        {
            "kd": Term(losses.KD(), weight=0.5),
            "hint": Term(losses.AT(), student="encoder[3]", teacher="encoder[3]"),
        },
        student="model",
        labels={"mask": task.mask},
    )
    trainer = Trainer(max_steps=2, callbacks=[callback], **QUIET)
    trainer.fit(Plain(from_smp("Unet", "tu-mobilenetv3_small_050")), datamodule=scenes)
    assert float(trainer.callback_metrics["train/kd"]) > 0
    assert float(trainer.callback_metrics["train/hint"]) > 0
