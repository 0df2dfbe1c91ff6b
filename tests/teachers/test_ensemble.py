import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_kd.tasks import Classification
from processes import run_script
from project import QUIET
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import Distillation, DistillationModule, Distiller, Term, losses
from lightning_kd.teachers import EMA, Ensemble, Frozen, Renormalize, Router


class Says(nn.Module):
    """Says what it is told to, whatever it is asked; after a layer that can be tapped."""

    def __init__(self, answer: Any, feature: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answer = answer
        self.layer = Tells(feature)

    def forward(self, x: Tensor) -> Any:
        self.layer(x)
        return self.answer


class Tells(nn.Module):
    def __init__(self, feature: Any) -> None:
        super().__init__()
        self.feature = feature

    def forward(self, x: Tensor) -> Any:
        return self.feature


def ask(teacher: Ensemble, *paths: str) -> dict[str, list[Any]]:
    teacher.bind(nn.Identity(), paths or ["output"])
    return teacher(torch.zeros(1))


def output(logits: Any, **kwargs: Any) -> np.ndarray:
    return ask(Ensemble([Says(z) for z in logits], **kwargs))["output"][0].numpy()


LOGITS = 3 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))  # K teachers, B samples, C classes


# Means


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_a_loss_of_the_same_temperature_sees_the_mean_of_the_probabilities(weights: Any, temperature: float) -> None:
    z = LOGITS.numpy()
    expected = np.average(softmax(z / temperature, axis=-1), axis=0, weights=weights).astype(np.float32)
    found = output(LOGITS, weights=weights, temperature=temperature)
    np.testing.assert_allclose(softmax(found / temperature, axis=-1), expected, rtol=1e-5)
    student = torch.randn(4, 5)
    log_s = (student / temperature).log_softmax(1)
    kd = temperature**2 * nn.functional.kl_div(log_s, torch.tensor(expected), reduction="batchmean")
    torch.testing.assert_close(losses.KD(temperature)(student, torch.tensor(found)), kd)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_scores_of_any_scale_count_alike(weights: Any) -> None:
    z = LOGITS.double().numpy()
    centred = z - z.mean(-1, keepdims=True)
    low = z.min(-1, keepdims=True)
    expected = {
        "z-scores": centred / z.std(-1, keepdims=True, ddof=1),
        "min-max": (z - low) / (z.max(-1, keepdims=True) - low),
    }
    scaled = LOGITS * torch.tensor([0.01, 1.0, 300.0])[:, None, None] + torch.tensor([5.0, 0.0, -40.0])[:, None, None]
    for combine, brought in expected.items():
        found = output(scaled, combine=combine, weights=weights)
        np.testing.assert_allclose(found, np.average(brought, axis=0, weights=weights), rtol=1e-3, atol=1e-4)
        assert np.isfinite(output(torch.ones(2, 4, 5), combine=combine)).all()  # a model that tells nothing apart


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_the_mean_of_logits(weights: Any) -> None:
    np.testing.assert_allclose(
        output(LOGITS, combine="logits", weights=weights), np.average(LOGITS, axis=0, weights=weights), rtol=1e-5
    )


def test_one_teacher_is_itself() -> None:
    for kwargs in ({"combine": "logits"}, {}, {"weights": "entropy"}, {"weights": [7.0]}, {"temperature": 3.0}):
        found = output(LOGITS[:1], **kwargs)
        np.testing.assert_allclose(softmax(found, axis=-1), softmax(LOGITS[0].numpy(), axis=-1), rtol=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"weights": "confidence"}, {"weights": "entropy"}, {"combine": "logits"}])
def test_the_order_of_the_teachers_does_not_matter(kwargs: Any) -> None:
    np.testing.assert_allclose(output(LOGITS, **kwargs), output(LOGITS.flip(0), **kwargs), rtol=1e-5)


def per_sample(kind: str, z: np.ndarray) -> np.ndarray:
    """(K, B) by definition, in float64."""
    p = softmax(z.astype(np.float64), axis=-1)
    return p.max(-1) if kind == "confidence" else np.exp(-entropy(p, axis=-1))


@pytest.mark.parametrize("kind", ["confidence", "entropy"])
def test_weights_per_sample(kind: str) -> None:
    weights = per_sample(kind, LOGITS.numpy())
    weights /= weights.sum(0)
    expected = (weights[..., None] * softmax(LOGITS.numpy(), axis=-1)).sum(0)
    np.testing.assert_allclose(np.exp(output(LOGITS, weights=kind)), expected, rtol=1e-5)
    logits = (weights[..., None] * LOGITS.numpy()).sum(0)
    np.testing.assert_allclose(output(LOGITS, weights=kind, combine="logits"), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["confidence", "entropy"])
def test_who_is_certain_outweighs_who_is_not_by_the_number_of_classes(kind: str) -> None:
    certain, uncertain = torch.tensor([[100.0, 0.0, 0.0, 0.0]]), torch.zeros(1, 4)
    teacher = Ensemble([Says(certain, certain), Says(uncertain, uncertain)], weights=kind)
    feature = ask(teacher, "layer")["layer"][0]
    torch.testing.assert_close(feature, 0.8 * certain)  # 1 to 1/4


@pytest.mark.parametrize("kind", ["confidence", "entropy"])
def test_dense_logits_have_one_weight_per_sample(kind: str) -> None:
    z = torch.randn(3, 2, 5, 4, 6).numpy()
    weights = (
        np.stack([per_sample(kind, np.moveaxis(own, 1, -1)).mean((-2, -1)) for own in z])
        if kind == ("confidence")
        else np.exp(-np.stack([entropy(softmax(own, axis=1), axis=1).mean((-2, -1)) for own in z]))
    )
    weights /= weights.sum(0)
    expected = (weights[:, :, None, None, None] * softmax(z, axis=2)).sum(0)
    np.testing.assert_allclose(np.exp(output(torch.tensor(z), weights=kind)), expected, rtol=1e-4)


def test_classes_in_another_dimension() -> None:
    z = torch.randn(2, 3, 7, 5)
    found = output(z, dim=-1, weights="entropy", num_classes=5)
    moved = output(z.movedim(-1, 2), weights="entropy")
    np.testing.assert_allclose(found, np.moveaxis(moved, 1, -1), rtol=1e-5)
    with pytest.raises(ValueError, match="logits with 5 classes in dimension 1 are expected"):
        output(z, num_classes=5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("combine", ["probabilities", "logits"])
@pytest.mark.parametrize("weights", [None, "confidence", "entropy", "router"])
@pytest.mark.parametrize("classes", [None, [[0, 1, 2], [2, 1, 0], [0, 2, 1]]])
def test_extreme_logits_give_finite_numbers(dtype: Any, combine: Any, weights: Any, classes: Any) -> None:
    far = 60000.0
    z = torch.tensor([[[far, -far, 0.0]], [[-far, far, far]], [[far, far, far]]], dtype=dtype)
    router = Router(3, 3) if weights == "router" else weights
    kwargs = {"classes": classes, "num_classes": 3} if classes else {}
    teacher = Ensemble([Says(own) for own in z], combine=combine, weights=router, **kwargs)
    answer = ask(teacher)
    assert answer["output"][0].isfinite().all()
    assert answer["output"][0].dtype == torch.float32
    if weights == "router":
        teacher.losses([answer], {"target": torch.tensor([1])})["teacher/router"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in router.parameters())


# Classes


SUBSETS = [[0, 1, 2], [4, 2, 3], [3, 0]]


def test_each_class_is_averaged_over_those_that_know_it() -> None:
    """By definition, with dictionaries."""
    weights = [0.2, 0.5, 0.3]
    z = [torch.randn(1, len(own)) for own in SUBSETS]
    said = [dict(zip(own, softmax(x[0].numpy()), strict=True)) for own, x in zip(SUBSETS, z, strict=True)]
    p, g = np.zeros(5), np.zeros(5)
    for c in range(5):
        known = [(w, s[c]) for w, s in zip(weights, said, strict=True) if c in s]
        p[c] = sum(w * v for w, v in known) / sum(w for w, _ in known)
        g[c] = sum(w * np.log(v) for w, v in known) / sum(w for w, _ in known)
    kwargs: dict[str, Any] = {"weights": weights, "classes": SUBSETS, "num_classes": 5}
    np.testing.assert_allclose(np.exp(output(z, **kwargs)[0]), p / p.sum(), rtol=1e-5)
    np.testing.assert_allclose(output(z, combine="logits", **kwargs)[0], g, rtol=1e-5)


def test_all_classes_in_another_order_are_the_same_ensemble() -> None:
    orders = [torch.randperm(5).tolist() for _ in range(3)]
    shuffled = [z[:, order] for z, order in zip(LOGITS, orders, strict=True)]
    for kwargs in ({}, {"weights": "confidence"}, {"temperature": 4.0}):
        found = output(shuffled, classes=orders, num_classes=5, **kwargs)
        np.testing.assert_allclose(found, output(LOGITS, **kwargs), rtol=1e-4)


def test_specialists_teach_all_classes() -> None:
    z = [torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])]
    found = np.exp(output(z, classes=[[0, 1], [2, 3]], num_classes=4, weights="entropy")[0])
    assert found.sum() == pytest.approx(1.0)
    assert found[0] == found.max()
    assert found[2] == pytest.approx(found[3])


# Structured outputs and features


def test_logits_inside_of_what_is_returned() -> None:
    z = LOGITS[:2]
    for logits, wrap in (
        ("output.logits", lambda x: {"logits": x, "loss": None}),
        ("output[1]", lambda x: ("else", x)),
        ("output.heads[0]", lambda x: {"heads": [x]}),
    ):
        student = nn.Linear(2, 5)
        members = [Says(wrap(own)) for own in z]
        distiller = Distiller({"kd": Term(losses.KD(1.0), teacher=logits)}, Ensemble(members, logits=logits))
        distiller.attach(student)
        with distiller.watch() as calls:
            said = student(torch.randn(4, 2))
        expected = torch.tensor(softmax(z.numpy(), axis=-1).mean(0))
        kl = nn.functional.kl_div(said.log_softmax(1), expected, reduction="batchmean")
        torch.testing.assert_close(distiller(calls)["kd"], kl)
    with pytest.raises(ValueError, match=r"Teacher 0 of the ensemble has at 'output' a dict with the keys 'logits'"):
        ask(Ensemble([Says({"logits": own}) for own in z]))
    with pytest.raises(ValueError, match="logits is a path in what a teacher returns"):
        Ensemble([Says(z)], logits="head")


def test_features_are_averaged_by_the_weights() -> None:
    features = torch.randn(3, 4, 6, 2)
    members = [Says(z, f) for z, f in zip(LOGITS, features, strict=True)]
    found = ask(Ensemble(members, weights=[1.0, 2.0, 5.0]), "layer")
    assert list(found) == ["layer"]
    np.testing.assert_allclose(found["layer"][0], np.average(features, axis=0, weights=[1, 2, 5]), rtol=1e-5, atol=1e-6)
    weights = per_sample("confidence", LOGITS.numpy())
    expected = np.einsum("kb,kbcl->bcl", weights / weights.sum(0), features.numpy())
    layer = ask(Ensemble(members, weights="confidence"), "layer")["layer"][0]
    np.testing.assert_allclose(layer, expected, rtol=1e-4, atol=1e-6)


def test_features_in_tuples_and_of_half_precision() -> None:
    members = [Says(z, (torch.full((4, 2), k, dtype=torch.bfloat16), None)) for k, z in enumerate(LOGITS)]
    mean, nothing = ask(Ensemble(members), "layer")["layer"][0]
    torch.testing.assert_close(mean, torch.ones(4, 2))
    assert nothing is None


@pytest.mark.parametrize(
    "features",
    [
        (torch.zeros(4, 2), torch.zeros(4, 3)),
        (torch.zeros(4, 2), None),
        (torch.zeros(4, 2).long(), torch.zeros(4, 2).long()),
        (torch.zeros(9, 2), torch.zeros(9, 2)),
    ],
)
def test_features_without_a_mean_are_refused(features: Any) -> None:
    members = [Says(z, f) for z, f in zip(LOGITS, features, strict=False)]
    with pytest.raises(ValueError, match="features at 'layer' have no mean"):
        ask(Ensemble(members, weights="entropy"), "layer")


def test_calls_are_paired() -> None:
    class Twice(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.times, self.layer = times, nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = self.layer(x)
            return x

    def asked(*times: int) -> Any:
        teacher = Ensemble([Twice(n) for n in times])
        teacher.bind(nn.Identity(), ["layer"])
        return teacher, teacher(torch.ones(2, 3))["layer"]

    teacher, found = asked(2, 2)
    a, b = (member.model.layer for member in teacher.frozen)
    with torch.no_grad():
        x = torch.ones(2, 3)
        torch.testing.assert_close(found[0], (a(x) + b(x)) / 2)
        torch.testing.assert_close(found[1], (a(a(x)) + b(b(x))) / 2)
    with pytest.raises(ValueError, match="called 'layer' 1, 2 times"):
        asked(1, 2)


# What does not fit


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"combine": "votes"}, "combine is one of 'probabilities', 'logits', 'z-scores', 'min-max'; got 'votes'"),
        ({"combine": "min-max", "classes": [[0, 1], [1, 2]], "num_classes": 3}, "brings scores of the same candidates"),
        ({"combine": "logits", "temperature": 2.0}, "logits have no temperature"),
        ({"temperature": 0.0}, "temperature must be a positive finite number"),
        ({"weights": [1.0]}, "weights are 2 finite numbers above 0"),
        ({"weights": [1.0, 0.0]}, "weights are 2 finite numbers above 0.*left out"),
        ({"weights": "votes"}, "weights are 'confidence', 'entropy', a Router or numbers; got 'votes'"),
        ({"weights": Router(3, 5)}, "The router is for 3 teachers, and there are 2"),
        ({"classes": [[0, 1], [1, 2]]}, "together with num_classes"),
        ({"classes": [[0, 1, 2]], "num_classes": 3}, "for each of the 2 teachers"),
        ({"classes": [[0, 1], [1, 2]], "num_classes": 4}, r"No teacher knows the classes \[3\]"),
        ({"classes": [[0, 1], [1, 3]], "num_classes": 3}, r"different numbers in \[0, 3\); got \[1, 3\]"),
        ({"classes": [[0, 1], [2, 2]], "num_classes": 3}, r"different numbers in \[0, 3\); got \[2, 2\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kwargs: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Ensemble([Says(None), Says(None)], **kwargs)


def test_what_is_no_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one teacher"):
        Ensemble([])
    for other in (EMA(), "resnet18", Net):
        with pytest.raises(TypeError, match=r"trained models or teachers\.Frozen"):
            Ensemble([Says(None), other])  # type: ignore[list-item]


def test_logits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different shapes, \(4, 5\), \(4, 3\).*classes="):
        output([LOGITS[0], LOGITS[1][:, :3]])
    with pytest.raises(ValueError, match=r"Teacher 1 .* shape \(4, 5\), and logits with 2 classes"):
        output(LOGITS[:2], classes=[[0, 1, 2, 3, 4], [1, 2]], num_classes=5)
    with pytest.raises(ValueError, match=r"Teacher 0 .* with 7 classes"):
        output(LOGITS, num_classes=7)
    with pytest.raises(ValueError, match=r"Teacher 0 .* tensor of shape \(4,\)"):
        output(LOGITS[:, :, 0])
    with pytest.raises(ValueError, match="The router is for 4 classes, and there are 5"):
        output(LOGITS, weights=Router(3, 4))
    with pytest.raises(ValueError, match=r"balance is a weight, 0 or more; got -1"):
        Router(2, 2, balance=-1.0)


# In training


class Net(nn.Module):
    def __init__(self, width: int = 4, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width) if norm else nn.Identity(), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


class Plain(LightningModule):
    """A user's module: no trace of distillation."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.model = Net(norm=norm)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.log("my_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.model.parameters(), lr=0.05)


def loader(batch_size: int = 8) -> DataLoader:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=batch_size)


def trainer(*callbacks: Callback, epochs: int = 1, **kwargs: Any) -> Trainer:
    options = {"max_epochs": epochs, "num_sanity_val_steps": 0}
    return Trainer(callbacks=list(callbacks), **QUIET | options | kwargs)


def ensemble(weights: Any = None, norm: bool = True, **kwargs: Any) -> Ensemble:
    torch.manual_seed(5)
    weights = Router(2, 3, balance=0.1) if weights == "router" else weights
    return Ensemble([Net(8, norm), Frozen(Net(8, norm))], weights=weights, **kwargs)


def distillation(teacher: Ensemble, hint: bool = True) -> Distillation:
    terms = {"kd": Term(losses.KD())}
    if hint:
        terms["hint"] = Term(losses.FitNet(), student="stem", teacher="stem")
    return Distillation(teacher, terms, student="model")


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


KINDS = [None, [1.0, 3.0], "confidence", "entropy", "router"]


@pytest.mark.parametrize("weights", KINDS)
def test_it_teaches_and_stands_still(weights: Any) -> None:
    teacher = ensemble(weights)
    models = [member.model for member in teacher.frozen]
    before, calls = [state_of(model) for model in models], []
    for model in models:
        model.head.register_forward_hook(lambda module, args, out: calls.append(out.requires_grad or module.training))
    module = Plain()
    run = trainer(distillation(teacher, hint=False))
    run.fit(module, loader())
    rehearsed = 0  # KD alone needs no sample
    assert calls == [False] * 2 * (4 + rehearsed)
    assert all(same(old, state_of(model)) for old, model in zip(before, models, strict=True))
    assert all(p.grad is None for model in models for p in model.parameters())
    assert ("train/teacher/router" in run.callback_metrics) == (weights == "router")


@pytest.mark.parametrize("weights", KINDS)
def test_nothing_is_left_behind_and_the_checkpoint_holds_no_teacher(weights: Any, tmp_path: Path) -> None:
    teacher = ensemble(weights)
    callback, module = distillation(teacher), Plain()
    run = trainer(callback)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    checkpoint = torch.load(tmp_path / "it.ckpt", weights_only=True)
    Plain().load_state_dict(checkpoint["state_dict"], strict=True)
    (kept,) = [state for key, state in checkpoint["callbacks"].items() if key.startswith("Distillation{")]
    learned = {key.split(".")[0] for key in kept["learned"]}
    assert learned == ({"terms", "teacher_learner"} if weights == "router" else {"terms"})
    module.trainer = None
    for net in (module, *(member.model for member in teacher.frozen)):
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    for made in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        distiller = made.distiller
        assert distiller.teacher_learner is distiller.teacher.learner
        distiller.teacher.bind(Net(), ["output"])
        teacher.bind(Net(), ["output"])
        x = torch.ones(2, 6)
        torch.testing.assert_close(distiller.teacher(x)["output"][0], teacher(x)["output"][0])
        distiller.teacher.unbind()
        teacher.unbind()


def test_an_unknown_path_leaves_nothing_behind() -> None:
    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = self.stem
            del self.stem

    teacher = Ensemble([Net(), Other()])
    distiller = Distiller({"hint": Term(losses.FitNet(), student="stem", teacher="stem")}, teacher)
    with pytest.raises(ValueError, match=r"the teacher \(Other\) has no module 'stem'"):
        distiller.attach(Net())
    assert not any(part._forward_hooks for part in teacher.modules())


def test_a_teacher_that_shares_the_students_weights_is_refused() -> None:
    student = Net()
    with pytest.raises(ValueError, match="shares 6 parameters with the student"):
        Ensemble([Net(), student]).bind(student, ["output"])


def test_each_teacher_has_its_own_normalisation() -> None:
    one, other = Net().eval(), Net().eval()
    norm = Renormalize([0.0] * 6, [1.0] * 6, [1.0] * 6, [2.0] * 6)
    teacher, x = Ensemble([one, Frozen(other, input=norm)], combine="logits"), torch.randn(4, 6)
    teacher.bind(Net(), ["output"])
    with torch.no_grad():
        torch.testing.assert_close(teacher(x)["output"][0], (one(x) + other((x - 1) / 2)) / 2)


# The router


def test_a_new_router_is_the_plain_mean() -> None:
    np.testing.assert_allclose(output(LOGITS, weights=Router(3, 5)), output(LOGITS), rtol=1e-5)


def test_the_routers_loss_is_the_cross_entropy_of_the_mixture_and_the_balance() -> None:
    torch.manual_seed(0)
    router, target = Router(3, 5, balance=0.7), torch.tensor([0, 4, 2, 2])
    nn.init.normal_(router.score.weight)
    p = softmax(LOGITS.numpy(), axis=-1)
    with torch.no_grad():
        gates = softmax(router(torch.tensor(p).transpose(0, 1)).numpy(), axis=-1)  # (B, K)
    assert gates.std(0).max() > 0.01
    mixture = np.einsum("bk,kbc->bc", gates, p)
    balance = entropy(np.full(3, 1 / 3), gates.mean(0))
    expected = -np.log(mixture[range(4), target]).mean() + 0.7 * balance
    teacher = Ensemble([Says(z) for z in LOGITS], weights=router)
    answer = ask(teacher)
    assert not answer["output"][0].requires_grad
    found = teacher.losses([answer, answer], {"target": target})
    assert found["teacher/router"].item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="The router learns from the labels, and the batch gave none"):
        teacher.losses([answer], {})


def test_the_gates_have_the_gradient_of_the_mixture() -> None:
    """Equal gates, cross-entropy L: dL/ds_k = -(p_k(y) / sum_j p_j(y) - 1/K), the responsibilities."""
    router, target = Router(3, 5), torch.tensor([0, 4, 2, 2])
    teacher = Ensemble([Says(z) for z in LOGITS], weights=router)
    teacher.losses([ask(teacher)], {"target": target})["teacher/router"].backward()
    right = softmax(LOGITS.numpy(), axis=-1)[:, range(4), target]
    expected = -(right / right.sum(0) - 1 / 3).mean(1)
    np.testing.assert_allclose(router.score.bias.grad, expected, rtol=1e-4, atol=1e-6)


def test_it_learns_whom_to_believe_and_its_student_is_better_off() -> None:
    """Each of two teachers is right about one half of the classes, and surer of nonsense about the other."""

    class Half(nn.Module):
        def __init__(self, mine: list[int]) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.mine = mine

        def forward(self, x: Tensor) -> Tensor:
            true = x[:, :4].argmax(1)
            knows = torch.isin(true, torch.tensor(self.mine))
            said = nn.functional.one_hot(torch.where(knows, true, self.mine[0]), 4)
            return said * torch.where(knows, 2.0, 6.0)[:, None]

    router = Router(2, 4, hidden=16)
    teacher = Ensemble([Half([0, 1]), Half([2, 3])], weights=router)
    student = nn.Linear(6, 4)
    distiller = Distiller({"kd": Term(losses.KD(1.0))}, teacher)
    distiller.attach(student)
    optimizer = torch.optim.Adam([*student.parameters(), *distiller.parameters()], lr=0.02)
    agrees = []
    for _ in range(150):
        x = torch.randn(64, 6)
        target = x[:, :4].argmax(1)
        with distiller.watch() as calls:
            student(x)
        found = distiller(calls, target=target)
        agrees.append((calls[0].teacher["output"][0].argmax(1) == target).float().mean())
        optimizer.zero_grad()
        distiller.total(found).backward()
        optimizer.step()
    assert set(found) == {"kd", "teacher/router"}
    assert torch.stack(agrees[:3]).mean() < 0.4
    assert torch.stack(agrees[-20:]).mean() > 0.95


def test_a_router_of_teachers_that_run_in_inference_mode() -> None:
    class Inference(Net):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    for combine in ("probabilities", "logits"):
        teacher = Ensemble([Inference(), Inference()], combine=combine, weights=Router(2, 3))
        teacher.bind(Net(), ["output"])
        loss = teacher.losses([teacher(torch.randn(4, 6))], {"target": torch.zeros(4).long()})["teacher/router"]
        loss.backward()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_the_router_learns_in_other_precisions(precision: Any) -> None:
    teacher = ensemble("router")
    before = state_of(teacher.learner)
    trainer(distillation(teacher), precision=precision).fit(Plain(), loader())
    assert not torch.equal(teacher.learner.score.weight.float(), before["score.weight"])


def test_resume_is_exact(tmp_path: Path) -> None:
    def run(resume: Path | None = None) -> tuple[LightningModule, Distillation]:
        seed_everything(3)
        module = Plain()
        callback = distillation(ensemble("router"))
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        made = trainer(callback, keep, epochs=2, enable_checkpointing=True)
        made.fit(module, loader(), ckpt_path=resume, weights_only=True)
        return module, callback

    module, callback = run()
    resumed, other = run(tmp_path / "epoch=0.ckpt")
    assert same(state_of(module), state_of(resumed))
    assert same(state_of(callback.distiller), state_of(other.distiller))
    learner = ensemble("router").learner
    assert not torch.equal(callback.distiller.teacher.learner.score.weight, learner.score.weight)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_skipped_batch_and_a_rehearsal_leave_no_answers() -> None:
    class Skips(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    run = trainer(distillation(ensemble("router")))
    run.fit(Skips(), loader(batch_size=10))  # the last batch is smaller
    assert run.callback_metrics["train/teacher/router"].isfinite()


# Through the doors


def test_the_module_door_and_its_agreement() -> None:
    teacher = ensemble("confidence")
    module = DistillationModule(Classification(3), Net(), teacher, {"kd": Term(losses.KD())})
    run = trainer()
    run.fit(module, loader(), loader())
    run.test(module, loader(), verbose=False)
    x = loader().dataset.tensors[0]
    with torch.no_grad():
        p = np.stack([softmax(member.model.eval()(x).numpy(), axis=-1) for member in teacher.frozen])
        said = module.student.eval()(x).argmax(1).numpy()
    weights = p.max(-1)
    expected = ((weights[..., None] * p).sum(0).argmax(1) == said).mean()
    assert float(run.callback_metrics["test/agreement"]) == pytest.approx(expected)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in teacher.modules())
    wrapped = Ensemble([Says({"logits": LOGITS[0]})], logits="output.logits")
    kd = {"kd": Term(losses.KD(), teacher="output.logits")}
    module = DistillationModule(Classification(3), Net(), wrapped, kd)
    run.test(module, loader(), verbose=False)
    assert "test/agreement" not in run.callback_metrics


YAML = """
trainer: {max_epochs: 1, logger: false, enable_checkpointing: false, enable_progress_bar: false,
          enable_model_summary: false, limit_train_batches: 2, limit_val_batches: 0}
data: {class_path: lightning_kd.data.Digits}
model:
  task: {class_path: lightning_kd.tasks.Classification}
  student: {class_path: lightning_kd.models.CifarResNet, init_args: {depth: 8, width: 4, in_channels: 1}}
  teacher:
    class_path: lightning_kd.teachers.Ensemble
    init_args:
      teachers:
        - class_path: lightning_kd.models.CifarResNet
          init_args: {depth: 8, width: 8, in_channels: 1, num_classes: 5}
        - class_path: lightning_kd.teachers.Frozen
          init_args:
            model:
              class_path: lightning_kd.models.CifarResNet
              init_args: {depth: 14, width: 8, in_channels: 1, num_classes: 7}
            input:
              class_path: lightning_kd.teachers.Renormalize
              init_args: {from_mean: [0.0], from_std: [1.0], to_mean: [0.5], to_std: [0.5]}
      weights: {class_path: lightning_kd.teachers.Router, init_args: {members: 2, num_classes: 10}}
      classes: [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7, 8, 9]]
      temperature: 4.0
  terms:
    kd: {loss: {class_path: lightning_kd.losses.KD}, weight: 0.9}
"""


@pytest.mark.filterwarnings("ignore:(?s).*was deprecated in v4.49")  # Lightning's own call, as in cli.main
@pytest.mark.parametrize("weights", [None, "entropy", "[1.0, 2.0]"])
def test_the_yaml_door(weights: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_kd.cli.command import DistillationCLI  # noqa: PLC0415 - it imports much

    monkeypatch.chdir(tmp_path)
    (tmp_path / "it.yaml").write_text(YAML)
    change = [f"--model.teacher.init_args.weights={weights}"] if weights else []
    cli = DistillationCLI(["fit", "--config", "it.yaml", *change])
    teacher = cli.model.teacher
    assert isinstance(teacher, Ensemble)
    assert teacher.num_classes == 10  # from the data
    assert isinstance(teacher.frozen[1].input, Renormalize)
    assert cli.trainer.callback_metrics["train/kd"] > 0
    shares = teacher.log_weights.exp().flatten().tolist()
    assert shares == pytest.approx([1 / 3, 2 / 3] if weights == "[1.0, 2.0]" else [0.5, 0.5])
    assert (teacher.router is not None) == (weights is None)
    assert teacher.judged_by == ("entropy" if weights == "entropy" else None)


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_ensemble import Plain, distillation, ensemble, loader, trainer
from lightning.pytorch import LightningDataModule, seed_everything
from torch.utils.data import DataLoader, DistributedSampler
from lightning_kd.teachers import Router

class Halves(LightningDataModule):
    def train_dataloader(self):
        data, run = loader().dataset, self.trainer
        sampler = DistributedSampler(data, run.world_size, run.global_rank, shuffle=False)
        return DataLoader(data, batch_size=16 // run.world_size, sampler=sampler)

if __name__ == "__main__":
    strategy, devices = sys.argv[2], int(sys.argv[3])
    seed_everything(0)
    module = Plain(norm=False)
    teacher = ensemble(Router(2, 3), norm=False)
    run = trainer(distillation(teacher, hint=False), epochs=2, strategy=strategy, devices=devices,
                  use_distributed_sampler=False)
    run.fit(module, Halves())
    if run.is_global_zero:
        torch.save({**module.state_dict(), **teacher.learner.state_dict()}, f"{strategy}.pt")
"""


@pytest.mark.slow
def test_two_processes_are_the_same_training(tmp_path: Path) -> None:
    found = []
    for strategy, ranks in (("auto", 1), ("ddp", 2)):
        said = run_script(SCRIPT, str(Path(__file__).parent), strategy, str(ranks), folder=tmp_path, ranks=ranks)
        assert "unused" not in said
        found.append(torch.load(tmp_path / f"{strategy}.pt", weights_only=True))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], msg=key)
