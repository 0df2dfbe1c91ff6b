"""What remembers normal images, by anomalib's own models."""

# ruff: noqa: PLC0415 - anomalib takes seconds to import, and a collection of all tests should not wait for it

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import seed_everything
from lightning_kd.tasks import AnomalyDetection
from torch import nn
from torch.nn import functional as F

from lightning_kd.models import AnomalyNet, MemoryBank, PatchCore, SqueezeNetFeatures
from lightning_kd.teachers import load_weights

pytestmark = pytest.mark.slow

IMAGES = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(4)


def _network(name: str) -> Any:
    from anomalib.models.image.padim.torch_model import PadimModel
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    how: dict[str, Any] = {"layers": ["layer1"], "backbone": "resnet18", "pre_trained": False}
    return PatchcoreModel(**how) if name == "patchcore" else PadimModel(**how, n_features=10)


@pytest.mark.parametrize("name", ["patchcore", "padim"])
def test_it_remembers_as_anomalib_does(name: str, tmp_path: Path) -> None:
    own = _network(name)
    bank = MemoryBank(copy.deepcopy(own), image_size=(32, 32), vectors=20)
    empty = copy.deepcopy(bank)
    task = AnomalyDetection(normal_only=True)
    own.train()
    for images in IMAGES:  # of which every fourth is anomalous
        own(images[:3])
        masks = torch.zeros(4, 32, 32, dtype=torch.bool)
        masks[3, :5, :5] = True
        loss = task.loss(task(bank.train(), (images, masks)), (images, masks))
        loss.backward()
        assert loss == 0
        assert bank.idle.grad == 0
    seed_everything(3, verbose=False)
    if name == "patchcore":
        own.subsample_embedding(sampling_ratio=20.5 / (9 * 64))
    else:
        own.fit()
    seed_everything(3, verbose=False)
    found, expected = bank.eval()(IMAGES[0]), own.eval()(IMAGES[0])
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map)
    torch.testing.assert_close(found.pred_score, expected.pred_score)
    assert AnomalyDetection().maps(found).anomaly_map.shape == (4, 32, 32)

    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    load_weights(empty, tmp_path / "bank.pt")
    torch.testing.assert_close(empty.eval()(IMAGES[0]).anomaly_map, expected.anomaly_map)


def test_what_is_collected_is_remembered_when_it_is_saved_and_not_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = MemoryBank(_network("patchcore"), image_size=(32, 32), vectors=200)
    bank.train()(IMAGES[0][:2])
    with pytest.raises(ValueError, match="keeps 200 vectors, and the normal images gave 128: lower vectors"):
        bank.state_dict()
    bank.train()(IMAGES[0])
    bank.train()(IMAGES[1])
    assert bank.state_dict()["network.memory_bank"].abs().sum() > 0
    bank.train()(IMAGES[1])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="MemoryBank remembers in one process, and this run has several"):
        bank.eval()(IMAGES[0])


def test_patchcore_takes_a_network_of_features() -> None:
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    backbone = SqueezeNetFeatures()
    network: Any = PatchCore(backbone, layers=("features.4", "features.7"), neighbors=3)
    assert type(network) is PatchcoreModel
    assert network.num_neighbors == 3
    network.train()(IMAGES[0])
    (embedding,) = network.embedding_store
    level = F.avg_pool2d(backbone.features[:5](IMAGES[0]), 3, 1, 1)
    torch.testing.assert_close(embedding[:, :128], level.permute(0, 2, 3, 1).flatten(0, 2))
    assert embedding.shape[1] == 128 + 256


@pytest.mark.parametrize("network", [AnomalyNet(width=2), nn.Identity()])
def test_only_what_remembers_is_taken(network: nn.Module) -> None:
    with pytest.raises(TypeError, match="MemoryBank fills anomalib's PatchcoreModel and PadimModel; got"):
        MemoryBank(network, image_size=(32, 32))
