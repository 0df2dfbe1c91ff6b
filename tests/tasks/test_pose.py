from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning_kd.callbacks import Distillation
from lightning_kd.tasks import Pose
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

from lightning_kd import DistillationModule, Term, losses
from lightning_kd.data import KeypointScenes
from lightning_kd.keypoints import Coordinates, Heatmaps, SimCC, log_gaussian
from lightning_kd.models import PartExperts, PoseNet

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
IMAGES = torch.zeros(2, 3, 20, 40)


def labels() -> Tensor:
    points = torch.rand(2, 4, 2) * torch.tensor([40.0, 20.0])
    return torch.cat((points, torch.tensor([[2.0, 1.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0]]).unsqueeze(-1)), dim=-1)


# Which joints count


def test_joints_count_if_they_have_a_label_inside_of_the_image() -> None:
    target = labels()
    target[0, 0, 2] = 0
    target[0, 1, 0] = 40.0
    target[0, 2, 1] = -0.1
    target[1, 0, 0] = torch.nan
    target[1, 1, 2] = -100
    task = Pose(4)
    assert task.joints((IMAGES, target)).tolist() == [[False, False, False, True], [False, True, True, True]]
    places = (target[..., :2] / torch.tensor([40.0, 20.0])).nan_to_num(0.3)
    wrong = places.clone()
    wrong[:, :2] += 0.3
    wrong[0, 2] += 0.2
    assert float(task.loss(wrong, (IMAGES, target))) == 0.0  # what is not looked for has no part in the loss
    wrong[1, 3] += 0.5
    assert float(task.loss(wrong, (IMAGES, target))) == pytest.approx(1.0 / 3, rel=1e-5)
    metrics = task.metrics()
    task.update(metrics, wrong, (IMAGES, target))
    assert float(metrics.compute()["pck"]) == 0.5  # of the second image: one joint has no box around it


@pytest.mark.parametrize("place", [0.0, 1000.0, torch.nan])
def test_the_place_of_a_joint_that_was_not_looked_for_is_not_read(place: float) -> None:
    target, (said, taught) = labels(), torch.rand(2, 2, 4, 2)
    target[1, 1] = torch.tensor([place, place, -100.0])
    given = {name: of((IMAGES, target)) for name, of in Pose(4).labels().items() if name != "index"}
    known = torch.ones(2, 4, dtype=torch.bool)
    known[1, 1] = False
    assert given["joints"].all()  # other terms use what is said of it
    assert torch.equal(~given["points"].isnan().any(-1), known)
    expected = losses.ALoss()(said, taught, target[..., :2] / torch.tensor([40.0, 20.0]), known)
    torch.testing.assert_close(losses.ALoss()(said, taught, **given), expected)


def test_three_ways_to_give_labels_are_one() -> None:
    target, task, output = labels(), Pose(4), torch.rand(2, 4, 2)
    ways: list[Any] = [
        target,
        (target[..., :2], target[..., 2]),
        {"points": target[..., :2], "visible": target[..., 2].long(), "area": torch.ones(2)},
    ]
    assert len({float(task.loss(output, (IMAGES, way))) for way in ways}) == 1
    assert task.target((IMAGES, ways[2])).area is ways[2]["area"]


@pytest.mark.parametrize("wrong", [torch.rand(2, 5, 3), torch.rand(2, 4, 2), (torch.rand(2, 4, 2), torch.rand(2, 5))])
def test_labels_of_another_shape_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"wants labels \(B, 4, 3\)"):
        Pose(4).target((IMAGES, wrong))


def test_a_network_for_other_joints_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_keypoints=4.*5 joints"):
        Pose(4).loss(Coordinates(torch.rand(2, 5, 2)), (IMAGES, labels()))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"scale": (0, 4)}, "two of the joints 0 to 3"),
        ({"scale": (0,)}, "two of the joints"),
        ({"oks_sigmas": [0.1]}, "expected 4 positive numbers"),
        ({"oks_sigmas": [-1.0] * 4}, "expected 4 positive numbers"),
        ({"scale": (1, 1)}, "'box' or two of the joints"),
        ({"scale": "xx"}, "'box' or two of the joints"),
        ({"sigma": 2.0}, "fraction of the image's side"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Pose(4, **wrong)
    with pytest.raises(ValueError, match="1 or more; got 0"):
        Pose(0)
    with pytest.raises(TypeError, match="num_keypoints is a whole number, got None"):
        Pose(None)  # type: ignore[arg-type]


# Metrics and predictions


def test_every_kind_of_output_is_measured_in_pixels() -> None:
    target = labels()
    target[..., :2] = 5 + target[..., :2] / 2
    places = target[..., :2] / torch.tensor([40.0, 20.0])
    x, y = (log_gaussian(places[..., i], 40, 0.05) for i in (0, 1))
    outputs = [SimCC(x, y), Heatmaps((y.unsqueeze(-1) + x.unsqueeze(-2)).exp()), Coordinates(places)]
    for output in outputs:
        task = Pose(4, oks_sigmas=[0.05] * 4)
        metrics = task.metrics()
        task.update(metrics, output, (IMAGES, target))
        found = metrics.compute()
        assert found["nme"] < 1e-3
        assert found["pck"] == found["oks_ap"] == 1
        predicted = task.predict_batch(output, (IMAGES, target))
        torch.testing.assert_close(predicted[..., :2], target[..., :2], atol=2e-3, rtol=0)


def test_distances_are_in_units_of_the_box_or_of_two_joints() -> None:
    target = torch.tensor([[[2.0, 2.0, 2.0], [18.0, 2.0, 2.0], [18.0, 6.0, 1.0], [30.0, 19.0, 0.0]]])
    places = (target[..., :2] + torch.tensor([0.0, 1.0])) / torch.tensor([40.0, 20.0])
    expected = {"box": 1 / 8, (0, 1): 1 / 16, (1, 2): 1 / 4}
    for scale, nme in expected.items():
        task = Pose(4, scale=scale)  # type: ignore[arg-type]
        metrics = task.metrics()
        task.update(metrics, places, (IMAGES[:1], target))
        assert float(metrics.compute()["nme"]) == pytest.approx(nme, rel=1e-4)
    task, metrics = Pose(4, scale=(0, 3)), Pose(4).metrics()
    task.update(metrics, places, (IMAGES[:1], target))
    assert metrics.compute()["nme"].isnan()  # the scale is not known


@pytest.mark.parametrize("scale", ["box", (0, 1)])
def test_points_may_be_whole_numbers(scale: Any) -> None:
    whole, task = labels().long(), Pose(4, scale=scale, oks_sigmas=[0.1] * 4)
    measured = []
    for target in (whole, whole.float()):
        metrics = task.metrics()
        task.update(metrics, target[..., :2] / torch.tensor([40.0, 20.0]) + 0.01, (IMAGES, target))
        measured.append(metrics.compute())
    assert measured[0] == measured[1]
    assert 0 < float(measured[0]["nme"]) < 1


@pytest.mark.parametrize("head", ["coordinates", "simcc", "heatmap"])
def test_of_a_network_that_has_diverged_nothing_is_measured(head: str, scenes: KeypointScenes) -> None:
    network = net(head)
    for parameter in network.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the places of 4 of 4 images have values that are not numbers"):
        Trainer(**QUIET).test(DistillationModule(Pose(9), network), scenes, verbose=False)


def test_part_experts_are_measured_on_the_joints_that_they_know(scenes: KeypointScenes) -> None:
    part, known = PoseNet("resnet10t", 3, (32, 32), stride=16), [0, 4, 5]
    module = DistillationModule(Pose(9, oks_sigmas=[0.1] * 9), PartExperts([(part, known)], 9))
    images, points = scenes.on_after_batch_transfer(next(iter(scenes.val_dataloader())), 0)
    (found,) = Trainer(**QUIET).test(module, DataLoader([(images, points)], None), verbose=False)
    alone = DistillationModule(Pose(3, oks_sigmas=[0.1] * 3), part)
    (expected,) = Trainer(**QUIET).test(alone, DataLoader([(images, points[:, known])], None), verbose=False)
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


def test_pictures_show_true_and_predicted_points_that_count() -> None:
    target = torch.tensor([[[5.0, 5.0, 2.0], [30.0, 15.0, 2.0], [20.0, 10.0, 0.0]]])
    images, black = torch.zeros(1, 3, 20, 40), [torch.zeros(3, 20, 40, dtype=torch.uint8)]
    truth = Pose(3).draw(black, (images, target))
    assert truth is not None
    assert list(truth.legend) == ["true"]
    factor = truth.images[0].shape[-1] // 40
    assert tuple(truth.images[0][:, 5 * factor, 5 * factor].tolist()) == truth.legend["true"]
    assert not truth.images[0][:, 10 * factor, 20 * factor].any()
    predicted = torch.tensor([[[5.0, 15.0, 1.0], [30.0, 15.0, 1.0], [20.0, 10.0, 1.0]]])
    both = Pose(3).draw(black, (images, target), predicted)
    assert both is not None
    assert list(both.legend) == ["true", "predicted"]
    assert both.images[0][:, 10 * factor, 5 * factor].any()  # on the line from the true to the predicted point
    assert not both.images[0][:, 10 * factor, 20 * factor].any()


# Real models, through both doors


def net(head: Any = "simcc", backbone: str = "mobilenetv3_small_050") -> PoseNet:
    return PoseNet(backbone, 9, (32, 32), head=head, channels=16, stride=16)


def vitpose() -> nn.Module:
    backbone = VitPoseBackboneConfig(
        image_size=[32, 32], patch_size=[16, 16], hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    labels = {i: str(i) for i in range(9)}
    config = VitPoseConfig(
        backbone_config=backbone, id2label=labels, use_simple_decoder=False, output_hidden_states=True
    )
    return VitPoseForPoseEstimation(config)


@pytest.fixture(scope="module")
def scenes() -> KeypointScenes:
    data = KeypointScenes(batch_size=4, train_size=8, val_size=4, test_size=4, size=32)
    data.setup("fit")
    return data


BINS = ("simcc", losses.Jointwise(losses.KD(temperature=1.0)))
MAPS = ("heatmaps", losses.Jointwise(losses.FitNet()))
PLACES = ("coordinates", losses.Jointwise(losses.FitNet()))


@pytest.mark.parametrize(
    ("student", "teacher", "said", "features"),
    [
        (net, lambda: net(backbone="resnet10t"), BINS, "features.2"),
        (lambda: net("heatmap"), lambda: net("heatmap", "resnet10t"), MAPS, "features.3"),
        (lambda: net("coordinates"), lambda: net("coordinates", "resnet10t"), PLACES, "features.3"),
        (lambda: net("heatmap"), vitpose, MAPS, None),
        (vitpose, lambda: net("heatmap", "resnet10t"), MAPS, None),
    ],
    ids=["simcc", "heatmaps", "coordinates", "VitPose teaches", "VitPose learns"],
)
def test_real_models_are_distilled(
    student: Any, teacher: Any, said: Any, features: Any, scenes: KeypointScenes
) -> None:
    name, loss = said
    terms = {"said": Term(loss, student=name, teacher=name)}
    if features:
        terms["hint"] = Term(losses.FitNet(), student=features, teacher=features, weight=0.1)
    module = DistillationModule(Pose(9), student(), teacher(), terms)
    trainer = Trainer(max_steps=2, **QUIET, limit_val_batches=1)
    trainer.fit(module, datamodule=scenes)
    assert all(float(trainer.callback_metrics[f"train/{key}"]) > 0 for key in ("task", *terms))
    (found,) = trainer.test(module, datamodule=scenes, verbose=False)
    assert found.keys() == {"test/loss", "test/nme", "test/pck"}
    predicted = trainer.predict(module, datamodule=scenes)
    assert predicted is not None
    assert predicted[0].shape == (4, 9, 3)


def test_names_of_a_vitpose_are_offered() -> None:
    assert Pose(9).knowledge(vitpose()) == {
        "heatmaps": "output.heatmaps",
        "features.0": "output.hidden_states[0]",
        "features.1": "output.hidden_states[1]",
    }


@pytest.mark.parametrize("name", ["simcc_x", "simcc"])
def test_a_term_on_joints_that_would_overlook_which_count_is_refused(name: str, scenes: KeypointScenes) -> None:
    terms = {"kd": Term(losses.KD(dim=-1), student=name, teacher=name)}
    module = DistillationModule(Pose(9), net(), net(), terms)
    with pytest.raises(ValueError, match=r"joints that do not count.*KD takes no joints.*losses\.Jointwise"):
        Trainer(max_steps=1, **QUIET).fit(module, datamodule=scenes)


class Plain(LightningModule):
    """What a user has: it never heard of distillation."""

    def __init__(self) -> None:
        super().__init__()
        self.model = net("coordinates")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, target = batch
        error = (self.model(images).coordinates - target[..., :2] / 32).abs().sum(-1)
        return (error * (target[..., 2] > 0)).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_an_unmodified_module_is_distilled_by_the_callback(scenes: KeypointScenes) -> None:
    path = "output.coordinates"
    callback = Distillation(
        net("coordinates", "resnet10t"),
        {"said": Term(losses.Jointwise(losses.FitNet()), student=path, teacher=path)},
        student="model",
        labels={"joints": lambda batch: batch[1][..., 2] > 0},
    )
    trainer = Trainer(max_steps=2, callbacks=[callback], **QUIET)
    trainer.fit(Plain(), datamodule=scenes)
    assert float(trainer.callback_metrics["train/said"]) > 0
