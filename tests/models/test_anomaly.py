from pathlib import Path

import pytest
import torch
from torchvision.models import squeezenet1_1

from lightning_kd.models import AnomalyNet, Shrunk, SqueezeNetFeatures
from lightning_kd.taps import Taps


def test_levels_have_the_channels_of_a_wider_teacher():
    levels = ["level1", "level2", "level3"]
    shapes = []
    for net in (AnomalyNet(width=4, level_channels=(6, 12, 24)), AnomalyNet(width=6)):
        taps = Taps(net, levels, "the network")
        taps.attach()
        shapes.append([tuple(each[0].shape) for each in taps.run(torch.zeros(2, 3, 32, 32)).values()])
    assert shapes[0] == shapes[1] == [(2, 6, 16, 16), (2, 12, 8, 8), (2, 24, 4, 4)]
    with pytest.raises(ValueError, match="one for each level"):
        AnomalyNet(level_channels=(1, 2))


def test_layers_behind_the_last_level_are_not_run():
    net, images = SqueezeNetFeatures(levels=[7, 4]).eval(), torch.randn(1, 3, 64, 64)
    called = []
    for layer in net.features:
        layer.register_forward_hook(lambda layer, *_: called.append(layer))
    found = net(images)
    assert called == list(net.features[:8])
    for level, k in zip(found, (7, 4), strict=True):
        torch.testing.assert_close(level, net.features[: k + 1](images))


def test_a_network_sees_means_of_squares_of_pixels():
    images = torch.arange(16.0).reshape(1, 1, 4, 4)
    seen = Shrunk(torch.nn.Identity(), factor=2)(images)
    torch.testing.assert_close(seen, torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))
    with pytest.raises(ValueError, match=r"how many times smaller the images are, 1 or more; got 0\.5"):
        Shrunk(torch.nn.Identity(), factor=0.5)


@pytest.mark.slow
def test_features_are_those_of_imagenet(data_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LIGHTNING_KD_DATA", str(data_dir))
    name = "weights/squeezenet1_1_features_imagenet.pth"
    net = SqueezeNetFeatures(f"$LIGHTNING_KD_DATA/{name}").eval()
    theirs = squeezenet1_1(weights=None).eval()
    missing, unexpected = theirs.load_state_dict(torch.load(data_dir / name, weights_only=True), strict=False)
    assert not unexpected
    assert all(key.startswith("classifier") for key in missing)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(net(images), theirs.features(images))


def test_weights_that_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LIGHTNING_KD_DATA", "nowhere")
    with pytest.raises(FileNotFoundError, match=r"set LIGHTNING_KD_DATA to the folder with weights/x\.pth"):
        SqueezeNetFeatures("$LIGHTNING_KD_DATA/weights/x.pth")
