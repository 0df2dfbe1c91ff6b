import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_kd.models.mmdet import MMDetModel

RETINANET = "retinanet/retinanet_r18_fpn_1x_coco"
NARROW = {
    "backbone.base_channels": 8,
    "backbone.stem_channels": 8,
    "neck": {"in_channels": [8, 16, 32, 64], "out_channels": 32},
    "bbox_head": {"in_channels": 32, "feat_channels": 32, "stacked_convs": 1},
}


def narrow(config: str = RETINANET, **given: Any) -> nn.Module:
    return MMDetModel(config, **({"num_classes": 3, "overrides": NARROW} | given))


def test_it_is_mmdets_own_detector_with_its_own_initialisation(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = narrow()
    assert type(model).__module__ == "mmdet.models.detectors.retinanet"
    assert (model.backbone.depth, model.neck.out_channels, model.bbox_head.num_classes) == (18, 32, 3)
    # Focal loss starts at a probability of 0.01, which only init_weights sets.
    torch.testing.assert_close(model.bbox_head.retina_cls.bias.sigmoid(), torch.full((27,), 0.01))
    assert not caplog.records
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize(
    "config", [RETINANET, f"{RETINANET}.py", "retinanet_r18_fpn_1x_coco", "retinanet_r18_fpn_1x_coco.py"]
)
def test_a_configuration_is_found_by_its_name_in_the_wheel(config: str) -> None:
    assert narrow(config).backbone.depth == 18


def test_a_configuration_is_a_file_that_may_begin_with_one_of_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"_base_ = 'mmdet::{RETINANET}.py'\nmodel = dict(bbox_head=dict(num_classes=7))")
    monkeypatch.setenv("CONFIGS", str(tmp_path))
    for config in (str(file), "$CONFIGS/mine.py", "$CONFIGS/mine"):
        assert narrow(config, num_classes=None).bbox_head.num_classes == 7
    (tmp_path / "data.py").write_text("batch_size = 2")
    with pytest.raises(ValueError, match="has no `model`, so it makes no detector"):
        MMDetModel(str(tmp_path / "data.py"))


def test_an_unknown_configuration_lists_the_closest() -> None:
    with pytest.raises(ValueError, match=r"no configuration 'retinanet_r19_fpn'.*retinanet/retinanet_r18_fpn_1x_coco"):
        MMDetModel("retinanet_r19_fpn")


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ("cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco", "roi_head.bbox_head"),
        ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco", "roi_head.bbox_head"),
        ("deformable_detr/deformable-detr_r50_16xb2-50e_coco", "bbox_head"),
    ],
)
def test_the_classes_are_set_in_every_head(config: str, heads: str) -> None:
    found = MMDetModel(config, num_classes=3).get_submodule(heads)
    assert {head.num_classes for head in (found if isinstance(found, nn.ModuleList) else [found])} == {3}


def test_a_backbone_without_its_weights_learns() -> None:
    model = narrow().train()
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_synchronised_batch_norm_is_left_to_lightning() -> None:
    model = MMDetModel("rtmdet/rtmdet_tiny_8xb32-300e_coco", num_classes=3)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())


@pytest.mark.parametrize(
    "overrides",
    [{"backbone.type": "os.system"}, {"backbone": {"type": "os.system"}}, {"x": [{"y": {"type": "subprocess.call"}}]}],
)
def test_overrides_name_no_code(overrides: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="would import that"):
        MMDetModel(RETINANET, overrides=overrides)


# Weights


@pytest.fixture
def trained() -> nn.Module:
    model = narrow()
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def mmengine_checkpoint(model: nn.Module) -> dict[str, Any]:
    """What mmengine's runner saves: it keeps the history of everything that it logged."""
    from mmengine.logging import MessageHub  # noqa: PLC0415

    hub = MessageHub("checkpoint")
    for value in (1.0, 0.5):
        hub.update_scalar("train/loss", value)
    hub.update_info("iter", 2)
    return {
        "meta": {"epoch": 1, "iter": 2, "cfg": "model = dict()", "dataset_meta": {"classes": ("a", "b", "c")}},
        "state_dict": model.state_dict(),
        "message_hub": hub.state_dict(),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1).state_dict(),
    }


@pytest.mark.parametrize("kind", ["state dict", "mmengine", "Lightning"])
def test_weights_are_loaded(kind: str, trained: nn.Module, tmp_path: Path) -> None:
    state = trained.state_dict()
    content = {
        "state dict": state,
        "mmengine": mmengine_checkpoint(trained),
        "Lightning": {"state_dict": {f"student.{key}": value for key, value in state.items()}},
    }[kind]
    torch.save(content, tmp_path / "weights.pth")
    if kind == "mmengine":
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "weights.pth", weights_only=True)
    model = narrow(weights=str(tmp_path / "weights.pth"))
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert not all(p.requires_grad for p in model.parameters())  # frozen_stages=1 of the file holds again
    assert not any(m.training for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d))  # norm_eval


def test_weights_of_other_classes_are_refused_with_the_shapes(trained: nn.Module, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"retina_cls.weight is \(27, 32, 3, 3\) and not \(45, 32, 3, 3\)"):
        narrow(num_classes=5, weights=str(tmp_path / "weights.pth"))


def touch(path: str) -> None:
    Path(path).touch()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return touch, (str(self.path),)


def test_a_checkpoint_is_no_code(trained: nn.Module, tmp_path: Path) -> None:
    torch.save({**mmengine_checkpoint(trained), "evil": Evil(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="is loaded as plain tensors"):
        narrow(weights=str(tmp_path / "weights.pth"))
    assert not (tmp_path / "ran").exists()
