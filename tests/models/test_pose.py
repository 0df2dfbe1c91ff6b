from pathlib import Path

import pytest
import torch

from lightning_kd.models import PoseNet


@pytest.mark.parametrize("backbone", ["resnet10t", "mobilenetv3_small_050"])
def test_every_head_returns_what_it_says(backbone: str) -> None:
    images, shapes = torch.rand(2, 3, 64, 48), {}
    for head in ("heatmap", "simcc", "coordinates"):
        net = PoseNet(backbone, 7, (64, 48), head=head, channels=16, stride=16)
        shapes[head] = {name: tuple(value.shape) for name, value in net(images)._asdict().items()}
        assert net.training
        assert all(module.training for module in net.modules())
    assert shapes == {
        "heatmap": {"heatmaps": (2, 7, 32, 24)},
        "simcc": {"simcc_x": (2, 7, 96), "simcc_y": (2, 7, 128)},
        "coordinates": {"coordinates": (2, 7, 2)},
    }


def test_the_backbone_ends_at_the_stride() -> None:
    whole, short = (PoseNet("resnet10t", 3, (32, 32), stride=stride) for stride in (32, 8))
    assert len(short.backbone(torch.rand(1, 3, 32, 32))) == 3
    assert sum(p.numel() for p in short.backbone.parameters()) < sum(p.numel() for p in whole.backbone.parameters()) / 4


@pytest.mark.parametrize(
    "backbone", ["resnet10t", "mobilenetv3_small_050", "efficientnet_b0", "mobilenetv4_conv_small"]
)
def test_nothing_is_there_that_does_not_learn(backbone: str) -> None:
    net = PoseNet(backbone, 3, (32, 32), stride=16, channels=8)
    sum(each.sum() for each in net(torch.rand(2, 3, 32, 32))).backward()  # type: ignore[union-attr]
    assert not [name for name, weight in net.named_parameters() if weight.grad is None]  # DDP refuses such


@pytest.mark.parametrize("head", ["heatmap", "coordinates"])
def test_heads_without_bins_take_images_of_any_size(head: str) -> None:
    net = PoseNet("resnet10t", 3, (32, 32), head=head, stride=8, channels=8)  # type: ignore[arg-type]
    assert net(torch.rand(1, 3, 48, 32))[0].shape[:2] == (1, 3)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="head is"):
        PoseNet("resnet10t", 3, (32, 32), head="dsnt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"none of stride=64"):
        PoseNet("resnet10t", 3, (32, 32), stride=64)
    with pytest.raises(ValueError, match="32 x 32 pixels, and these have 48 x 32"):
        PoseNet("resnet10t", 3, (32, 32), stride=8)(torch.rand(1, 3, 48, 32))


def test_the_head_alone_learns_on_a_backbone_that_was_trained(tmp_path: Path) -> None:
    first = PoseNet("resnet10t", 3, (32, 32), stride=8, channels=8)
    first(torch.rand(4, 3, 32, 32))  # statistics of its own
    torch.save(first.state_dict(), tmp_path / "first.pt")
    second = PoseNet("resnet10t", 3, (32, 32), stride=8, channels=8, backbone_from=str(tmp_path / "first.pt"))
    before = {key: value.clone() for key, value in second.state_dict().items()}
    assert all(torch.equal(value, before[f"backbone.{key}"]) for key, value in first.backbone.state_dict().items())
    assert not torch.equal(first.head.x.weight, second.head.x.weight)  # type: ignore[union-attr, arg-type]
    optimizer = torch.optim.SGD([p for p in second.parameters() if p.requires_grad], lr=0.1)
    second.train()
    second(torch.rand(4, 3, 32, 32)).simcc_x.square().mean().backward()
    optimizer.step()
    after = second.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert "head.x.weight" in changed
    assert not [key for key in changed if key.startswith("backbone")]
    with pytest.raises(ValueError, match="does not fit"):
        PoseNet("resnet10t", 4, (32, 32), stride=8, channels=8, backbone_from=str(tmp_path / "first.pt"))
