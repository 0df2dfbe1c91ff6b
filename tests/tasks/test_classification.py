from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from jsonargparse import ArgumentParser
from lightning_kd.tasks import Classification
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn

from lightning_kd import Distiller, Term, losses

CLASSES = 4


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Equation 3 of arXiv 1706.04599, sample by sample: the bins are (0, 1/M], (1/M, 2/M], ..."""
    error = 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(error)


def measured(task: Classification, outputs: Tensor, targets: Tensor) -> dict[str, float]:
    metrics = task.metrics()
    for part in range(0, len(outputs), 7):  # batch by batch, with a short one at the end
        task.update(metrics, outputs[part : part + 7], (None, targets[part : part + 7]))
    return {name: float(value) for name, value in metrics.compute().items()}


# Construction


@pytest.mark.parametrize(("classes", "multilabel"), [(1, False), (0, False), (0, True), (-3, True)])
def test_a_choice_needs_two_classes(classes: int, multilabel: bool) -> None:
    with pytest.raises(ValueError, match="multilabel=True"):
        Classification(classes, multilabel=multilabel)


@pytest.mark.parametrize(("smoothing", "multilabel"), [(1.0, False), (-0.1, False), (0.1, True)])
def test_label_smoothing_has_a_range(smoothing: float, multilabel: bool) -> None:
    with pytest.raises(ValueError, match="label_smoothing is in"):
        Classification(3, multilabel=multilabel, label_smoothing=smoothing)


# The loss


def test_the_loss_is_the_log_loss() -> None:
    logits, target = torch.randn(20, CLASSES, dtype=torch.float64), torch.randint(0, CLASSES, (20,))
    expected = log_loss(target, logits.softmax(1), labels=range(CLASSES))
    assert float(Classification(CLASSES).loss(logits, (None, target))) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_indices_are_integers_of_any_size(dtype: torch.dtype) -> None:
    task, logits, target = Classification(CLASSES), torch.randn(20, CLASSES), torch.randint(0, CLASSES, (20,))
    assert torch.equal(task.loss(logits, (None, target.to(dtype))), task.loss(logits, (None, target)))


def test_soft_targets_generalise_indices() -> None:
    task, logits, target = Classification(CLASSES), torch.randn(20, CLASSES), torch.randint(0, CLASSES, (20,))
    other = target.flip(0)
    one_hot = nn.functional.one_hot(target, CLASSES).float()
    torch.testing.assert_close(task.loss(logits, (None, one_hot)), task.loss(logits, (None, target)))
    mixed = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    by_hand = 0.7 * task.loss(logits, (None, target)) + 0.3 * task.loss(logits, (None, other))
    torch.testing.assert_close(task.loss(logits, (None, mixed)), by_hand)
    assert measured(task, logits, one_hot) == measured(task, logits, target)
    assert measured(task, logits, mixed) == measured(task, logits, target)


def test_label_smoothing_mixes_with_the_uniform_distribution() -> None:
    logits, target = torch.randn(20, CLASSES), torch.randint(0, CLASSES, (20,))
    smooth = 0.8 * nn.functional.one_hot(target, CLASSES) + 0.2 / CLASSES
    torch.testing.assert_close(
        Classification(CLASSES, label_smoothing=0.2).loss(logits, (None, target)),
        Classification(CLASSES).loss(logits, (None, smooth)),
    )


@pytest.mark.parametrize("labels", [1, CLASSES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_the_loss_of_labels_is_the_log_loss_of_each(labels: int, dtype: torch.dtype) -> None:
    logits, target = torch.randn(20, labels, dtype=torch.float64), torch.randint(0, 2, (20, labels))
    expected = log_loss(target.flatten(), logits.sigmoid().flatten())
    task = Classification(labels, multilabel=True)
    assert float(task.loss(logits, (None, target.to(dtype)))) == pytest.approx(expected)


@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(5, dtype=torch.int64),
        torch.zeros(4, 1, dtype=torch.int64),
        torch.zeros(4, CLASSES, dtype=torch.int64),
        torch.tensor(3),
        torch.zeros(4),
        torch.zeros(4, 1),
        torch.zeros(4, CLASSES + 1),
    ],
    ids=lambda t: f"{t.dtype}{tuple(t.shape)}",
)
def test_targets_of_another_shape_are_refused_with_it(target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(4,\), or probabilities, floats \(4, 4\); got") as error:
        Classification(CLASSES).loss(torch.zeros(4, CLASSES), (None, target))
    assert str(tuple(target.shape)) in str(error.value)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 5), (3, 4)])
def test_labels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(4, 4\) like the logits; got \("):
        Classification(CLASSES, multilabel=True).loss(torch.zeros(4, CLASSES), (None, torch.zeros(shape)))


@pytest.mark.parametrize(
    "output", [torch.zeros(4, 5), torch.zeros(4), torch.zeros(4, 4, 1), (torch.zeros(4, 4),), None]
)
@pytest.mark.parametrize("use", ["loss", "predict"])
def test_logits_of_another_shape_are_refused(output: Any, use: str) -> None:
    task, batch = Classification(CLASSES), (None, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"num_classes=4\) wants logits of shape \(B, 4\).*Set num_classes"):
        task.loss(output, batch) if use == "loss" else task.predict(output)


# Metrics


def test_metrics_of_classes() -> None:
    logits, target = 3 * torch.randn(200, CLASSES), torch.randint(0, CLASSES, (200,))
    probabilities = logits.double().softmax(1).numpy()
    said = probabilities.argmax(1)
    values = measured(Classification(CLASSES), logits, target)
    assert values["accuracy"] == pytest.approx(accuracy_score(target, said))
    expected = expected_calibration_error(probabilities.max(1), said == target.numpy())
    assert values["calibration_error"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("labels", [1, CLASSES])
def test_metrics_of_labels(labels: int) -> None:
    logits, target = 2 * torch.randn(200, labels), torch.randint(0, 2, (200, labels))
    probabilities = logits.double().sigmoid().flatten().numpy()
    values = measured(Classification(labels, multilabel=True), logits, target)
    assert values["accuracy"] == pytest.approx(accuracy_score(target.flatten(), probabilities > 0.5))
    expected = expected_calibration_error(probabilities, target.flatten().numpy())
    assert values["calibration_error"] == pytest.approx(expected, abs=1e-6)
    soft = target * 0.8 + 0.1  # smoothed, or mixed
    assert measured(Classification(labels, multilabel=True), logits, soft) == values


def test_samples_without_a_label_are_in_no_metric() -> None:
    task = Classification(num_classes=3)
    metrics = task.metrics()
    logits = 5 * torch.eye(3)[[0, 1, 2, 0]]
    task.update(metrics, logits, (None, torch.tensor([0, -100, 1, -100])))
    assert float(metrics.compute()["accuracy"]) == 0.5


@pytest.mark.parametrize("label", [3, -1, 255])
def test_a_label_of_no_class_is_refused(label: int) -> None:
    task, target = Classification(num_classes=3), torch.tensor([0, -100, label])
    with pytest.raises(ValueError, match=f"labels hold {label}, and are 0 to 2, or -100"):
        task.loss(torch.zeros(3, 3), (None, target))
    with pytest.raises(ValueError, match=f"labels hold {label}"):
        task.update(task.metrics(), torch.zeros(3, 3), (None, target))


@pytest.mark.parametrize(
    ("multilabel", "target", "told"),
    [
        (True, torch.tensor([[-1, 1, 1]]), "from -1 to 1. Map -1 and 1 to 0 and 1"),
        (True, torch.tensor([[-100.0, 1.0, 0.0]]), "from -100 to 1"),
        (True, torch.tensor([[torch.nan, 1.0, 0.0]]), "from nan to nan"),
        (False, torch.tensor([[torch.nan, 1.0, 0.0]]), "from nan to nan"),
        (False, torch.tensor([[1.0, 1.0, 0.0]]), "from 0 to 2. If a sample can have several .* multilabel=True"),
    ],
)
def test_targets_that_are_no_probabilities_are_refused(multilabel: bool, target: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=f"Targets are probabilities, from 0 to 1 for .*; got {told}"):
        Classification(3, multilabel=multilabel).loss(torch.zeros(1, 3), (None, target))


@pytest.mark.parametrize("labels", [{"labels": torch.tensor([0])}, ["cat"]])
def test_labels_that_are_no_tensor_are_refused(labels: object) -> None:
    with pytest.raises(ValueError, match=r"with a tensor of labels, got a (dict|list)"):
        Classification(3).loss(torch.zeros(1, 3), (None, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_probabilities_are_probabilities(dtype: torch.dtype) -> None:
    target = (5 * torch.randn(64, 1000)).softmax(dim=1).to(dtype)
    smooth = (0.9 * nn.functional.one_hot(torch.arange(64), 1000) + 0.1 / 1000).to(dtype)
    for each in (target, smooth):
        Classification(1000).loss(torch.zeros(64, 1000), (None, each.float()))


def test_a_batch_without_a_label_changes_no_metric() -> None:
    task, metrics = Classification(3), Classification(3).metrics()
    task.update(metrics, 5 * torch.eye(3), (None, torch.tensor([0, 0, 2])))
    expected = metrics.compute()
    task.update(metrics, torch.zeros(3, 3), (None, torch.full((3,), -100)))
    metrics["accuracy"]._computed = metrics["calibration_error"]._computed = None
    assert metrics.compute() == expected


@pytest.mark.parametrize("batch", [{"image": torch.zeros(2, 3), "label": torch.zeros(2)}, [torch.zeros(2, 3)]])
def test_a_batch_that_is_no_pair_is_told(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"takes batches \(inputs, target\), and this one is a (dict|list)"):
        Classification(3).target(batch)


def test_a_batch_may_be_the_inputs_alone_to_predict() -> None:
    images, task = torch.randn(2, 3), Classification(3)
    assert torch.equal(task(nn.Identity(), images), images)
    assert torch.equal(task(nn.Identity(), [images]), images)
    with pytest.raises(ValueError, match="and this one is a tensor of shape"):
        task.target(images)


def test_metrics_are_fresh_and_of_float32() -> None:
    task = Classification(CLASSES)
    logits, target = torch.randn(8, CLASSES).bfloat16(), torch.randint(0, CLASSES, (8,))
    assert task.predict(logits).dtype == torch.float32
    assert measured(task, logits, target) == measured(task, logits.float(), target)


def test_predictions_are_probabilities() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    said = Classification(2).predict(logits)
    torch.testing.assert_close(said, torch.tensor([[0.5, 0.5], [0.7310586, 0.2689414]]))
    said = Classification(2, multilabel=True).predict(logits)
    torch.testing.assert_close(said, torch.tensor([[0.5, 0.5], [0.7310586, 0.5]]))


@pytest.mark.parametrize("multilabel", [False, True])
def test_agreement_is_how_often_both_say_the_same(multilabel: bool) -> None:
    task = Classification(CLASSES, multilabel=multilabel)
    student, teacher = torch.randn(50, CLASSES), torch.randn(50, CLASSES)
    metric = task.agreement()
    task.update_agreement(metric, student, teacher)
    same = (student > 0) == (teacher > 0) if multilabel else student.argmax(1) == teacher.argmax(1)
    assert float(metric.compute()) == pytest.approx(float(same.float().mean()))
    metric.reset()
    task.update_agreement(metric, student, student * 2)
    assert metric.compute() == 1.0


# Models


SMALL = {
    "resnet18": {},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
}


@pytest.mark.parametrize("name", SMALL)
def test_the_stages_of_timm_models_can_be_distilled(name: str) -> None:
    task = Classification(CLASSES)
    student, teacher = (timm.create_model(name, num_classes=CLASSES, **SMALL[name]) for _ in range(2))
    offered = task.knowledge(student)
    assert offered["logits"] == "output"
    assert [key for key in offered if key != "logits"] == [f"features.{i}" for i in range(len(student.feature_info))]
    terms = {f"t{i}": Term(nn.MSELoss(), student=key, teacher=key) for i, key in enumerate(offered)}
    distiller = Distiller(terms, teacher, knowledge=task.knowledge)
    distiller.attach(student)
    with distiller.watch() as calls:
        student(torch.randn(2, 3, 32, 32))
    values = distiller(calls)
    assert len(values) == len(offered)
    assert all(value > 0 for value in values.values())


def test_the_stages_are_those_of_timm_itself() -> None:
    model = timm.create_model("resnet18", num_classes=CLASSES).eval()
    extractor = timm.create_model("resnet18", features_only=True).eval()
    extractor.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(2, 3, 32, 32)
    offered = Classification(CLASSES).knowledge(model)
    seen: dict[str, Tensor] = {}
    for key, path in offered.items():
        if key != "logits":
            keep = lambda _, args, out, key=key: seen.update({key: out.clone()})  # noqa: E731  # a hook per key
            model.get_submodule(path).register_forward_hook(keep)
    model(x)
    for i, feature in enumerate(extractor(x)):
        torch.testing.assert_close(seen[f"features.{i}"], feature)


def test_other_models_offer_their_logits() -> None:
    assert Classification(3).knowledge(nn.Linear(2, 3)) == {"logits": "output"}
    assert Classification(3).knowledge(torchvision.models.resnet18()) == {"logits": "output"}


@pytest.mark.parametrize(
    ("config", "kind", "head"),
    [
        (
            {
                "class_path": "timm.create_model",
                "init_args": {"model_name": "resnet18"},
                "dict_kwargs": {"num_classes": CLASSES},
            },
            timm.models.ResNet,
            lambda model: model.fc,
        ),
        (
            {"class_path": "torchvision.models.resnet18", "init_args": {"num_classes": CLASSES}},
            torchvision.models.ResNet,
            lambda model: model.fc,
        ),
        (
            {
                "class_path": "torchvision.models.get_model",
                "init_args": {"name": "mobilenet_v3_small"},
                "dict_kwargs": {"num_classes": CLASSES},
            },
            torchvision.models.MobileNetV3,
            lambda model: model.classifier[-1],
        ),
    ],
    ids=lambda value: value.get("class_path") if isinstance(value, dict) else "",
)
def test_models_are_made_from_configs_by_name(config: Any, kind: type, head: Callable[..., nn.Linear]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--student", type=nn.Module)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name before 4.49
    model = instantiate(parser.parse_object({"student": config})).student
    assert type(model) is kind
    assert head(model).out_features == CLASSES
    loss = Term(losses.KD())
    distiller = Distiller({"kd": loss}, nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, CLASSES)))
    distiller.attach(model)
    with distiller.watch() as calls:
        model(torch.randn(2, 3, 32, 32))
    assert distiller(calls)["kd"] > 0
