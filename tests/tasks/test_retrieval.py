from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning_kd.callbacks import Distillation
from lightning_kd.tasks import Classification, Retrieval
from project import QUIET
from pytorch_metric_learning.losses import ArcFaceLoss, MultiSimilarityLoss, TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner, MultiSimilarityMiner
from scipy.special import softmax
from scipy.stats import entropy, zscore
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import DistillationModule, Term, losses, teachers
from lightning_kd.cli import main
from lightning_kd.data import UnseenDigits
from lightning_kd.models import Embedder, SmallEmbedder


def net(width: int = 4, dim: int = 16) -> SmallEmbedder:
    return SmallEmbedder(8, dim, in_channels=1, width=width)


def terms() -> dict[str, Term]:
    return {"leaf": Term(losses.LEAF(), student="embedding", teacher="embedding")}


# Construction


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"relevance": "classes"}, "relevance is 'labels' or 'judgments'"),
        ({"recall_at": []}, "recall_at are positive whole numbers"),
        ({"recall_at": [0]}, "recall_at are positive whole numbers"),
        ({"recall_at": [1.5]}, "recall_at are positive whole numbers"),
        ({"recall_at": 1}, "recall_at are positive whole numbers"),
        ({"dims": [0]}, "dims are different positive lengths"),
        ({"dims": [16, 16]}, "dims are different positive lengths"),
        ({"miner": MultiSimilarityMiner()}, "A miner chooses pairs for a criterion"),
        ({"criterion": ArcFaceLoss(num_classes=3, embedding_size=4)}, "ArcFaceLoss has parameters of its own"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Retrieval(**{"criterion": None} | wrong)


# The loss


def test_the_loss_is_that_of_the_library_on_what_the_miner_chose() -> None:
    criterion, miner = TripletMarginLoss(), BatchHardMiner()
    embeddings, labels = torch.randn(12, 4), torch.arange(12) % 3
    expected = criterion(embeddings, labels, miner(embeddings, labels))
    assert expected != criterion(embeddings, labels)
    torch.testing.assert_close(Retrieval(criterion, miner).loss(embeddings, (None, labels)), expected)


def test_there_is_no_loss_in_evaluation() -> None:
    task = Retrieval(TripletMarginLoss()).eval()
    assert task.loss(torch.randn(4, 2), (None, torch.zeros(4, dtype=torch.long))) is None


def test_a_batch_of_one_class_has_nothing_to_tell_apart() -> None:
    with pytest.raises(ValueError, match="All 4 samples of a training batch are of one class"):
        Retrieval(TripletMarginLoss()).loss(torch.randn(4, 2), (None, torch.ones(4, dtype=torch.long)))


def test_no_criterion_needs_a_teacher() -> None:
    task, batch = Retrieval(None), (None, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="learns from a teacher alone, and there is none"):
        task.loss(torch.randn(2, 3), batch)
    module = DistillationModule(task, net(), net(8), terms())
    loss = module.task.loss(torch.randn(2, 3, requires_grad=True), batch)
    assert loss is not None
    assert loss == 0
    assert loss.requires_grad


# What models and data give


def test_embeddings_are_found_in_what_a_model_returns() -> None:
    task, embeddings = Retrieval(None), torch.randn(2, 3)
    others = {"token_embeddings": torch.randn(2, 5, 3)}
    for output in (embeddings, others | {"sentence_embedding": embeddings}, SimpleNamespace(embeddings=embeddings)):
        assert task.embeddings(output) is embeddings
    torch.testing.assert_close(task.predict(embeddings), F.normalize(embeddings))
    torch.testing.assert_close(Retrieval(None, cosine=False).predict(embeddings), embeddings)
    for wrong in (others, torch.randn(2, 3, 4), None):
        with pytest.raises(ValueError, match=r"Retrieval wants embeddings \(B, D\).*override Retrieval.embeddings"):
            task.embeddings(wrong)


def test_inputs_that_are_a_tuple_are_several_arguments() -> None:
    output = Retrieval(None)(nn.Bilinear(2, 3, 4), ((torch.randn(5, 2), torch.randn(5, 3)), None))
    assert output.shape == (5, 4)


@pytest.mark.parametrize("labels", [torch.randn(4), torch.zeros(4, 1, dtype=torch.long), None])
def test_labels_are_one_integer_for_each_sample(labels: Any) -> None:
    with pytest.raises(ValueError, match=r"labels integers \(B,\); got labels"):
        Retrieval(TripletMarginLoss()).loss(torch.randn(4, 2), (None, labels))


@pytest.mark.parametrize("relevant", [None, torch.zeros(4, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long)])
def test_judgments_are_a_row_for_each_sample(relevant: Any) -> None:
    task, batch = Retrieval(None, relevance="judgments"), (None, torch.tensor([0, 1, 2, -1]), relevant)
    with pytest.raises(ValueError, match=r"relevant integers \(4, R\) padded with -1; got"):
        task.update(task.metrics(), torch.randn(4, 2), batch)


def test_judgments_with_grades_are_a_fourth_part_of_the_batch() -> None:
    task, embeddings = Retrieval(None, relevance="judgments"), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
    batch = (embeddings, torch.tensor([7, 8, -1]), torch.tensor([[-1, -1], [-1, -1], [7, 8]]))
    metrics = task.metrics()
    task.update(metrics, embeddings, batch)
    assert metrics.compute().keys() == {"ndcg@10", "mrr@10", "recall@100"}
    for gains, found in (([3, 1], 1.0), ([1, 3], (1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3)))):
        with_gains = (*batch, torch.tensor([[0, 0], [0, 0], gains]))
        metrics, agreement = task.metrics(), task.agreement()
        task.update(metrics, embeddings, with_gains)
        task.update_agreement_batch(agreement, embeddings, embeddings, with_gains)
        assert float(metrics.compute()["ndcg_graded@10"]) == pytest.approx(found)
        assert float(agreement.compute()["asymmetric_ndcg_graded@10"]) == pytest.approx(found)
        assert float(metrics.compute()["ndcg@10"]) == 1.0
    with pytest.raises(ValueError, match=r"gains are numbers \(3, 2\).*; got \(3,\)"):
        task.update(task.metrics(), embeddings, (*batch, torch.arange(3)))


# Runs


@pytest.fixture(scope="module")
def digits() -> UnseenDigits:
    return UnseenDigits()


def test_a_fit_and_its_test_in_the_teachers_index(digits: UnseenDigits) -> None:
    task = Retrieval(MultiSimilarityLoss(), recall_at=(1, 2))
    module = DistillationModule(task, net(), net(8), terms())
    assert task.main_metric == "recall@1"
    trainer = Trainer(max_steps=3, limit_val_batches=2, num_sanity_val_steps=1, **QUIET)
    trainer.fit(module, datamodule=digits)
    assert trainer.callback_metrics["train/leaf"] > 0
    assert "val/loss" not in trainer.callback_metrics
    assert all(key.startswith("student.") for key in module.state_dict())
    (found,) = trainer.test(module, datamodule=digits, verbose=False)
    names = {"recall@1", "recall@2", "map@r"}
    assert found.keys() == {f"test/{kind}{name}" for kind in ("", "asymmetric_") for name in names}
    # In the index of a teacher that is the student itself nothing is asymmetric.
    own = DistillationModule(task, module.student, net(), terms())
    own.teacher.model.load_state_dict(module.student.state_dict())  # type: ignore[union-attr]
    (same,) = Trainer(**QUIET).test(own, datamodule=digits, verbose=False)
    for name in names:
        assert same[f"test/asymmetric_{name}"] == pytest.approx(same[f"test/{name}"], abs=1e-6)
        assert same[f"test/{name}"] == pytest.approx(found[f"test/{name}"], abs=1e-6)


def test_embeddings_are_measured_as_they_are_cut(digits: UnseenDigits) -> None:
    task = Retrieval(MultiSimilarityLoss(), recall_at=(1,), dims=(2, 4))
    module = DistillationModule(task, net(), net(8), terms())
    (found,) = Trainer(**QUIET).test(module, datamodule=digits, verbose=False)
    assert {f"test/{name}_dim{dim}" for name in ("recall@1", "map@r") for dim in (2, 4)} < found.keys()
    assert found["test/recall@1_dim2"] < found["test/recall@1"]
    with pytest.raises(ValueError, match=r"cannot be cut to 999: lower dims"):
        Trainer(**QUIET).test(DistillationModule(Retrieval(None, dims=(999,)), net()), datamodule=digits, verbose=False)


def test_embeddings_of_another_length_are_not_searched_in_the_teachers_index(digits: UnseenDigits) -> None:
    module = DistillationModule(
        Retrieval(None), net(dim=8), net(8), {"rkd": Term(losses.RKD(), student="embedding", teacher="embedding")}
    )
    (found,) = Trainer(limit_test_batches=3, **QUIET).test(module, datamodule=digits, verbose=False)
    assert found.keys() == {"test/recall@1", "test/recall@5", "test/map@r"}


class Plain(LightningModule):
    """A user's module with a loss of metric learning."""

    def __init__(self) -> None:
        super().__init__()
        self.model = net()
        self.criterion = ArcFaceLoss(num_classes=6, embedding_size=16)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return self.criterion(self.model(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_the_callback_on_a_module_with_a_loss_that_learns(digits: UnseenDigits) -> None:
    module = Plain()
    before = module.criterion.W.detach().clone()
    distillation = Distillation(net(8), {"leaf": Term(losses.LEAF())}, student="model")
    trainer = Trainer(max_steps=2, limit_val_batches=1, callbacks=[distillation], **QUIET)
    trainer.fit(module, datamodule=digits)
    assert trainer.callback_metrics["train/leaf"] > 0
    assert not torch.equal(module.criterion.W, before)


def test_a_backbone_of_timm_offers_its_stages() -> None:
    student, teacher = Embedder("mobilenetv3_small_050", 16, 1), Embedder("resnet10t", 16, 1)
    offered = Retrieval(None).knowledge(teacher)
    assert {"embedding", "features.1", "features.4"} <= offered.keys()
    at = Term(losses.AT(), student="features.2", teacher="features.2")
    module = DistillationModule(Retrieval(None), student, teacher, terms() | {"at": at})
    trainer = Trainer(max_steps=1, limit_val_batches=0, **QUIET)
    images = torch.randn(4, 1, 32, 32)
    loader = DataLoader(TensorDataset(images, torch.tensor([0, 0, 1, 1])), batch_size=4)
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["train/at"] > 0
    torch.testing.assert_close(student.eval()(images).norm(dim=1), torch.ones(4))


# Embeddings and images of another size


def batches(images: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images, torch.arange(len(images)) // 2), batch_size=8)


def fast(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def test_a_projector_aligns_embeddings_of_another_length() -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 1, 8, 8)
    student, teacher = net(dim=32), net(8, dim=8)
    fitnet = Term(losses.FitNet(), student="embedding", teacher="embedding")
    module = DistillationModule(Retrieval(None), student, teacher, {"fitnet": fitnet}, optimizer=fast)
    trainer = Trainer(limit_val_batches=0, num_sanity_val_steps=0, **QUIET | {"max_epochs": 40})
    trainer.fit(module, batches(images), batches(images))
    # Nearer than the best that is the same for every image, which is what a student of which nothing is read says.
    assert trainer.callback_metrics["train/fitnet"] < 0.5 * teacher(images).var(0).mean()
    assert all(key.startswith("student.") for key in module.state_dict())
    assert student(images).shape == (16, 32)
    (found,) = Trainer(**QUIET).test(module, batches(images), verbose=False)
    assert found.keys() == {"test/recall@1", "test/recall@5", "test/map@r"}  # 32 numbers do not search an index of 8


def test_what_is_to_search_the_teachers_index_has_its_length() -> None:
    module = DistillationModule(Retrieval(None), net(dim=32), net(8, dim=8), terms())
    loader = batches(torch.randn(8, 1, 8, 8))
    with pytest.raises(ValueError, match=r"'leaf': student \(8, 32\) and teacher \(8, 8\) must be embeddings"):
        Trainer(num_sanity_val_steps=0, **QUIET).fit(module, loader, loader)


@pytest.mark.parametrize("size", [8, 12])
def test_pooled_images_may_have_any_size(size: int) -> None:
    module = DistillationModule(Retrieval(None), net(), net(8), terms())
    loader = batches(torch.randn(8, 1, size, size))
    trainer = Trainer(num_sanity_val_steps=0, **QUIET)
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["train/leaf"] > 0


@pytest.mark.parametrize("size", [(48, 48), (32, 48)])
def test_a_network_of_one_size_says_what_to_do_with_images_of_another(size: tuple[int, int]) -> None:
    options: dict[str, Any] = {"img_size": 32, "depth": 1}
    teacher = Embedder("vit_tiny_patch16_224", 16, 1, options=options)
    module = DistillationModule(Retrieval(None), net(), teacher, terms())
    loader = batches(torch.randn(8, 1, *size))
    told = rf"for images of 32 x 32 pixels, and these are \(8, 1, {size[0]}, 48\): Input .*'img_size': \[{size[0]}, 48"
    with pytest.raises(ValueError, match=told):
        Trainer(num_sanity_val_steps=0, **QUIET).fit(module, loader, loader)
    # What it says to do helps.
    for remedy in ({"img_size": list(size)}, {"dynamic_img_size": True}):
        helped = Embedder("vit_tiny_patch16_224", 16, 1, options=options | remedy)
        assert helped(torch.randn(2, 1, *size)).shape == (2, 16)


def test_an_assertion_that_is_not_about_one_size_is_passed_on_with_the_images() -> None:
    network = Embedder("vit_tiny_patch16_224", 16, 1, options={"depth": 1, "dynamic_img_size": True})
    with pytest.raises(ValueError, match=r"these are \(2, 1, 40, 32\): Input height \(40\) should be div"):
        network(torch.randn(2, 1, 40, 32))


# Teachers that score pairs


class TwoTower(nn.Module):
    """Scores of a query's candidates: the products of embeddings of both."""

    def __init__(self) -> None:
        super().__init__()
        self.asks, self.answers = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)

    def forward(self, lists: tuple[Tensor, Tensor]) -> Tensor:
        queries, candidates = lists
        return torch.einsum("bd,bnd->bn", self.asks(queries), self.answers(candidates))


class CrossEncoder(nn.Module):
    """Scores by a number for each pair, which no product of embeddings needs to be equal to."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.model = nn.Bilinear(3, 3, 1)
        self.scale = scale

    def forward(self, lists: tuple[Tensor, Tensor]) -> Tensor:
        queries, candidates = lists
        scores: Tensor = self.model(queries[:, None].expand_as(candidates).contiguous(), candidates)
        return self.scale * scores.squeeze(2)


def lists() -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Queries (B, 3), candidates (B, N, 3), and the places of those that answer."""
    generator = torch.Generator().manual_seed(0)
    queries, candidates = (torch.randn(*shape, 3, generator=generator) for shape in ((8,), (8, 5)))
    return (queries, candidates), torch.zeros(8, dtype=torch.long)


def taught(teacher: nn.Module, loss: nn.Module, steps: int = 1) -> tuple[TwoTower, float]:
    """Train by the scores alone; returns the student and the term of the last step."""
    student = TwoTower()
    module = DistillationModule(
        Classification(num_classes=5), student, teacher, {"scores": Term(loss)}, task_weight=0.0, optimizer=fast
    )
    trainer = Trainer(limit_val_batches=0, num_sanity_val_steps=0, **QUIET | {"max_epochs": steps})
    trainer.fit(module, DataLoader([lists()], batch_size=None), DataLoader([lists()], batch_size=None))
    return student, float(trainer.callback_metrics["train/scores"])


def test_a_cross_encoder_teaches_a_model_of_embeddings_its_scores() -> None:
    torch.manual_seed(0)
    queries, candidates = (each.numpy() for each in lists()[0])
    teacher = CrossEncoder(1.0)
    weight, bias = (each.detach().numpy() for each in (teacher.model.weight[0], teacher.model.bias))
    says = np.einsum("bi,ij,bnj->bn", queries, weight, candidates) + bias
    torch.manual_seed(1)
    student = TwoTower()
    asks, answers = (layer.weight.detach().numpy() for layer in (student.asks, student.answers))
    said = np.einsum("bd,bnd->bn", queries @ asks.T, candidates @ answers.T)
    torch.manual_seed(1)
    _, listwise = taught(teacher, losses.KD(temperature=1.0))
    assert listwise == pytest.approx(entropy(softmax(says, 1), softmax(said, 1), axis=1).mean(), rel=1e-4)
    torch.manual_seed(1)
    _, margins = taught(teacher, losses.MarginMSE())
    difference = (said - says)[:, :1] - (said - says)[:, 1:]
    assert margins == pytest.approx((difference**2).mean(), rel=1e-4)


def scaled(model: nn.Module) -> Any:
    """Return a model's scores of the lists as z-scores."""
    return zscore(model(lists()[0]).detach().numpy(), axis=1, ddof=1)


def test_two_teachers_teach_their_scores_on_one_scale() -> None:
    torch.manual_seed(0)
    loud, quiet = CrossEncoder(100.0), CrossEncoder(0.01)
    each = [scaled(teacher) for teacher in (loud, quiet)]
    both = teachers.Ensemble([loud, quiet], combine="z-scores")
    loss = losses.Standardized(losses.KD(temperature=1.0))
    torch.manual_seed(1)
    said = scaled(TwoTower())
    says = zscore(np.mean(each, axis=0), axis=1, ddof=1)
    torch.manual_seed(1)
    _, first = taught(both, loss)
    assert first == pytest.approx(entropy(softmax(says, 1), softmax(said, 1), axis=1).mean(), rel=1e-4)
    # The loud one does not decide: what the student has learned is like both.
    student, last = taught(both, loss, steps=200)
    assert last < 0.5 * first
    of_loud, of_quiet, of_both = (np.corrcoef(scaled(student).ravel(), z.ravel())[0, 1] for z in (*each, says))
    assert of_both > max(of_loud, of_quiet)
    assert min(of_loud, of_quiet) > 0.4


@pytest.mark.slow
def test_an_image_embedder_from_the_command_line_to_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    student = ["--model.student", "lightning_kd.models.Embedder", "--model.student.backbone", "mobilenetv3_small_050"]
    teacher = ["--model.teacher.init_args.model", "lightning_kd.models.Embedder"]
    teacher += ["--model.teacher.init_args.model.backbone", "resnet10t"]
    options = [
        f"--model.{side}.{name}"
        for side in ("student", "teacher.init_args.model")
        for name in ("dim=32", "in_channels=1")
    ]
    short = [
        f"--trainer.{name}=1"
        for name in ("max_epochs", "limit_train_batches", "limit_val_batches", "check_val_every_n_epoch")
    ]
    short += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    short += ["--teacher_fit", "null", "--model.teacher.init_args.checkpoint", "null"]
    run = ["fit", "--config", "digits_retrieval_leaf", *student, *teacher, *options, *short]
    assert main([*run, "--traceback"]) == 0
    (checkpoint,) = Path("runs").rglob("*.ckpt")
    assert main(["export", str(checkpoint), "--format", "onnx", "--output", "student.onnx"]) == 0
    session = onnxruntime.InferenceSession("student.onnx", providers=["CPUExecutionProvider"])
    (embeddings,) = session.run(None, {session.get_inputs()[0].name: torch.randn(3, 1, 8, 8).numpy()})
    assert embeddings.shape == (3, 32)
