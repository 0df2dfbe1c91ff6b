"""anomalib's Engine with this library's students, and its own modules with this library's callback."""

# ruff: noqa: PLC0415 - anomalib takes seconds to import, and a collection of all tests should not wait for it

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning_kd.tasks import AnomalyDetection, Classification
from project import QUIET
from torch.nn import functional as F
from torchvision.models import squeezenet1_1
from torchvision.transforms.v2.functional import to_pil_image

from lightning_kd import Distillation, DistillationModule, Term, losses, projectors, teachers
from lightning_kd.data import Textures, UnrelatedImages
from lightning_kd.metrics import AnomalyQuality
from lightning_kd.models import (
    AnomalyNet,
    EfficientADStudent,
    MemoryBank,
    PatchDescriber,
    ResidualReverseDistillation,
    ReverseDistillation,
    SideBySide,
)

pytestmark = [
    pytest.mark.slow,
    # Of the frozen teacher inside of a detector; anomalib's own are told the same.
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training"),
    # anomalib's own: it logs without a batch size, and uses an older transform of torchvision's.
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection"),
    pytest.mark.filterwarnings("ignore:The transform `ToTensor..` is deprecated"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
]

SHORT = {
    "accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False,
    "limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1,
}  # fmt: skip
LAYERS = ["features.4", "features.7"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bricks in folders, as anomalib's Folder reads them."""
    root = tmp_path_factory.mktemp("bricks")
    module = Textures(train_size=8, val_size=2, test_size=8, synthetic=0.0, batch_size=2)
    for stage in ("fit", "test"):
        module.setup(stage)
    for folder in ("good", "good_test", "spoiled", "masks"):
        (root / folder).mkdir()
    for i in range(8):
        to_pil_image(module.splits["train"][i][0]).save(root / "good" / f"{i}.png")
        image, target = module.splits["test"][i]
        to_pil_image(image).save(root / ("spoiled" if target["label"] else "good_test") / f"{i}.png")
        if target["label"]:
            to_pil_image(255 * target["mask"].byte()).save(root / "masks" / f"{i}.png")
    return root


@pytest.fixture
def folder(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    import timm
    from anomalib.data import Folder

    create = timm.create_model  # anomalib would download weights
    monkeypatch.setattr(timm, "create_model", lambda *args, **how: create(*args, **{**how, "pretrained": False}))
    monkeypatch.chdir(tmp_path)

    def make(batch_size: int = 4) -> Any:
        return Folder(
            name="bricks", root=root, normal_dir="good", abnormal_dir="spoiled", normal_test_dir="good_test",
            mask_dir="masks", train_batch_size=batch_size, eval_batch_size=2 * batch_size, num_workers=0,
            val_split_mode="same_as_test",
        )  # fmt: skip

    return make


def _pre_processor() -> Any:
    from anomalib.pre_processing import PreProcessor
    from torchvision.transforms.v2 import Resize

    return PreProcessor(transform=Resize((64, 64), antialias=True))


def test_a_student_of_ours_runs_in_the_engine(folder: Callable[..., Any], tmp_path: Path) -> None:
    from anomalib.engine import Engine
    from lightning_kd.tasks.anomalib import StudentTeacherModule

    student, teacher = squeezenet1_1(), squeezenet1_1()
    module = StudentTeacherModule(
        student, teacher, LAYERS, optimizer=torch.optim.AdamW, pre_processor=_pre_processor(), visualizer=True
    )
    before, fresh = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    engine = Engine(**SHORT, default_root_dir=tmp_path, logger=False)
    data = folder()
    engine.fit(module, datamodule=data)
    assert all(engine.trainer.callback_metrics[f"train/stfpm{i}"] > 0 for i in range(2))
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert any(not torch.equal(value, fresh[key]) for key, value in student.state_dict().items())
    (measured,) = engine.test(module, datamodule=data, verbose=False)
    assert {"image_AUROC", "pixel_AUROC", "image_F1Score"} <= set(measured)
    assert list(tmp_path.rglob("images/**/*.png"))  # of the visualiser

    engine.trainer.save_checkpoint("module.ckpt")
    content = torch.load("module.ckpt", weights_only=True)
    assert not any("teacher" in key for key in content["state_dict"])
    again = StudentTeacherModule(squeezenet1_1(), teacher, LAYERS)
    again.load_state_dict(content["state_dict"] | {f"model.teacher.{k}": v for k, v in before.items()})
    loaded = StudentTeacherModule.load_from_checkpoint(
        "module.ckpt", student=squeezenet1_1(), teacher=teacher, levels=LAYERS, pre_processor=_pre_processor()
    ).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), module.eval().model(images))
        assert loaded(images).pred_mask.shape[-2:] == (64, 64)  # what anomalib exports
    assert not any(part._forward_hooks for part in module.modules())


def test_a_network_that_teaches_itself_runs_in_the_engine(folder: Callable[..., Any], tmp_path: Path) -> None:
    from anomalib.engine import Engine
    from lightning_kd.tasks.anomalib import StudentTeacherModule

    network, again = (ReverseDistillation("resnet18", image_size=(64, 64), pretrained=False) for _ in range(2))
    compared: dict[str, Any] = {"levels": ["decoder[:]"], "teacher_levels": ["encoder[:]"], "combine": "sum"}
    compared |= {"smoothing": 2.0, "pre_processor": _pre_processor()}
    module = StudentTeacherModule(network, network, optimizer=torch.optim.AdamW, visualizer=False, **compared)
    engine = Engine(**SHORT, default_root_dir=tmp_path, logger=False)
    data = folder()
    engine.fit(module, datamodule=data)
    assert engine.trainer.callback_metrics["train/stfpm0"] > 0
    (measured,) = engine.test(module, datamodule=data, verbose=False)
    assert {"image_AUROC", "pixel_AUROC"} <= set(measured)
    engine.trainer.save_checkpoint(tmp_path / "module.ckpt")
    keys = torch.load(tmp_path / "module.ckpt", weights_only=True)["state_dict"]
    assert not any("teacher" in key for key in keys)
    loaded = StudentTeacherModule.load_from_checkpoint(
        tmp_path / "module.ckpt", student=again, teacher=again, visualizer=False, **compared
    ).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), module.eval().model(images))


@pytest.fixture(scope="module")
def mvtec_ad(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same bricks, in folders as MVTec AD has them."""
    made = tmp_path_factory.mktemp("mvtec")
    for source, target in (
        ("good", "train/good"), ("good_test", "test/good"), ("spoiled", "test/crack"), ("masks", "ground_truth/crack"),
    ):  # fmt: skip
        (made / "brick" / target).mkdir(parents=True)
        for path in (root / source).iterdir():
            name = f"{path.stem}_mask.png" if source == "masks" else path.name
            (made / "brick" / target / name).write_bytes(path.read_bytes())
    return made


def _detector(kind: str) -> dict[str, Any]:
    """What a module of a detector is made of."""
    if kind == "STFPM":
        return {"student": squeezenet1_1(), "teacher": squeezenet1_1(), "levels": LAYERS}
    if kind == "residual reverse":
        network = ResidualReverseDistillation("resnet10t", pretrained=False)
        compared = {"levels": ["decoder[:]"], "teacher_levels": ["encoder[:]"], "combine": "sum"}
        terms = {"rd": Term(losses.RD4AD(), student="decoder[:]", teacher="encoder[:]")}
        how = {"smoothing": 4.0, "weights": [1 / 16, 1 / 16, 1 / 4, 1.0], "terms": terms}
        return {"student": network, "teacher": network, **compared, **how}
    layers = [["fine.level1", "fine.level2"], ["deep.features.4", "deep.features.7"]]
    student, teacher = (SideBySide({"fine": AnomalyNet(width=8), "deep": squeezenet1_1()}) for _ in range(2))
    how = {"combine": "sum", "smoothing": 2.0, "weights": [[1, 4], [1, 4]]}
    return {"student": student, "teacher": teacher, "levels": layers, **how}


@pytest.mark.parametrize("kind", ["STFPM", "residual reverse", "MixedTeacher"])
def test_detectors_of_ours_run_on_folders_of_mvtec_ad(kind: str, mvtec_ad: Path, tmp_path: Path) -> None:
    from anomalib.data import MVTecAD
    from anomalib.engine import Engine
    from anomalib.metrics import AUPRO, Evaluator
    from lightning_kd.tasks.anomalib import StudentTeacherModule

    pl.seed_everything(0, verbose=False)
    evaluator = Evaluator(test_metrics=[AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_")])
    module = StudentTeacherModule(
        **_detector(kind),
        optimizer=torch.optim.AdamW,
        pre_processor=_pre_processor(),
        evaluator=evaluator,
        visualizer=False,
    )
    data = MVTecAD(root=mvtec_ad, category="brick", train_batch_size=4, eval_batch_size=8, num_workers=0)
    engine = Engine(**SHORT, default_root_dir=tmp_path, logger=False)
    engine.fit(module, datamodule=data)
    logged = engine.trainer.callback_metrics
    parts = [value for name, value in logged.items() if name.startswith(("train/stfpm", "train/rd"))]
    assert len(parts) == {"STFPM": 2, "residual reverse": 1, "MixedTeacher": 4}[kind]
    assert min(parts) > 0
    (measured,) = engine.test(module, datamodule=data, verbose=False)

    # Of the detector as it is, by this library's metric.
    quality = AnomalyQuality()
    module.eval()
    for batch in data.test_dataloader():
        with torch.no_grad():
            found = module.model(module.pre_processor(batch.image))
        masks = F.interpolate(batch.gt_mask[:, None].float(), found.anomaly_map.shape[-2:])[:, 0].bool()
        quality.update(*found, masks, batch.gt_label.bool())
    assert 0 < measured["pixel_AUPRO"] < 1
    assert abs(measured["pixel_AUPRO"] - float(quality.compute()["aupro"])) < 0.02


def test_efficient_ad_of_ours_runs_in_the_engine(folder: Callable[..., Any], tmp_path: Path) -> None:
    from anomalib.engine import Engine
    from lightning_kd.tasks.anomalib import EfficientADModule

    pl.seed_everything(0, verbose=False)
    describer = PatchDescriber(channels=8, width=4)
    given: dict[str, Any] = {"unrelated": UnrelatedImages(), "pre_processor": _pre_processor(), "visualizer": False}
    module = EfficientADModule(EfficientADStudent(8, (64, 64), width=4), describer, **given)
    fresh = copy.deepcopy(module.model.student.state_dict())
    engine = Engine(**SHORT, default_root_dir=tmp_path, logger=False)
    data = folder()
    engine.fit(module, datamodule=data)
    logged = engine.trainer.callback_metrics
    assert all(logged[f"train/{name}"] > 0 for name in ("hard", "autoencoder", "second", "penalty"))
    parts = [logged[f"train/{name}"] for name in ("hard", "autoencoder", "second", "penalty")]
    torch.testing.assert_close(logged["train/loss"], torch.stack(parts).sum())
    assert any(not torch.equal(value, fresh[key]) for key, value in module.model.student.state_dict().items())

    # What the teacher says of the images of the epoch, one batch here, is standardized.
    assert module.model.teacher.count == 4 * 8 * 8
    # Quantiles are of the normal images of the validation, and its thresholds of maps that are brought by them.
    batch = next(iter(data.val_dataloader()))
    normal = module.pre_processor(batch.image[~batch.gt_label.bool()])
    with torch.no_grad():
        raw = module.model.eval().raw(normal)
        maps = module.model(module.pre_processor(batch.image)).anomaly_map
    expected = [torch.quantile(each.flatten(), torch.tensor([0.9, 0.995])) for each in raw]
    torch.testing.assert_close(module.model.student.quantiles, torch.stack(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(module.post_processor.pixel_max, maps.max())
    (measured,) = engine.test(module, datamodule=data, verbose=False)
    assert {"image_AUROC", "pixel_AUROC", "image_F1Score"} <= set(measured)

    engine.trainer.save_checkpoint(tmp_path / "module.ckpt")
    keys = torch.load(tmp_path / "module.ckpt", weights_only=True)["state_dict"]
    figures = ("count", "idle", "sums", "squares")
    assert {key for key in keys if "teacher" in key} == {f"model.teacher.{name}" for name in figures}
    loaded = EfficientADModule.load_from_checkpoint(
        tmp_path / "module.ckpt", student=EfficientADStudent(8, (64, 64), width=4), teacher=describer, **given
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(normal), module.model(normal))


def test_a_student_that_draws_maps_runs_in_the_engine(folder: Callable[..., Any], tmp_path: Path) -> None:
    from anomalib.engine import Engine
    from lightning_kd.tasks.anomalib import AnomalibDistillation

    student, teacher = AnomalyNet(width=4), AnomalyNet(width=8)
    terms = {"map": Term(losses.FitNet(), student="anomaly_map", teacher="anomaly_map")}
    how: dict[str, Any] = {"terms": terms, "optimizer": torch.optim.AdamW, "visualizer": False}
    module = AnomalibDistillation(AnomalyDetection(), student, teacher, **how, pre_processor=_pre_processor())
    engine = Engine(**SHORT, default_root_dir=tmp_path, logger=False)
    data = folder()
    engine.fit(module, datamodule=data)
    logged = engine.trainer.callback_metrics
    torch.testing.assert_close(logged["train/loss"], logged["train/task"] + logged["train/map"])
    assert min(logged["train/task"], logged["train/map"]) > 0
    (measured,) = engine.test(module, datamodule=data, verbose=False)
    assert "image_AUROC" in measured
    with pytest.raises(TypeError, match="task is an AnomalyDetection in anomalib's modules, got Classification"):
        AnomalibDistillation(Classification(2), student, teacher, **how)


def _own(name: str) -> tuple[Any, str, Term]:
    """A module of anomalib, where its student is, and a term with a bigger network of ImageNet's kind."""
    from anomalib import models

    how = {"pre_processor": _pre_processor()}
    if name == "Stfpm":  # by a projector that is made for the shapes
        own, student = models.Stfpm(layers=["layer1", "layer2"], **how), "model.student_model"
        return own, student, Term(losses.FitNet(), student="feature_extractor.layer1", teacher="features.4")
    if name == "ReverseDistillation":  # what is called with the images is the whole
        own = models.ReverseDistillation(backbone="resnet18", **how)
        return own, "model", Term(losses.FitNet(), student="decoder[0]", teacher="features.4")
    # Its training step cannot be rehearsed before the training begins, so the term is given its projector.
    projector = projectors.MapToMap(768, 128, (63, 63))
    return models.EfficientAd(), "model.student", Term(losses.FitNet(), 1.0, "conv4", "features.4", projector)


@pytest.mark.parametrize("name", ["Stfpm", "ReverseDistillation", "EfficientAd"])
def test_anomalib_s_own_learn_from_a_bigger_teacher_through_the_callback(
    name: str, folder: Callable[..., Any], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anomalib.engine import Engine

    module, student, term = _own(name)
    callback = Distillation(teacher=squeezenet1_1(), student=student, terms={"hint": term})
    how = dict(SHORT)
    if name == "EfficientAd":  # would download its teacher, and Imagenette
        module.imagenet_dir = root
        how["limit_val_batches"] = 0  # its quantiles are of all images
        monkeypatch.setattr(type(module), "prepare_pretrained_model", lambda module: None)
    engine = Engine(**how, default_root_dir=tmp_path, logger=CSVLogger(tmp_path), callbacks=[callback])
    engine.fit(module, datamodule=folder(1 if name == "EfficientAd" else 4))
    logged = engine.trainer.callback_metrics
    assert logged["train/hint"] > 0
    torch.testing.assert_close(logged["train/loss"], logged["train/task"] + logged["train/hint"])
    assert not any(part._forward_hooks for part in module.modules())
    assert not any("projector" in key for key in module.state_dict())


def test_a_model_of_anomalib_is_a_student_whose_teacher_is_a_part_of_it(
    folder: Callable[..., Any], tmp_path: Path
) -> None:
    from anomalib.models.image.stfpm.loss import STFPMLoss
    from anomalib.models.image.stfpm.torch_model import STFPMModel

    layers = ["layer1", "layer2"]
    model = STFPMModel(layers=layers)
    before = copy.deepcopy(model.state_dict())
    module = DistillationModule(
        task=AnomalyDetection(),
        student=model,
        teacher=teachers.Itself(),
        terms={
            name: Term(
                losses.STFPM(),
                student=f"student_model.feature_extractor.{name}",
                teacher=f"teacher_model.feature_extractor.{name}",
            )
            for name in layers
        },
        optimizer=lambda parameters: torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.4),
    )
    data = Textures(train_size=4, val_size=4, test_size=4, batch_size=4, synthetic=0.0)
    trainer = pl.Trainer(**QUIET | {"max_steps": 1, "limit_val_batches": 0})
    trainer.fit(module, datamodule=data)
    images, _ = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    fresh = STFPMModel(layers=layers)
    fresh.load_state_dict(before)
    theirs = STFPMLoss()(*fresh.train()(images)) / len(images)  # a sum over the batch
    found = trainer.callback_metrics
    torch.testing.assert_close(found["train/layer1"] + found["train/layer2"], theirs.detach())
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if key.startswith("teacher_model."))
    assert any(not torch.equal(after[key], value) for key, value in before.items())
    (measured,) = trainer.test(module, datamodule=data, verbose=False)
    assert 0 <= measured["test/image_auroc"] <= 1


def _filled(name: str) -> tuple[Any, str]:
    """A model of anomalib that has seen normal images, and the path of its early features."""
    from anomalib.models.image.padim.torch_model import PadimModel
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    how: dict[str, Any] = {"layers": ["layer1"], "backbone": "resnet18", "pre_trained": False}
    network = PadimModel(**how, n_features=16) if name == "PaDiM" else PatchcoreModel(**how)
    bank = MemoryBank(network, image_size=(64, 64), vectors=50)
    filled = DistillationModule(AnomalyDetection(normal_only=True), bank, optimizer=torch.optim.AdamW)
    data = Textures(train_size=16, val_size=4, batch_size=16, synthetic=0.0)
    pl.Trainer(**QUIET | {"max_epochs": 1, "limit_val_batches": 0}).fit(filled, datamodule=data)
    return bank, "network.feature_extractor.feature_extractor.layer1"


@pytest.mark.parametrize("name", ["Stfpm", "PatchCore", "PaDiM"])
def test_a_small_network_learns_maps_and_features_of_a_trained_model(
    name: str, folder: Callable[..., Any], tmp_path: Path
) -> None:
    from anomalib import models
    from anomalib.engine import Engine

    pl.seed_everything(0, verbose=False)
    if name == "Stfpm":
        own = models.Stfpm(layers=["layer1", "layer2"], pre_processor=_pre_processor(), visualizer=False)
        Engine(**SHORT, default_root_dir=tmp_path, logger=CSVLogger(tmp_path)).fit(own, datamodule=folder())
        teacher, features = own.model, "student_model.feature_extractor.layer1"
    else:
        teacher, features = _filled(name)
    before = copy.deepcopy(teacher.state_dict())
    module = DistillationModule(
        task=AnomalyDetection(),
        student=AnomalyNet(width=4),
        teacher=teacher,
        terms={
            "map": Term(losses.PKD(), student="output", teacher="output.anomaly_map"),
            "hint": Term(losses.FitNet(), student="level1", teacher=features),
        },
        task_weight=0.0,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    )
    data = Textures(train_size=16, val_size=8, batch_size=16)
    steps: dict[str, list[float]] = {"map": [], "hint": []}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            for term, values in steps.items():
                values.append(float(trainer.callback_metrics[f"train/{term}"]))

    trainer = pl.Trainer(callbacks=Watch(), **QUIET | {"max_epochs": 8, "limit_val_batches": 0})
    trainer.fit(module, datamodule=data)
    assert all(0 < values[-1] < values[0] for values in steps.values()), steps
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_a_small_network_learns_the_maps_of_patchcore() -> None:
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    normal = Textures(train_size=16, synthetic=0.0, batch_size=16)
    normal.setup("fit")
    patchcore = PatchcoreModel(layers=["layer2"], backbone="resnet18", pre_trained=False)
    with torch.no_grad():
        patchcore.train()(normal.on_after_batch_transfer(next(iter(normal.train_dataloader())), 0)[0])
    patchcore.subsample_embedding(sampling_ratio=0.1)
    before = copy.deepcopy(patchcore.state_dict())
    module = DistillationModule(
        task=AnomalyDetection(),
        student=AnomalyNet(width=8),
        teacher=patchcore,
        terms={"map": Term(losses.PKD(), student="anomaly_map", teacher="anomaly_map")},
        task_weight=0.0,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    )
    data = Textures(train_size=32, test_size=16, batch_size=16)
    trainer = pl.Trainer(**QUIET | {"max_epochs": 6, "limit_val_batches": 0})

    def correlation() -> float:
        data.setup("test")
        images, _ = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
        with torch.no_grad():
            maps = [net.eval()(images) for net in (module.student, patchcore)]
        return float(torch.corrcoef(torch.stack([maps[0].flatten(), maps[1].anomaly_map.flatten()]))[0, 1])

    untrained = correlation()
    trainer.fit(module, datamodule=data)
    assert correlation() > max(0.3, untrained + 0.2)
    assert all(torch.equal(value, before[key]) for key, value in patchcore.state_dict().items())
    (measured,) = trainer.test(module, datamodule=data, verbose=False)
    assert "test/image_auroc" in measured


@pytest.mark.usefixtures("folder")  # without pretrained weights
def test_the_maps_of_dinomaly_teach() -> None:
    from anomalib.models.image.dinomaly.torch_model import DinomalyModel

    pl.seed_everything(0, verbose=False)
    teacher = DinomalyModel("vit_small_patch14_reg4_dinov2")
    before = copy.deepcopy(teacher.state_dict())
    module = DistillationModule(
        task=AnomalyDetection(),
        student=AnomalyNet(width=4),
        teacher=teacher,
        terms={"map": Term(losses.PKD(), student="output", teacher="output.anomaly_map")},
        optimizer=torch.optim.AdamW,
    )
    data = Textures(size=56, train_size=8, batch_size=8)  # patches of 14
    trainer = pl.Trainer(**QUIET | {"max_steps": 1, "limit_val_batches": 0})
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["train/map"] > 0
    images, _ = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    with torch.no_grad():
        assert teacher.eval()(images).anomaly_map.std() > 0
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_a_decoder_learns_what_its_own_encoder_saw() -> None:
    from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode, AnomalyMapGenerator

    pl.seed_everything(0, verbose=False)
    network = ReverseDistillation("resnet18", image_size=(64, 64), pretrained=False)
    module = DistillationModule(
        task=AnomalyDetection(
            difference=["decoder[:]"],
            teacher_difference=["encoder[:]"],
            combine="sum",
            smoothing=2.0,
            align_corners=True,
        ),
        student=network,
        teacher=teachers.Itself(),
        terms={"rd": Term(losses.RD4AD(flatten=True), student="decoder[:]", teacher="encoder[:]")},
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3, betas=(0.5, 0.999)),
    )
    data = Textures(train_size=16, val_size=8, test_size=8, batch_size=8)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    steps: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            steps.append(float(trainer.callback_metrics["train/rd"]))

    trainer = pl.Trainer(callbacks=Watch(), **QUIET | {"max_epochs": 4, "limit_val_batches": 0})
    trainer.fit(module, datamodule=data)
    assert steps[-1] < 0.75 * steps[0]
    for key, value in network.state_dict().items():
        if key.startswith("encoder."):
            assert torch.equal(value, before[key])
    assert any(not torch.equal(value, before[key]) for key, value in network.state_dict().items())

    # One pass gives the map, which is that of both networks apart.
    images, _ = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    calls: list[Any] = []
    network.encoder.register_forward_hook(lambda *_: calls.append(1))
    found = module.task.deployed(network).eval()(images)
    assert len(calls) == 1
    with torch.no_grad():
        levels = [*network.encoder(images).values()]
        decoded = network.decoder(network.bottleneck(levels))
        expected = AnomalyMapGenerator((64, 64), sigma=2, mode=AnomalyMapGenerationMode.ADD)(decoded, levels)
    torch.testing.assert_close(found.anomaly_map, expected.squeeze(1), rtol=1e-4, atol=1e-5)
    (measured,) = trainer.test(module, datamodule=data, verbose=False)
    assert "test/image_auroc" in measured
