"""EfficientAD through the module, and against anomalib's own network."""

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_kd.tasks import EfficientAD
from project import QUIET
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kd import DistillationModule, Distiller, Term, losses
from lightning_kd.data import Textures, UnrelatedImages
from lightning_kd.models import (
    AnomalyNet,
    EfficientADDetector,
    EfficientADStudent,
    FeatureDescriber,
    PatchDescriber,
    SqueezeNetFeatures,
    Standardized,
)


def _terms() -> dict[str, Term]:
    return {
        "hard": Term(losses.EfficientAD(), student="output.local", teacher="output"),
        "autoencoder": Term(losses.FitNet(), student="output.autoencoder", teacher="output"),
    }


def _module(unrelated: Any = None, teacher: nn.Module | None = None) -> DistillationModule:
    return DistillationModule(
        task=EfficientAD(unrelated),
        student=EfficientADStudent(channels=8, image_size=(64, 64), width=4),
        teacher=teacher or PatchDescriber(channels=8, width=8),
        terms=_terms(),
        optimizer=torch.optim.AdamW,
    )


def _data() -> Textures:
    return Textures(train_size=8, val_size=8, test_size=4, batch_size=4, synthetic=0.25)


@pytest.mark.slow
def test_a_run_learns_all_four_losses_and_takes_the_quantiles_of_normal_images() -> None:
    module = _module(UnrelatedImages())
    before = copy.deepcopy(module.teacher.model.state_dict())
    fresh = [parameter.detach().clone() for parameter in module.student.parameters()]
    trainer = pl.Trainer(**QUIET)
    data = _data()
    trainer.fit(module, datamodule=data)
    logged = trainer.callback_metrics
    assert all(logged[f"train/{name}"] > 0 for name in ("hard", "autoencoder", "second", "penalty"))
    torch.testing.assert_close(logged["train/task"], logged["train/second"] + logged["train/penalty"])
    assert all(torch.equal(value, before[key]) for key, value in module.teacher.model.state_dict().items())
    learned = zip(module.student.parameters(), fresh, strict=True)
    assert not any(torch.equal(parameter, other) for parameter, other in learned)

    split = data.splits["val"]
    images, target = data.on_after_batch_transfer(split.__getitems__([*range(len(split))]), 0)
    detector = module.task.deployed(module.student).eval()
    with torch.no_grad():
        raw = detector.raw(images[~target["label"]])
    found = torch.stack([torch.quantile(raw[i].flatten(), torch.tensor([0.9, 0.995])) for i in range(2)])
    torch.testing.assert_close(module.student.quantiles, found, rtol=1e-4, atol=1e-6)
    assert 0 < module.student.quantiles[0, 0] < module.student.quantiles[0, 1]
    kept = module.student.quantiles.clone()
    (measured,) = trainer.test(module, datamodule=data, verbose=False)
    assert 0 <= measured["test/image_auroc"] <= 1
    assert torch.equal(module.student.quantiles, kept)  # the test chooses nothing
    with torch.no_grad():
        expected = (0.1 * (raw - kept[:, :1, None, None]) / (kept[:, 1:] - kept[:, :1])[..., None, None]).mean(0)
        torch.testing.assert_close(detector(images[~target["label"]]).anomaly_map, expected)
        torch.testing.assert_close(pickle.loads(pickle.dumps(module)).eval()(images), module.eval()(images))
    assert detector(images).pred_score.shape == (8,)
    assert {key.split(".")[0] for key in module.state_dict()} == {"student"}


@pytest.mark.slow
def test_it_is_resumed_exactly(tmp_path: Path) -> None:
    """Quantiles, dropout and the choice of unrelated images among the rest."""
    found, teacher = [], PatchDescriber(channels=8, width=8)
    for seed, resumed in ((1, None), (2, tmp_path / "epoch=0.ckpt")):
        pl.seed_everything(seed, verbose=False)
        module = _module(UnrelatedImages(), teacher)
        kept = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "enable_checkpointing": True}, callbacks=[kept])
        trainer.fit(module, datamodule=_data(), ckpt_path=resumed)
        logged = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("train")}
        found.append((module.state_dict(), logged))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_quantiles_of_several_processes_are_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    task, student = EfficientAD(), EfficientADStudent(channels=2, image_size=(64, 64), width=2)
    values = torch.arange(201.0).expand(2, -1)
    for other, expected in ((None, [180.0, 199.0]), (torch.tensor([[20.0, 1.0]] * 2), [100.0, 100.0])):
        if other is not None:  # another process says so
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
            added = [other, torch.ones(())]
            monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, a=added: x.add_(a.pop(0)))
        task.begin_validation()
        task._seen.append(values)
        task.end_validation(student)
        torch.testing.assert_close(student.quantiles, torch.tensor([expected] * 2))
    monkeypatch.undo()
    task.begin_validation()
    task.end_validation(student)
    assert student.quantiles[0, 0] == 100  # where nothing was normal they are what they were


def test_the_penalty_and_another_student() -> None:
    module = _module(lambda images: images + 1)
    images, masks = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64)
    module.train()
    output = module.task(module.student, (images, masks))
    loss = module.task.loss(output, (images, masks))
    penalty = module.student.describer(images + 1)[:, :8].square().mean()
    torch.testing.assert_close(loss, F.mse_loss(output.second, output.autoencoder) + penalty)
    with pytest.raises(TypeError, match=r"is for models.EfficientADStudent; the student returned Tensor"):
        EfficientAD().loss(AnomalyNet(width=2)(images), (images, masks))
    with pytest.raises(ValueError, match="at least 64 x 64 pixels"):
        EfficientADStudent(image_size=(32, 64))


def test_a_standardized_teacher_has_the_figures_of_all_that_it_saw() -> None:
    network = PatchDescriber(channels=5, width=3)
    teacher, images = Standardized(network, channels=5), torch.randn(6, 3, 64, 64)
    for part in images.split(2):
        teacher.train()(part)
    found, maps = teacher.eval()(images), network(images)
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.std((0, 2, 3), correction=0), torch.ones(5))
    normed = F.batch_norm(maps, None, None, training=True, eps=1e-12)
    torch.testing.assert_close(found, normed, rtol=1e-4, atol=1e-4)


def test_an_epoch_takes_a_teacher_s_figures_of_normal_images() -> None:
    teacher, data = Standardized(PatchDescriber(channels=8, width=4), channels=8), _data()
    module = DistillationModule(EfficientAD(), teacher, optimizer=torch.optim.AdamW)
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 1, "num_sanity_val_steps": 2})
    trainer.fit(module, datamodule=data)
    assert 0 <= trainer.callback_metrics["val/image_auroc"] <= 1
    images, target = data.on_after_batch_transfer(data.splits["train"].__getitems__([*range(8)]), 0)
    assert 0 < target["label"].sum() < 8
    expected = copy.deepcopy(Standardized(teacher.network, channels=8)).standardize([images[~target["label"]]])
    assert teacher.count == expected.count > 0
    assert not teacher.idle
    torch.testing.assert_close(teacher.eval()(images), expected(images))
    said = module.task.eval()(teacher, (images, target))
    far = teacher(images).square().mean(1, keepdim=True)
    torch.testing.assert_close(said.anomaly_map, F.interpolate(far, (64, 64), mode="bilinear")[:, 0])
    torch.testing.assert_close(said.pred_score, said.anomaly_map.flatten(1).amax(1))


def test_features_describe_patches() -> None:
    images = torch.randn(2, 3, 64, 48)
    network = nn.Conv2d(3, 8, 8, stride=8)
    found = FeatureDescriber(network, every=4)(images)
    torch.testing.assert_close(found, F.interpolate(network(images)[:, [0, 4]], (16, 12), mode="bilinear"))
    squeeze = SqueezeNetFeatures(levels=[7]).eval()
    assert FeatureDescriber(squeeze)(images).shape == (2, 256, 16, 12)
    with pytest.raises(ValueError, match=r"wants one map \(B, C, h, w\) of its network; got .*name one"):
        FeatureDescriber(SqueezeNetFeatures(levels=[4, 7]))(images)
    with pytest.raises(ValueError, match="every is a step through the channels, 1 or more; got 0"):
        FeatureDescriber(network, every=0)


def test_unrelated_images_come_from_a_folder_or_are_photographs(tmp_path: Path) -> None:
    from PIL import Image  # noqa: PLC0415

    with pytest.raises(FileNotFoundError, match="no images in"):
        UnrelatedImages(str(tmp_path))
    (tmp_path / "a").mkdir()
    Image.new("RGB", (30, 20), (255, 0, 0)).save(tmp_path / "a" / "red.png")
    made = UnrelatedImages(str(tmp_path), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))(torch.zeros(20, 3, 8, 16))
    assert made.shape == (20, 3, 8, 16)
    red = torch.tensor([1.0, 0.0, 0.0])
    assert all(torch.allclose(piece.mean((1, 2)), red) or torch.equal(piece[0], piece[2]) for piece in made)
    torch.manual_seed(0)
    one = UnrelatedImages()(torch.zeros(2, 3, 64, 64))
    torch.manual_seed(0)
    assert torch.equal(UnrelatedImages()(torch.zeros(2, 3, 64, 64)), one)
    assert one.std() > 0.1


def test_a_defect_in_a_corner_is_seen_with_padding_alone() -> None:
    """Without, as in anomalib, 16 pixels at each side are the centre of no patch."""
    images = torch.zeros(1, 3, 64, 64)
    spoiled = images.clone()
    spoiled[..., :4, :4] = 9.0
    for padding in (False, True):
        student = EfficientADStudent(channels=4, image_size=(64, 64), width=4, padding=padding)
        detector = EfficientADDetector(student, PatchDescriber(channels=4, width=4, padding=padding)).eval()
        with torch.no_grad():
            found, flawless = (detector(x).anomaly_map[0, :8, :8] for x in (spoiled, images))
        assert (not torch.equal(found, flawless)) == padding
        assert bool(found.any()) == padding
    detector.teacher = PatchDescriber(channels=4, width=4)
    with pytest.raises(ValueError, match=r"describes \(4, 16, 16\) of an image, and its teacher \(4, 8, 8\)"):
        detector(images)


@pytest.mark.slow
def test_with_padding_the_maps_are_those_of_anomalib() -> None:
    where = pytest.importorskip("anomalib.models.image.efficient_ad.torch_model")
    own = where.EfficientAdModel(teacher_out_channels=4, padding=True, pad_maps=False).eval()
    teacher, student = PatchDescriber(4, padding=True), EfficientADStudent(4, padding=True)
    for mine, other in ((teacher, own.teacher), (student.describer, own.student), (student.autoencoder, own.ae)):
        mine.load_state_dict(dict(zip(mine.state_dict(), other.state_dict().values(), strict=True)))
    images = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        expected = own(images).anomaly_map.squeeze(1)
        mine = EfficientADDetector(student, teacher).eval()(where.imagenet_norm_batch(images)).anomaly_map
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_losses_and_maps_are_those_of_anomalib(monkeypatch: pytest.MonkeyPatch) -> None:
    where = pytest.importorskip("anomalib.models.image.efficient_ad.torch_model")
    channels, mean, std = 16, torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    own = where.EfficientAdModel(teacher_out_channels=channels)
    monkeypatch.setattr(own, "choose_random_aug_image", lambda image: image)  # here images come as they are
    for part in own.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    images, others = torch.rand(1, 3, 256, 256), torch.rand(1, 3, 256, 256)

    def as_ours(x: Tensor) -> Tensor:
        return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)

    described = PatchDescriber(channels)
    described.load_state_dict(own.teacher.state_dict())
    teacher = Standardized(described, channels)
    teacher.train()(as_ours(torch.rand(1, 3, 256, 256)))
    count = teacher.count
    own.mean_std["mean"] = nn.Parameter((teacher.sums / count).float().view(1, -1, 1, 1))
    deviation = (teacher.squares / count - (teacher.sums / count).square()).sqrt()
    own.mean_std["std"] = nn.Parameter(deviation.float().view(1, -1, 1, 1))
    student = EfficientADStudent(channels)
    student.describer.load_state_dict(own.student.state_dict())
    theirs = own.ae.state_dict().values()
    student.autoencoder.load_state_dict(dict(zip(student.autoencoder.state_dict(), theirs, strict=True)))
    student.autoencoder.dropout.p = 0.0

    own.train()
    loss_st, loss_ae, loss_stae = own(images, others)
    task = EfficientAD(lambda _: as_ours(others))
    distiller = Distiller(_terms(), teacher.eval())
    distiller.attach(student.train())
    task.meet(student, teacher)
    batch = as_ours(images), torch.zeros(1, 256, 256)
    with distiller.watch() as calls:
        output = task(student, batch)
    found = distiller(calls)
    rest = task.loss(output, batch)
    penalty, second = task.values()["penalty"], task.values()["second"]
    torch.testing.assert_close(found["hard"] + penalty, loss_st, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found["autoencoder"], loss_ae, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(second, loss_stae, rtol=1e-3, atol=1e-5)
    total = distiller.total(found) + rest
    total.backward()
    (loss_st + loss_ae + loss_stae).backward()
    for mine, other in ((student.describer, own.student), (student.autoencoder, own.ae)):
        for (name, one), two in zip(mine.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=2e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    distiller.detach()

    student.eval().quantiles.copy_(torch.tensor([[0.5, 1.5], [0.1, 0.3]]))
    for name, value in (("qa_st", 0.5), ("qb_st", 1.5), ("qa_ae", 0.1), ("qb_ae", 0.3)):
        own.quantiles[name] = nn.Parameter(torch.tensor(value))
    with torch.no_grad():
        expected, mine = own.eval()(images), task.deployed(student).eval()(as_ours(images))
    torch.testing.assert_close(mine.anomaly_map, expected.anomaly_map.squeeze(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mine.pred_score, expected.pred_score.flatten(), rtol=1e-3, atol=1e-4)
