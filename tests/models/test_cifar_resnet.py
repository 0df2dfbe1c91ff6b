from pathlib import Path

import pytest
import torch

from lightning_kd.data import Cifar10
from lightning_kd.models import CifarResNet


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_parameters_are_those_of_the_paper(depth: int, millions: float) -> None:
    # arXiv 1512.03385, table 6
    count = sum(p.numel() for p in CifarResNet(depth).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.035)


@pytest.mark.parametrize("depth", [0, 2, 9, 18, 51])
def test_a_depth_that_is_none_is_refused_with_the_nearest(depth: int) -> None:
    with pytest.raises(ValueError, match=r"6n \+ 2 .* received .* the nearest is"):
        CifarResNet(depth)


def test_stages_halve_the_resolution_and_double_the_channels() -> None:
    model, shapes = CifarResNet(8, in_channels=1, width=4).eval(), {}
    for name in ("layer1", "layer2", "layer3"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: shapes.update({name: tuple(out.shape)})
        )
    model(torch.zeros(2, 1, 8, 8))
    assert shapes == {"layer1": (2, 4, 8, 8), "layer2": (2, 8, 4, 4), "layer3": (2, 16, 2, 2)}


def test_missing_weights_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.th"):
        CifarResNet(8, weights=str(tmp_path / "none.th"))


def test_a_published_file_loads_strictly(data_dir: Path) -> None:
    file = data_dir / "weights" / "resnet20-12fca82f.th"
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    model = CifarResNet(20, weights=str(file))
    assert torch.equal(model.linear.weight, state["module.linear.weight"])
    assert torch.equal(model.layer3[2].bn2.running_var, state["module.layer3.2.bn2.running_var"])


@pytest.mark.slow
def test_published_weights_give_the_known_accuracy(data_dir: Path) -> None:
    # 83.2 % on all 10,000 JPEG images; 1,024 images leave a standard error of 1.2 points.
    data = Cifar10(root=str(data_dir))
    data.prepare_data()
    data.setup("test")
    chosen = torch.randperm(10_000)[:1024]
    images, labels = data.on_after_batch_transfer(data.splits["test"].__getitems__(chosen.tolist()), 0)
    model = CifarResNet(56, weights=str(data_dir / "weights" / "resnet56-4bfd9763.th")).eval()
    with torch.inference_mode():
        right = (model(images).argmax(1) == labels).float().mean()
    assert 0.795 < right < 0.87
