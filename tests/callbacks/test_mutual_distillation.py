"""Mutual distillation in a module that knows nothing of it: its metrics, hooks, optimizer and checkpoints."""

import copy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_kd.callbacks import (
    Distillation,
    MutualDistillation,
    TemperatureScheduler,
    WeightScheduler,
)
from lightning_kd.tasks import Classification
from project import QUIET
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_kd import DistillationModule, Term, losses, schedules, teachers


class Net(nn.Module):
    def __init__(self, width: int = 5, save: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Tanh())
        self.head = nn.Linear(width, 4)
        self.save = save

    def forward(self, x: Tensor) -> Tensor:
        features = checkpoint(self.body, x, use_reentrant=False) if self.save else self.body(x)
        return self.head(features)


class Lit(LightningModule):
    """Of a user, with a metric object, a hook that computes one, and a list of what was called."""

    def __init__(self, model: nn.Module | None = None, data: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model", "data"])
        self.model = Net() if model is None else model
        self.data = data
        self.temperature = nn.Parameter(torch.ones(()))
        self.accuracy, self.by_hook = MulticlassAccuracy(4, average="micro"), MulticlassAccuracy(4, average="micro")
        self.called: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.model(batch[0]) / self.temperature, batch[1])
        self.log("my_loss", loss, on_step=True)
        return loss

    def _evaluate(self, batch: Any, stage: str) -> None:
        logits = self.model(batch[0])
        self.accuracy(logits, batch[1])
        self.by_hook.update(logits, batch[1])
        self.log_dict({f"{stage}_acc": self.accuracy})

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self.log("val_by_hook", self.by_hook.compute())
        self.by_hook.reset()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loader(start: int = 0) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 6, generator=generator), torch.randint(0, 4, (64,), generator=generator)
    return DataLoader(TensorDataset(x[start : start + 32], y[start : start + 32]), batch_size=8)


pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def mutual(*peers: nn.Module, terms: dict[str, Term] | None = None, **kwargs: Any) -> MutualDistillation:
    kd = {"kd": Term(losses.KD(temperature=2.0))}
    return MutualDistillation(list(peers) or [Net(7)], terms or kd, **{"student": "model"} | kwargs)


def trainer(*callbacks: Callback, **kwargs: Any) -> Trainer:
    saves = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    options = {"max_epochs": 2, "enable_checkpointing": saves, "num_sanity_val_steps": 0}
    return Trainer(callbacks=list(callbacks), **QUIET | options | kwargs)


def fit(module: LightningModule, *callbacks: Callback, **kwargs: Any) -> Trainer:
    run = trainer(*callbacks, **kwargs)
    run.fit(module, loader(), loader(32))
    return run


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def accuracy(network: nn.Module) -> float:
    x, y = loader(32).dataset.tensors
    with torch.no_grad():
        return float((copy.deepcopy(network).eval()(x).argmax(1) == y).float().mean())


# --- metrics and hooks


@pytest.mark.parametrize("sanity", [0, 2])
def test_every_peer_has_metrics_of_its_own(sanity: int) -> None:
    module, peers = Lit(), [Net(7), Net(9)]
    run = fit(module, mutual(*peers), num_sanity_val_steps=sanity)
    for prefix, network in {"": module.model, "peer1/": peers[0], "peer2/": peers[1]}.items():
        for name in ("val_acc", "val_by_hook"):
            assert float(run.callback_metrics[prefix + name]) == pytest.approx(accuracy(network))
        assert float(run.callback_metrics[f"{prefix}my_loss"]) > 0
    assert len({accuracy(network) for network in (module.model, *peers)}) > 1


HOOKS = [
    *("setup", "configure_model", "configure_optimizers", "teardown", "training_step", "validation_step"),
    *("on_fit_start", "on_fit_end", "on_before_zero_grad", "on_after_backward", "on_before_optimizer_step"),
    *(f"on_{loop}{when}_{end}" for loop in ("train", "validation") for when in ("", "_epoch", "_batch")
      for end in ("start", "end")),
]  # fmt: skip


class Counted(Lit):
    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__(model)
        self.counts: Counter[str] = Counter()


def _counting(name: str) -> Any:
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.counts[name] += 1
        return getattr(super(Counted, self), name)(*args, **kwargs)

    return hook


for name in HOOKS:
    setattr(Counted, name, _counting(name))


def test_the_hooks_of_a_copy_are_called_like_the_students() -> None:
    module, callback = Counted(), mutual()
    fit(module, callback)
    (peer,) = callback._others
    assert module.counts["on_train_batch_end"] == module.counts["on_after_backward"] == 8
    once = {"setup": 1, "configure_model": 1}  # the copy is of a module that is ready
    assert dict(peer.module.counts) == dict(module.counts)
    assert {name: module.counts[name] for name in once} == once


def test_the_hooks_of_a_peer_that_is_a_lightning_module_are_called_and_no_others() -> None:
    class Silent(Lit):
        def on_after_backward(self) -> None:
            raise AssertionError("of the student alone")

    module, peer = Lit(), Counted(Net(7))
    fit(module, mutual(peer))
    assert set(peer.counts) == set(HOOKS)
    assert peer.counts["on_before_zero_grad"] == 8
    assert peer.counts["setup"] == peer.counts["configure_model"] == 1


def test_batch_hooks_get_the_outputs_of_their_own_network() -> None:
    class Outputs(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "who": self.model.head.in_features}

        def validation_step(self, batch: Any, batch_idx: int) -> int:
            super().validation_step(batch, batch_idx)
            return self.model.head.in_features

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert not outputs["loss"].requires_grad
            self.called.append(("train", outputs["who"]))

        def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.called.append(("val", outputs))

    module, callback = Outputs(), mutual()
    fit(module, callback, max_epochs=1)
    for it, width in ((module, 5), (callback._others[0].module, 7)):
        assert it.called == [("train", width)] * 4 + [("val", width)] * 4


def test_a_data_set_in_the_module_is_not_copied() -> None:
    class Big(Dataset):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError

    data, callback = Big(), mutual()
    fit(Lit(data=data), callback)
    assert callback._others[0].module.data is data


# --- the optimizer


@pytest.mark.parametrize("write", ["all", "model", "groups", "others", "head", "no head"])
def test_every_parameter_is_in_the_group_of_its_kind_once(write: str) -> None:
    class Configured(Lit):
        def configure_optimizers(self) -> Any:
            head = {id(p) for p in self.model.head.parameters()}
            rest = [p for p in self.parameters() if id(p) not in head]
            groups: Any = {
                "all": [self.parameters()],
                "model": [self.model.parameters()],
                "groups": [[p for p in self.parameters() if (p.ndim > 1) == decays] for decays in (True, False)],
                "others": [self.model.head.parameters(), rest],
                "head": [self.model.head.parameters()],
                "no head": [rest] if isinstance(self.model.head, nn.Identity) else [rest, self.model.head.parameters()],
            }[write]
            return torch.optim.SGD([{"params": list(group)} for group in groups], lr=0.1)

    module, peer = Configured(), Net(7)
    if write == "no head":
        peer.body, peer.head = nn.Linear(6, 4), nn.Identity()
    before, callback = state_of(peer), mutual(peer)
    run = fit(module, callback)
    sizes = [sum(p.numel() for p in group["params"]) for group in run.optimizers[0].param_groups]
    parameters = [p for group in run.optimizers[0].param_groups for p in group["params"]]
    assert len({id(p) for p in parameters}) == len(parameters)
    networks = (module.model, peer)
    heads = [sum(p.numel() for p in net.head.parameters()) for net in networks]
    alls = [sum(p.numel() for p in net.parameters()) for net in networks]
    matrices = sum(p.numel() for net in networks for p in net.parameters() if p.ndim > 1)
    expected = {
        "all": [sum(alls) + 2],
        "model": [sum(alls)],
        "groups": [matrices, sum(alls) + 2 - matrices],
        "others": [sum(heads), sum(alls) - sum(heads) + 2],
        "head": [sum(heads)],
        "no head": [alls[0] - heads[0] + 1 + alls[1] + 1, heads[0]],
    }
    assert sizes == expected[write]
    stands_still = torch.equal(peer.body[0].weight, before["body.0.weight"]) if write != "no head" else False
    assert stands_still == (write == "head")


def test_a_schedule_of_the_learning_rate_steps_once() -> None:
    class Scheduled(Lit):
        def configure_optimizers(self) -> Any:
            made = torch.optim.SGD(self.parameters(), lr=0.1)
            return {"optimizer": made, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(made, 0.5)}

    run = fit(Scheduled(), mutual())
    assert len(run.lr_scheduler_configs) == 1
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.025)


def test_accumulated_micro_batches_give_the_full_batch() -> None:
    results = []
    for size, accumulate in ((16, 1), (4, 4)):
        seed_everything(0)
        nets = [Net(), Net(7)]
        for net in nets:
            net.body[1] = nn.Identity()
        data = DataLoader(loader().dataset, batch_size=size)
        trainer(mutual(nets[1]), accumulate_grad_batches=accumulate).fit(Lit(nets[0]), data, loader(32))
        results.append([state_of(net) for net in nets])
    torch.testing.assert_close(results[0], results[1])


# --- what may stand around it


@pytest.mark.parametrize("options", [{"gradient_clip_val": 0.01}, {"precision": "bf16-mixed"}], ids=str)
def test_the_trainers_options(options: dict[str, Any]) -> None:
    peer = Net(7)
    before = state_of(peer)
    fit(Lit(), mutual(peer), **options)
    for key in ("body.0.weight", "head.weight"):
        moved = (peer.state_dict()[key] - before[key]).norm()
        assert 0 < moved < (0.01 * 0.1 * 8 * 10 + 1e-6 if "gradient_clip_val" in options else 10)


@pytest.mark.parametrize("how", ["compiled", "gradient checkpointing"])
def test_peers_that_are_compiled_or_checkpointed_learn_the_same(how: str) -> None:
    hint = Term(losses.FitNet(), student="body", teacher="body", weight=0.5)
    results = []
    for special in (False, True):
        seed_everything(0)
        student, peer = Net(save=special and how != "compiled"), Net(7, save=special and how != "compiled")
        student.body[1] = peer.body[1] = nn.Identity()  # a recomputed norm counts twice
        given = torch.compile(peer, backend="eager") if special and how == "compiled" else peer
        fit(Lit(student), mutual(given, terms={"hint": copy.deepcopy(hint), "kd": Term(losses.KD())}))
        results.append([state_of(student), state_of(peer)])
    torch.testing.assert_close(results[0], results[1])


def test_what_is_scheduled_is_so_for_every_network_and_ends_with_the_fit() -> None:
    seen: list[dict[str, float]] = []

    class See(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if "train/kd/" in k})

    callback = mutual(Net(7), Net(9), terms={"kd": Term(losses.KD(temperature=2.0), weight=0.3)})
    scheduled = (TemperatureScheduler("kd", schedules.Linear(8.0, 1.0)), WeightScheduler("kd", lambda done: 1 - done))
    module = Lit()
    fit(module, *scheduled, callback, See())
    for step, values in enumerate(seen):
        for name in ("", "peer1/", "peer2/"):
            assert values[f"{name}train/kd/temperature"] == pytest.approx(8.0 - 7.0 * step / 8)
            assert values[f"{name}train/kd/weight"] == pytest.approx(1 - step / 8)
    fit(module, callback, max_epochs=1)
    for distiller in callback._distillers:
        ((_, term),) = distiller.named_terms()
        assert (term.loss.temperature, term.weight, term.schedules) == (2.0, 0.3, {})


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("as_dict", [False, True])
def test_several_calls_per_step_and_a_dict(calls: int, as_dict: bool) -> None:
    class Step(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = sum(F.cross_entropy(self.model(batch[0] + i), batch[1]) for i in range(calls))
            return {"loss": loss, "extra": 1} if as_dict else loss

    seed_everything(0)
    nets = [nn.Linear(6, 4), nn.Linear(6, 4)]
    expected = copy.deepcopy(nets)
    run = fit(Step(nets[0]), mutual(nets[1], terms={"l2": Term(nn.MSELoss())}), max_epochs=1)
    optimizer = torch.optim.SGD([p for net in expected for p in net.parameters()], lr=0.1, momentum=0.9)
    for x, y in loader():
        outs = [[net(x + i) for i in range(calls)] for net in expected]
        loss = sum(F.cross_entropy(z, y) for own in outs for z in own)
        for a, b in zip(*outs, strict=True):
            loss = loss + (F.mse_loss(a, b.detach()) + F.mse_loss(b, a.detach())) / calls
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for net, other in zip(nets, expected, strict=True):
        torch.testing.assert_close(net.state_dict(), other.state_dict())
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("who", ["all", "peer"])
def test_a_batch_that_one_skips_is_skipped_by_all(who: str) -> None:
    class Skips(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if who == "all" or self.model.head.in_features == 7 else loss

    module, peer = Skips(), Net(7)
    before = [p.detach().clone() for net in (module.model, peer) for p in net.parameters()]
    fit(module, mutual(peer), max_epochs=1)
    same([p.detach() for net in (module.model, peer) for p in net.parameters()], before)


# --- LightningModules, and the module door


def test_peers_may_be_lightning_modules() -> None:
    class Own(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1])

    seed_everything(0)
    nets = [Net(), Net(7)]
    results = []
    for given in ("network", "module"):
        student, peer = copy.deepcopy(nets)
        if given == "network":
            run = fit(Own(student), mutual(peer))
        else:
            run = fit(Own(student), mutual(Own(peer), student=None))
        results.append(([state_of(student), state_of(peer)], run.callback_metrics["peer1/val_acc"]))
    torch.testing.assert_close(results[0], results[1])


def test_the_module_door_is_the_callback_door() -> None:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    class Plain(LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return sgd(self.model.parameters())

    seed_everything(0)
    nets = [Net(7), Net(7, save=True), Net(7)]
    terms = {"kd": Term(losses.KD()), "hint": Term(losses.FitNet(), student="body", teacher="body")}
    results = []
    for door in ("callback", "module"):
        own, (student, *peers) = copy.deepcopy(terms), copy.deepcopy(nets)
        torch.manual_seed(5)
        if door == "callback":
            run = trainer(mutual(*peers, terms=own))
            run.fit(Plain(student), loader())
        else:
            module = DistillationModule(Classification(4), student, teachers.Peers(peers), own, optimizer=sgd)
            run = trainer()
            run.fit(module, loader(), loader(32))
            tested = run.test(module, loader(32), verbose=False)[0]
            assert tested["peer2/test/accuracy"] == pytest.approx(accuracy(peers[1]))
        logged = {k: v for k, v in run.callback_metrics.items() if "train/" in k}
        results.append(([state_of(net) for net in (student, *peers)], logged))
        if door == "callback":
            assert set(logged) >= {"train/loss", "train/task", "peer2/train/task", "peer2/train/hint"}
    same(results[0][0], results[1][0])


# --- checkpoints


def saved(folder: Path, *peers: nn.Module, **kwargs: Any) -> tuple[Lit, MutualDistillation, Path]:
    module, callback = Lit(), mutual(*peers, **kwargs)
    fit(module, callback, ModelCheckpoint(folder, filename="it"))
    return module, callback, folder / "it.ckpt"


def test_a_peer_is_loaded_out_of_the_checkpoint_into_the_plain_network(tmp_path: Path) -> None:
    module, callback, file = saved(tmp_path, Net(7), Net(9))
    assert callback.peers[0].head.in_features == 7
    for i, network in enumerate((module.model, *callback.peers)):
        fresh = Net(network.head.in_features)
        teachers.load_weights(fresh, file, peer=i)
        same(state_of(fresh), state_of(network))
    with pytest.raises(ValueError, match=r"holds no peer 3"):
        teachers.load_weights(Net(), file, peer=3)
    with pytest.raises(ValueError, match=r"does not fit Net"):
        teachers.load_weights(Net(7), file, peer=2)


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_evaluating_a_checkpoint_restores_the_peers_and_keeps_nothing(stage: str, tmp_path: Path) -> None:
    _, callback, file = saved(tmp_path, Net(7))
    expected = accuracy(callback.peers[0])
    hook = state_of(callback._others[0].module)
    fresh, other = Lit(), mutual(Net(7))
    run = trainer(other)
    (measured,) = getattr(run, stage)(fresh, loader(32), ckpt_path=file, verbose=False, weights_only=True)
    assert measured["peer1/test_acc" if stage == "test" else "peer1/val_acc"] == pytest.approx(expected)
    same(state_of(other._others[0].module), hook)
    assert list(fresh._modules) == ["model", "accuracy", "by_hook"]
    before = vars(Lit()).keys()
    assert vars(fresh).keys() == before
    random = Net(7)
    state = state_of(random)
    again = mutual(random)  # what was evaluated is not where the next fit goes on
    trainer(again).test(Lit(), loader(32), verbose=False)
    same(state_of(random), state)


def test_after_a_test_of_a_checkpoint_a_fit_goes_on_from_what_is_there(tmp_path: Path) -> None:
    hint = {"hint": Term(losses.FitNet(), student="body", teacher="body", projector=nn.Linear(5, 5))}
    teacher = Net()
    first = Distillation(teacher, copy.deepcopy(hint), "model")
    fit(Lit(), first, ModelCheckpoint(tmp_path, filename="it"))
    callback = Distillation(teacher, copy.deepcopy(hint), "model")
    before = state_of(callback.distiller.terms)
    trainer(callback).test(Lit(), loader(32), ckpt_path=tmp_path / "it.ckpt", verbose=False, weights_only=True)
    fit(Lit(), callback, max_epochs=0)
    same(state_of(callback.distiller.terms), before)


def test_peers_of_another_students_run_are_not_for_this_one(tmp_path: Path) -> None:
    _, callback, file = saved(tmp_path, Net(7))
    with pytest.raises(ValueError, match="another student taught its peers"):
        fit(Lit(), callback)
    evaluated, module = mutual(Net(7)), Lit()
    trainer(evaluated).test(module, loader(32), ckpt_path=file, verbose=False, weights_only=True)
    with pytest.raises(ValueError, match="another student taught its peers"):
        fit(Lit(), evaluated)
    trainer(evaluated, max_epochs=3).fit(Lit(), loader(), loader(32), ckpt_path=file, weights_only=True)


def test_a_second_fit_and_a_test_go_on_with_the_peers_and_their_modules() -> None:
    module, callback = Lit(), mutual()
    run = fit(module, callback, max_epochs=1)
    peer = callback._others[0].module
    between = state_of(peer)
    assert not torch.equal(peer.temperature, module.temperature)
    (measured,) = run.test(module, loader(32), verbose=False)
    assert measured["peer1/test_acc"] == pytest.approx(accuracy(callback.peers[0]))
    same(state_of(peer), between)
    fit(module, callback, max_epochs=1)
    assert callback._others[0].module is peer
    assert not torch.equal(peer.temperature, between["temperature"])


def test_resume_is_exact_with_projectors_in_both_directions(tmp_path: Path) -> None:
    def run(resume: Path | None = None) -> list[Any]:
        seed_everything(1)
        given = nn.Linear(5, 7)  # the student's; the peer's is built
        hint = Term(losses.FitNet(), student="body", teacher="body", projector=given)
        module, callback = Lit(), mutual(Net(7), terms={"hint": hint, "kd": Term(losses.KD())})
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer(callback, keep, max_epochs=2).fit(module, loader(), loader(32), ckpt_path=resume, weights_only=True)
        learned = [state_of(distiller) for distiller in callback._distillers]
        return [state_of(module), state_of(callback._others[0].module), *learned]

    whole = run()
    assert set(whole[3]) == {"terms.hint.projector.weight", "terms.hint.projector.bias"}
    same(run(tmp_path / "epoch=0.ckpt"), whole)


# --- what is refused


def shared() -> MutualDistillation:
    module.model.head = peer.head
    return mutual(peer)


class Twice(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        more = 0.0 * self.model(batch[0]).sum() if self.model.head.in_features == 7 else 0.0
        return super().training_step(batch, batch_idx) + more


class Odd(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return "nothing" if self.model.head.in_features == 7 else loss


def crossed() -> MutualDistillation:
    return mutual(Net(), Net(), terms={"hint": Term(losses.FitNet(), student="body", teacher="head")})


def wide() -> MutualDistillation:
    return mutual(Net(7), Net(9), terms={"hint": Term(losses.FitNet(), student="body", teacher="body")})


module, peer = Lit(), Net()


@pytest.mark.parametrize(
    ("lit", "make", "message"),
    [
        (Lit, lambda: [mutual(student=None)], r"Net is a plain network, and the student is all of Lit\. Say where"),
        (lambda: module, lambda: [shared()], "peer1 shares parameters with another of the networks"),
        (Lit, lambda: [mutual(), Distillation(Net(), {"o": Term(losses.KD())}, "model")], "is the only one of the"),
        (Twice, lambda: [mutual()], r"called student 1 times, peer1 2 times: the calls of the networks cannot"),
        (Odd, lambda: [mutual()], r"returned a loss for the student and 'nothing' for peer1"),
        (Lit, lambda: [wide()], r"'hint': what student is to imitate has different shapes, \(2, 7\) and \(2, 9\)"),
        (Lit, lambda: [crossed()], "with more than two networks all compare the same path"),
        (Lit, lambda: [mutual(terms={"h": Term(losses.FitNet(), student="bod")})], r"Closest: 'body'"),
    ],
)
def test_mistakes_are_told_and_leave_nothing_behind(lit: Any, make: Any, message: str) -> None:
    it = lit()
    with pytest.raises(ValueError, match=message):
        fit(it, *make())
    assert "training_step" not in vars(it)
    assert "_distillation" not in it._modules
    assert not it.model._forward_hooks


def test_views_of_their_own_are_not_for_peers() -> None:
    for view in ("teacher_input", "student_input"):
        with pytest.raises(ValueError, match=f"{view}.* not for peers|not for peers"):
            DistillationModule(
                Classification(4), Net(), teachers.Peers([Net()]), {"kd": Term(losses.KD())}, **{view: lambda x: x}
            )


def test_another_number_of_peers_does_not_resume(tmp_path: Path) -> None:
    *_, file = saved(tmp_path, Net(7), Net(9))
    run = trainer(mutual(Net(7)), ModelCheckpoint(tmp_path, filename="other"))
    with pytest.raises(ValueError, match="holds 2 peers of the student, and here are 1"):
        run.fit(Lit(), loader(), loader(32), ckpt_path=file, weights_only=True)


def test_all_networks_see_the_same_noise() -> None:
    class Noisy(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0] + torch.randn_like(batch[0])), batch[1])

    module = Noisy()
    callback = mutual(copy.deepcopy(module.model))
    run = fit(module, callback, max_epochs=1)
    assert float(run.callback_metrics["train/kd"]) == pytest.approx(0.0, abs=1e-7)
    assert torch.equal(module.model.head.weight, callback.peers[0].head.weight)


def test_evaluation_before_a_fit_leaves_the_peers_to_learn() -> None:
    peer, module = Net(7), Lit()
    callback = mutual(peer)
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(callbacks=[callback], **quiet).validate(module, loader(), verbose=False)
    assert peer.training
    before = peer.body[1].running_mean.clone()
    fit(module, callback, max_epochs=1)
    assert not torch.equal(peer.body[1].running_mean, before)


def test_groups_that_do_not_correspond_are_refused() -> None:
    class Layerwise(Lit):
        def configure_optimizers(self) -> Any:
            layers = [layer for layer in self.model.modules() if isinstance(layer, nn.Linear)]
            return torch.optim.SGD([{"params": x.parameters(), "lr": 0.1 * (i + 1)} for i, x in enumerate(layers)])

    peer = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="2 groups with different settings for the student and 3 for a peer"):
        fit(Layerwise(), mutual(peer))


def test_a_checkpoint_without_peers_measures_none(tmp_path: Path) -> None:
    fit(Lit(), ModelCheckpoint(tmp_path, filename="alone"))
    with pytest.raises(ValueError, match="holds 0 peers of the student, and here are 1"):
        trainer(mutual(Net(7))).test(Lit(), loader(32), ckpt_path=tmp_path / "alone.ckpt", weights_only=True)


@pytest.mark.parametrize("stage", ["training", "validation"])
def test_each_peer_gets_the_batch_as_it_came(stage: str) -> None:
    seen: list[list[Tensor]] = []

    class Tidying(Lit):
        def _tidy(self, batch: Any) -> list[Tensor]:
            x, y = batch.pop("x"), batch.pop("y")
            if stage == "training" or not self.training:
                seen.append([x.clone(), y.clone()])
            y.sub_(1)
            return [x, y + 1]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(self._tidy(batch), batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(self._tidy(batch), batch_idx)

    def batches() -> DataLoader[Any]:
        return DataLoader([{"x": x, "y": y} for x, y in loader()], batch_size=None)

    options = {"max_epochs": 1, "limit_val_batches": 4 if stage == "validation" else 0}
    trainer(mutual(Net(4), Net(3)), **options).fit(Tidying(), batches(), batches())
    came = list(loader())
    assert len(seen) == 3 * len(came)
    for i, (x, y) in enumerate(seen):
        assert torch.equal(x, came[i // 3][0])
        assert torch.equal(y, came[i // 3][1])


@pytest.mark.parametrize("kind", [list, SimpleNamespace])
def test_a_step_that_overwrites_what_peers_are_called_with_is_refused(kind: Any) -> None:
    class Scaling(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch if kind is list else (batch.x, batch.y)
            return super().training_step([x.div_(255.0).clone(), y], batch_idx)

    batches = [[x, y] if kind is list else SimpleNamespace(x=x, y=y) for x, y in loader()]
    with pytest.raises(ValueError, match=r"training_step overwrites its batch \(.*\) in place, which the peers'"):
        trainer(mutual(), max_epochs=1).fit(Scaling(), DataLoader(batches, batch_size=None), loader())


def test_peers_are_tested_on_what_came_and_their_hooks_see_their_own_batch() -> None:
    seen: list[Tensor] = []

    class Scaling(Lit):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(batch[0].clone())
            batch.append(self.model(batch[0].div_(255.0)))

        def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("mean", batch[2].mean())

    run = trainer(mutual())
    run.test(Scaling(), loader(), verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert run.callback_metrics["mean"] != run.callback_metrics["peer1/mean"]


@pytest.mark.parametrize("stage", ["train", "validation"])
def test_hooks_before_a_batch_are_of_each_networks_own(stage: str) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Halving(Lit):
        def _halve(self, batch: Any) -> None:
            batch["x"], self.noise = batch["x"] / 2, torch.rand(1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if stage == "train":
                seen.append((batch["x"], self.noise))
            return super().training_step((batch["x"], batch["y"]), batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if stage == "validation":
                seen.append((batch["x"], self.noise))
            super().validation_step((batch["x"], batch["y"]), batch_idx)

    def hook(self: Halving, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._halve(batch)

    setattr(Halving, f"on_{stage}_batch_start", hook)

    def run(*callbacks: Callback) -> list[tuple[Tensor, Tensor]]:
        seen.clear()
        torch.manual_seed(3)
        batches = [DataLoader([{"x": x, "y": y} for x, y in loader()], batch_size=None) for _ in range(2)]
        options = {"max_epochs": 1, "limit_val_batches": 4 if stage == "validation" else 0}
        module = Halving()
        torch.manual_seed(5)
        trainer(*callbacks, **options).fit(module, *batches)
        return list(seen)

    alone, together = run(), run(mutual(Net(4), Net(3)))
    assert len(together) == 3 * len(alone) == 12
    for i, each in enumerate(together):
        assert all(map(torch.equal, each, alone[i // 3]))


def test_a_hook_on_gradients_is_of_each_networks_own() -> None:
    class Halving(Lit):
        def on_after_backward(self) -> None:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad /= 2

    def moved(lit: type[Lit]) -> list[Tensor]:
        torch.manual_seed(0)
        networks = [Net(5), Net(7)]
        before = [each.head.bias.detach().clone() for each in networks]
        fit(lit(networks[0]), mutual(networks[1]), max_steps=1)
        return [each.head.bias.detach() - start for each, start in zip(networks, before, strict=True)]

    for whole, half in zip(moved(Lit), moved(Halving), strict=True):
        assert whole.any()
        torch.testing.assert_close(half, whole / 2)


@pytest.mark.parametrize("where", ["an optimizer", "a list", "a function"])
def test_a_peer_that_no_optimizer_knows_is_told(where: str) -> None:
    class Forgetting(Lit):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.kept: Any = {
                "an optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
                "a list": list(model.parameters()),
                "a function": lambda: torch.optim.SGD(model.parameters(), lr=0.1),
            }[where]

        def configure_optimizers(self) -> Any:
            if isinstance(self.kept, list):
                return torch.optim.SGD(self.kept, lr=0.1)
            return self.kept() if where == "a function" else self.kept

    with pytest.raises(
        ValueError, match=r"6 of the 6 parameters of peer1 are in no optimizer, body\.0\.weight for one"
    ):
        fit(Forgetting(Net(5)), mutual(Net(7)))


def test_what_the_module_has_of_the_student_elsewhere_is_the_peers_in_its_copy() -> None:
    class Twofold(Lit):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.first = model.body
            self.out = nn.Linear(4, 4, bias=False)
            self.out.weight = model.tied

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + self.out(self.model(batch[0])).square().mean()

    def tied(width: int) -> Net:
        network = Net(width)
        network.tied = nn.Parameter(torch.eye(4))
        return network

    callback = mutual(tied(7))
    fit(Twofold(tied(5)), callback, max_epochs=1)
    copied, peer = callback._members[1].module, callback.peers[0]
    assert copied.out.weight is peer.tied
    assert copied.first is peer.body
    with pytest.raises(ValueError, match=r"out\.weight of Twofold is 'tied' of the student, and peer1, a Net, has"):
        fit(Twofold(tied(5)), mutual(Net(7)))


def test_a_peer_may_learn_in_part_as_the_module_says() -> None:
    class OfHeads(Lit):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            model.body.requires_grad_(False)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.head.parameters(), lr=0.1)

    peer = Net(7)
    before = copy.deepcopy(peer.state_dict())
    fit(OfHeads(Net(5)), mutual(peer), max_epochs=1)
    moved = {name for name, value in peer.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"head.weight", "head.bias"}


def test_a_layer_without_weights_may_have_a_second_name() -> None:
    class Aliased(Lit):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.activation = model.body[2]

    fit(Aliased(Net(5)), mutual(nn.Linear(6, 4)), max_epochs=1)


def test_a_peer_of_another_class_gets_the_batch_before_the_students_hook() -> None:
    class Halving(Lit):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            batch[0] = batch[0] / 2

    class Seeing(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    seen: list[Tensor] = []
    fit(Halving(Net(5)), mutual(Seeing(Net(7))), max_epochs=1)
    assert all(torch.equal(x, batch[0]) for x, batch in zip(seen, loader(), strict=True))
