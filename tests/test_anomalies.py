import copy
import pickle

import pytest
import torch
from lightning_kd.tasks import AnomalyDetection
from torch import nn
from torch.nn import functional as F
from torchvision.models import squeezenet1_1

from lightning_kd.anomalies import StudentTeacher, difference, said
from lightning_kd.models import SideBySide


def test_the_difference_of_a_level_is_one_minus_the_cosine_interpolated():
    s, t = torch.randn(2, 5, 8, 8), torch.randn(2, 5, 8, 8)
    found = difference([s], [t], (16, 16)).anomaly_map
    expected = F.interpolate((1 - F.cosine_similarity(s, t)).unsqueeze(1), (16, 16), mode="bilinear").squeeze(1)
    torch.testing.assert_close(found, expected)


def test_levels_may_be_interpolated_corner_to_corner():
    """The corners of the map are those of the level, then; they are not otherwise."""
    s, t = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    corners = (slice(None), [0, 0, -1, -1], [0, -1, 0, -1])
    expected = (1 - F.cosine_similarity(s, t))[corners]
    found = difference([s], [t], (7, 7), align_corners=True).anomaly_map
    torch.testing.assert_close(found[corners], expected)
    torch.testing.assert_close(found[:, ::2, ::2], 1 - F.cosine_similarity(s, t))
    assert not torch.allclose(difference([s], [t], (7, 7)).anomaly_map[:, ::2, ::2], found[:, ::2, ::2])
    networks = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(3, 4, 4, 4)
    task = AnomalyDetection(["output"], align_corners=True)
    task.meet(*networks)
    images = torch.randn(2, 3, 16, 16)
    levels = [network(images) for network in networks]
    torch.testing.assert_close(
        task.deployed(networks[0]).eval()(images), difference(levels[:1], levels[1:], (16, 16), align_corners=True)
    )


def test_levels_are_multiplied_or_added():
    levels = [(torch.randn(2, c, 8, 8), torch.randn(2, c, 8, 8)) for c in (3, 5)]
    students, teachers = zip(*levels, strict=True)
    one, other = (difference([s], [t], (8, 8)).anomaly_map for s, t in levels)
    torch.testing.assert_close(difference(students, teachers, (8, 8)).anomaly_map, one * other)
    summed = difference(students, teachers, (8, 8), "sum")
    torch.testing.assert_close(summed.anomaly_map, one + other)
    torch.testing.assert_close(summed.pred_score, (one + other).amax((1, 2)))


def test_levels_weigh_in_their_sum():
    levels = [(torch.randn(2, c, 8, 8), torch.randn(2, c, 8, 8)) for c in (3, 5)]
    students, teachers = zip(*levels, strict=True)
    one, other = (difference([s], [t], (8, 8)).anomaly_map for s, t in levels)
    weighed = difference(students, teachers, (8, 8), "sum", [0.25, 2.0])
    torch.testing.assert_close(weighed.anomaly_map, 0.25 * one + 2 * other)
    networks = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
    detector = StudentTeacher(networks, _other(networks), ["0", "1"], combine="sum", weights=[0.0, 1.0]).eval()
    alone = StudentTeacher(networks, detector.teacher, ["1"], combine="sum").eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(detector(images), alone(images))
    with pytest.raises(ValueError, match="weights: 1 were given, and 2 levels are compared: one for each"):
        StudentTeacher(networks, detector.teacher, ["0", "1"], combine="sum", weights=[1.0]).eval()(images)


@pytest.mark.parametrize(
    ("combine", "weights"),
    [("product", [1.0]), ("sum", [-1.0]), ("sum", []), ("sum", 2.0), ("sum", [[1.0]]), ("sum", [1.0, [1.0]])],
)
def test_weights_are_of_a_sum(combine, weights):
    with pytest.raises(ValueError, match="weights are numbers, one for each level of a difference whose levels are"):
        AnomalyDetection(["layer1"], combine=combine, weights=weights)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [[1.0]], [[1.0], []], [[1.0], [-1.0]], [[1.0], 1.0]])
def test_weights_are_in_lists_where_the_layers_are(weights):
    with pytest.raises(ValueError, match="of lists of layers a list for each"):
        AnomalyDetection([["layer1"], ["layer2"]], combine="sum", weights=weights)


def test_the_maps_of_lists_of_levels_are_multiplied():
    networks = {"fine": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)), "deep": nn.Conv2d(3, 6, 3, 4)}
    student, teacher = SideBySide(networks), SideBySide({name: _other(each) for name, each in networks.items()})
    images = torch.randn(2, 3, 32, 32)
    layers = ["fine.0", "fine.1"], ["deep"]
    mixed = StudentTeacher(student, teacher, layers, combine="sum").eval()(images)
    apart = [StudentTeacher(student, teacher, each, combine="sum").eval()(images).anomaly_map for each in layers]
    assert all(each.min() > 0 for each in apart)
    torch.testing.assert_close(mixed.anomaly_map, apart[0] * apart[1])
    weighed = StudentTeacher(student, teacher, layers, combine="sum", weights=[[0.0, 2.0], [3.0]]).eval()(images)
    second = StudentTeacher(student, teacher, layers[0][1:], combine="sum").eval()(images).anomaly_map
    torch.testing.assert_close(weighed.anomaly_map, 2 * second * 3 * apart[1])
    torch.testing.assert_close(mixed.pred_score, mixed.anomaly_map.amax((1, 2)))


def _other(network: nn.Module) -> nn.Module:
    """The same network with other weights."""
    other = copy.deepcopy(network)
    for weights in other.parameters():
        nn.init.normal_(weights)
    return other


@pytest.mark.slow
def test_maps_are_those_of_anomalib():
    maps = pytest.importorskip("anomalib.models.image.stfpm.anomaly_map").AnomalyMapGenerator()
    levels = {name: (torch.randn(2, c, n, n), torch.randn(2, c, n, n)) for name, c, n in (("a", 3, 16), ("b", 6, 8))}
    theirs = maps(
        teacher_features={k: t for k, (_, t) in levels.items()},
        student_features={k: s for k, (s, _) in levels.items()},
        image_size=(32, 32),
    )
    students, teachers = zip(*levels.values(), strict=True)
    torch.testing.assert_close(difference(students, teachers, (32, 32)).anomaly_map, theirs.squeeze(1))


def test_an_empty_row_of_networks_is_refused():
    with pytest.raises(ValueError, match="networks is empty"):
        SideBySide({})


def test_what_says_nothing_of_anomalies_is_none():
    assert said(torch.zeros(2, 512, 4, 4)) is None
    assert said([torch.zeros(2, 1, 4, 4)]) is None
    assert said(torch.zeros(2, 4, 4)).pred_score.shape == (2,)


def test_a_detector_of_two_networks_leaves_no_hook_and_stands_still():
    student, teacher = squeezenet1_1(), squeezenet1_1()
    layers = ["features.4", "features.7"]
    detector = StudentTeacher(student, teacher, layers)
    images = torch.randn(2, 3, 64, 64)
    assert detector(images).shape == (2, 1000)  # in training the student's own
    assert not teacher.training
    before = copy.deepcopy(teacher.state_dict())
    detector.eval()
    first, again = detector(images), detector(images)  # the second time only as far as it is asked
    torch.testing.assert_close(first, again)
    assert not any(module._forward_hooks for module in detector.modules())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    torch.testing.assert_close(pickle.loads(pickle.dumps(detector))(images), first)
    assert detector(images).anomaly_map.shape == (2, 64, 64)
    copied = StudentTeacher(teacher, copy.deepcopy(teacher), layers).eval()
    assert copied(images).pred_score.abs().max() < 1e-5


def test_levels_that_do_not_fit_are_told():
    images = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"\(4, 8, 8\)\] in the student and \[\(5, 8, 8\)\] in the teacher"):
        StudentTeacher(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1), ["output"]).eval()(images)
    flat = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
    with pytest.raises(ValueError, match=r"output of the student is a tensor of shape \(1, 256\): expected maps"):
        StudentTeacher(flat, flat, ["output"]).eval()(images)
    with pytest.raises(ValueError, match="has no module 'layer9'"):
        StudentTeacher(flat, flat, ["layer9"]).eval()(images)


def test_a_detector_is_exported_as_one_network():
    detector = StudentTeacher(squeezenet1_1(), squeezenet1_1(), ["features.4"]).eval().requires_grad_(False)
    images = torch.randn(2, 3, 32, 32)
    detector(images)
    exported = torch.export.export(detector, (images,), strict=False).module()
    torch.testing.assert_close(exported(images), detector(images))


class Reverse(nn.Module):
    """An encoder and its decoder, called by their names: torch.export puts proxies there."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.decoder(self.encoder(x).relu())


def test_a_detector_that_is_its_own_teacher_is_exported():
    student = Reverse()
    detector = StudentTeacher(student, student, ["decoder"], ["encoder"]).eval().requires_grad_(False)
    images = torch.randn(2, 3, 32, 32)
    detector(images)
    exported = torch.export.export(detector, (images,), strict=False).module()
    torch.testing.assert_close(exported(images), detector(images))
