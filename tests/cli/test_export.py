"""What is exported, by what reads it: onnxruntime, and the plain class."""

import json
import re
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lightning_kd.anomalies import StudentTeacher
from lightning_kd.caching.checks import fingerprint
from lightning_kd.cli import command, costs, main
from lightning_kd.cli.inputs import inputs_of, random_inputs
from lightning_kd.cli.recipe import build
from lightning_kd.cli.saved import Saved
from lightning_kd.models import AnomalyNet

SMALL = {"num_classes": 3, "backbone": "mobilenet_v3_small", "channels": 32, "min_size": 64, "max_size": 64}
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
MMDET: dict[str, Any] = {
    "config": "retinanet/retinanet_r18_fpn_1x_coco",
    "num_classes": 3,
    "overrides": {"backbone.base_channels": 8, "backbone.stem_channels": 8, "neck.in_channels": [8, 16, 32, 64]},
}


def checkpoint(path: Path, class_path: str, arguments: dict[str, Any], inputs: list[Any], **more: Any) -> nn.Module:
    """A file as `lightning-kd fit` writes it, of a network that learned nothing."""
    torch.manual_seed(0)
    recipe = {"class_path": class_path, "init_args": arguments}
    model: nn.Module = build(recipe).eval()
    state = {f"student.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "lightning_kd": {"student": recipe, "inputs": inputs, **more}}, path)
    return model


class Rooted(nn.Module):
    """What the batch size is written into, where it is traced; of numbers below 0 it says nothing."""

    def __init__(self, minus: float | None = None) -> None:
        super().__init__()
        self.minus = minus
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        found = self.scale * x / float(x.shape[0])
        return found.sqrt() - x.amax() if self.minus is None else found.masked_fill(x > x.mean(), self.minus)


@pytest.mark.parametrize(
    ("minus", "ending", "told"),
    [
        (-torch.inf, "torchscript", "the exported network differs by 0.5"),
        (torch.nan, "torchscript", "the exported network differs by 0.5"),
        (-torch.inf, "onnx", "differs by|cannot be written so"),
        (None, "torchscript", "the exported network differs by 0.4"),
    ],
)
def test_what_is_no_number_hides_no_difference(
    minus: float | None, ending: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path / "a.ckpt", f"{__name__}.Rooted", {"minus": minus}, [[[4], "float32"]])
    assert main(["export", str(tmp_path / "a.ckpt"), "--format", ending]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_weights_that_are_no_numbers_are_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "a.ckpt", "torch.nn.Linear", {"in_features": 4, "out_features": 2}, [[[4], "float32"]])
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    content["state_dict"]["student.weight"].fill_(torch.nan)
    torch.save(content, tmp_path / "a.ckpt")
    assert main(["export", str(tmp_path / "a.ckpt"), "--format", "onnx"]) == 2
    assert "outputs of random inputs are no finite numbers" in capsys.readouterr().err


def test_of_a_mask_neither_all_nor_nothing() -> None:
    (mask,) = random_inputs([([6], "bool")], 9, nn.Identity())
    assert mask.any(1).all()
    assert not mask.all(1).any()


class Masked(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor | None = None, flag: bool = False, **more: Any) -> Tensor:
        return ids if mask is None else ids * mask


def test_inputs_that_are_given_by_name_are_inputs() -> None:
    ids, mask = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)
    both = [([5], "int64"), ([5], "bool")]
    assert inputs_of(Masked(), (ids,), {"mask": mask}) == both
    assert inputs_of(Masked(), (), {"mask": mask, "ids": ids}) == both
    assert inputs_of(Masked(), (ids,), {"mask": None, "flag": False}) == both[:1]
    for named in ({"flag": True}, {"other": mask}, {"mask": mask, "flag": True}):
        assert inputs_of(Masked(), (ids,), named) == []


def test_a_detector_in_two_stages_at_any_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = [[[3, 64, 64], "list[float32]"]]
    model = checkpoint(tmp_path / "a.ckpt", "lightning_kd.models.FasterRCNN", SMALL, inputs)
    assert main(["export", str(tmp_path / "a.ckpt"), "--format", "onnx", "--traceback"]) == 0
    assert "any height and width" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    image = torch.rand(3, 80, 72)
    with torch.no_grad():
        (expected,) = model([image])
    values = session.run(None, {"image": image.numpy()})
    found = {each.name: torch.from_numpy(value) for each, value in zip(session.get_outputs(), values, strict=True)}
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["scores"].sort().values, expected["scores"].sort().values)
    torch.testing.assert_close(found["labels"].bincount(), expected["labels"].bincount())


def test_a_network_of_one_size_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "timm.models.vision_transformer.VisionTransformer"
    model = checkpoint(tmp_path / "a.ckpt", name, VIT, [[[3, 16, 16], "float32"]])
    assert main(["export", str(tmp_path / "a.ckpt"), "--format", "onnx", "--traceback"]) == 0
    told = capsys.readouterr().out
    assert "any batch size;" in told
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.shape[1:] == [3, 16, 16]
    images = torch.randn(5, 3, 16, 16)
    (found,) = session.run(None, {given.name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images).detach(), rtol=1e-4, atol=1e-4)


UNUSUAL = """
import torch
from torch import nn

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

class Dict(Base):
    def forward(self, x): return {"logits": self.layer(x), "aux": x}

class Decided(Base):
    def forward(self, x): return self.layer(x) > 0

class Branches(Base):
    def forward(self, x): return self.layer(x) if x.sum() > 0 else -self.layer(x)

class Counts(Base):
    def forward(self, x): return self.layer(x) if x.shape[0] > 8 else -self.layer(x)

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3)
    def forward(self, x): return self.layer(x if x.shape[-1] > 100 else -x)

class Double(Wide):
    def __init__(self):
        super().__init__()
        self.double()
    def forward(self, x): return self.layer(x)

class Holding(Base):
    class Held:
        def __init__(self, held): self.held = held
    def forward(self, x): return self.Held([self.layer(x), torch.rand(1)])

class Silent(Base):
    def forward(self, x): return "nothing"

class Private(Base):
    _held = {}
    def forward(self, x): return self.layer(x) * self._held.scale
"""


ENDS_WELL = re.compile("outputs: 0|any batch size|batches of up to|not compared|no tensors")


@pytest.mark.parametrize(
    ("name", "form", "inputs", "told"),
    [
        ("Dict", "torchscript", [[[6], "float32"]], "outputs: 0"),
        ("Decided", "torchscript", [[[6], "float32"]], "outputs: 0"),
        ("Dict", "onnx", [[[6], "bfloat16"]], "any batch size"),  # trained in bf16-true
        ("Branches", "onnx", [[[6], "float32"]], "--format onnx: the network cannot be written so: "),
        ("Branches", "state_dict", [], "loaded again, and not compared"),  # it is called with keywords
        ("Counts", "onnx", [[[6], "float32"]], "; batches of up to 8; largest difference"),
        ("Wide", "onnx", [[[1, 8, 8], "float32"]], "; any batch size; largest difference"),
        ("Double", "onnx", [[[1, 8, 8], "float64"]], "--format onnx: the network cannot be written so: "),
        ("Holding", "state_dict", [[[6], "float32"]], "the exported network differs by"),
        ("Silent", "state_dict", [[[6], "float32"]], "there are no tensors in what the network returns"),
        ("Private", "state_dict", [[[6], "float32"]], "'dict' object has no attribute 'scale'"),
    ],
)
def test_unusual_networks(
    name: str, form: str, inputs: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (tmp_path / "unusual_nets.py").write_text(UNUSUAL)
    monkeypatch.syspath_prepend(tmp_path)
    checkpoint(tmp_path / "a.ckpt", f"unusual_nets.{name}", {}, inputs)
    assert main(["export", str(tmp_path / "a.ckpt"), "--format", form]) == (0 if ENDS_WELL.search(told) else 2)
    printed = capfd.readouterr()
    assert told in printed.out + printed.err
    if inputs and name in ("Dict", "Decided", "Branches"):
        assert costs.count(build({"class_path": f"unusual_nets.{name}"}), ()).keys() == {"parameters", "size_bytes"}


def test_a_detector_of_mmdet_for_its_own_class(tmp_path: Path) -> None:
    checkpoint(tmp_path / "a.ckpt", "lightning_kd.models.MMDetModel", MMDET, [[[3, 64, 64], "float32"]])
    assert main(["export", str(tmp_path / "a.ckpt"), "--format", "state_dict", "--traceback"]) == 0
    import mmdet  # noqa: PLC0415 - the operations that it asks of mmcv are there since the model is
    from mmengine.config import Config  # noqa: PLC0415
    from mmengine.registry import MODELS, DefaultScope  # noqa: PLC0415

    config = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / f"{MMDET['config']}.py")
    changed = MMDET["overrides"] | {"bbox_head.num_classes": 3, "backbone.init_cfg": None}
    config.merge_from_dict({f"model.{name}": value for name, value in changed.items()})
    with DefaultScope.overwrite_default_scope("mmdet"):
        plain = MODELS.build(config.model)
    assert type(plain).__module__.startswith("mmdet.")
    plain.load_state_dict(torch.load(tmp_path / "a.state_dict.pt", weights_only=True), strict=True)


STUDENT = "lightning_kd.models.AnomalyNet", {"width": 2, "level_channels": [4, 8, 16]}, [[[3, 32, 32], "float32"]]
LEVELS = ["level1", "level2"]


def difference_of_two(folder: Path, **more: Any) -> StudentTeacher:
    """``a.ckpt`` of a student whose difference to the teacher, ``teacher.pt``, detects anomalies; the detector."""
    teacher = AnomalyNet(width=4).eval()
    torch.save(teacher.state_dict(), folder / "teacher.pt")
    network = {"class_path": "lightning_kd.models.AnomalyNet", "init_args": {"width": 4}}
    frozen = {"model": network, "checkpoint": str(folder / "teacher.pt")}
    task = {"class_path": "lightning_kd.tasks.AnomalyDetection", "init_args": {"difference": LEVELS, "smoothing": 1.0}}
    deployed = {
        "task": task,
        "teacher": {"class_path": "lightning_kd.teachers.Frozen", "init_args": frozen},
        "teacher_input": None,
        "fingerprint": fingerprint(teacher),
    }
    student = checkpoint(folder / "a.ckpt", *STUDENT, deployed=deployed | more)
    return StudentTeacher(student, teacher, LEVELS, smoothing=1.0).eval()


def test_a_difference_is_exported_with_its_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detector = difference_of_two(tmp_path)
    assert main(["export", str(tmp_path / "a.ckpt"), "--format", "onnx", "--traceback"]) == 0
    assert "any batch size, height and width" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 48, 80)
    maps, scores = session.run(["anomaly_map", "pred_score"], {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = detector(images)
    torch.testing.assert_close(torch.from_numpy(maps), expected.anomaly_map, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(scores), expected.pred_score, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["torchscript", "state_dict"])
def test_a_difference_in_the_other_formats(form: str, tmp_path: Path) -> None:
    detector = difference_of_two(tmp_path)
    assert main(["export", str(tmp_path / "a.ckpt"), "--format", form, "--traceback"]) == 0
    if form == "state_dict":
        plain = StudentTeacher(AnomalyNet(width=2, level_channels=(4, 8, 16)), AnomalyNet(width=4), LEVELS)
        plain.load_state_dict(torch.load(tmp_path / "a.state_dict.pt", weights_only=True), strict=True)
        for key, value in plain.teacher.state_dict().items():
            assert torch.equal(value, detector.teacher.state_dict()[key])


def test_a_teacher_that_was_moved_is_given_and_another_refused(tmp_path: Path, capfd: Any) -> None:
    difference_of_two(tmp_path)
    export = ["export", str(tmp_path / "a.ckpt"), "--format", "state_dict"]
    (tmp_path / "teacher.pt").rename(tmp_path / "moved.pt")
    assert main(export) == 2
    assert "No checkpoint at" in capfd.readouterr().err
    assert main([*export, "--teacher", str(tmp_path / "moved.pt")]) == 0
    torch.save(AnomalyNet(width=4).state_dict(), tmp_path / "other.pt")
    assert main([*export, "--teacher", str(tmp_path / "other.pt")]) == 2
    assert "the teacher is not the one of the training" in capfd.readouterr().err
    difference_of_two(tmp_path, teacher_input={"lightning_kd": "function", "of": "my_module.crop"})
    assert main(export) == 2
    assert "the teacher is called by a function, teacher_input=my_module.crop" in capfd.readouterr().err
    difference_of_two(tmp_path, task={"class_path": "torch.nn.ReLU"})
    assert main(export) == 2
    assert "it names no task and teacher of what runs in the end" in capfd.readouterr().err
    checkpoint(tmp_path / "a.ckpt", *STUDENT)
    assert main([*export, "--teacher", str(tmp_path / "moved.pt")]) == 2
    assert "--teacher: expected a run whose teacher is part of what is exported" in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_says_what_is_deployed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    renormalized = {"from_mean": [0.45] * 3, "from_std": [0.15] * 3, "to_mean": [0.5] * 3, "to_std": [0.5] * 3}
    given = {"class_path": "lightning_kd.teachers.Renormalize", "init_args": renormalized}
    short = [
        "--trainer.max_epochs", "1", "--teacher_fit.max_epochs", "1", "--trainer.enable_progress_bar", "false",
        "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "0", "--trainer.log_every_n_steps", "1",
        "--trainer.check_val_every_n_epoch", "1", "--model.teacher_input", json.dumps(given),
    ]  # fmt: skip
    models: list[Any] = []
    monkeypatch.setattr(command.DistillationCLI, "after_fit", lambda cli: models.append(cli.model))
    assert main(["fit", "--config", "textures_stfpm", *short, "--traceback"]) == 0
    module = models[-1].eval()
    (file,) = (tmp_path / "runs").rglob("*.ckpt")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exported = Saved(file).model(images)
        found = module.predict_step((images, torch.zeros(2, 64, 64)), 0)
    torch.testing.assert_close(exported, found)
    detector = StudentTeacher(module.student, module.teacher.model, module.task.difference).eval()
    with torch.no_grad():
        assert not torch.allclose(detector(images).anomaly_map, found.anomaly_map, rtol=1e-2)  # without teacher_input


def test_a_teachers_file_is_no_students(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"student.weight": torch.zeros(1)}}, tmp_path / "teacher.ckpt")
    (tmp_path / "teacher.ckpt.json").write_text("{}")
    assert main(["export", str(tmp_path / "teacher.ckpt"), "--format", "state_dict"]) == 2
    assert "teacher.ckpt is a teacher's file" in capsys.readouterr().err
