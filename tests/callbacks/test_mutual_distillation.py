"""Mutual distillation in a module that knows nothing of it: its optimizer, its Trainer, the other door, mistakes."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning_kd.callbacks import Distillation, MutualDistillation, TemperatureScheduler, WeightScheduler
from lightning_kd.tasks import Classification
from mutual import Lit, Net, accuracy, fit, loader, mutual, same, state_of, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_kd import DistillationModule, Term, losses, schedules, teachers

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

    callback = mutual(Net(7), Net(9), terms={"kd": Term(losses.KD(temperature=2.0))})
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
        assert (term.loss.temperature, term.weight, term.schedules) == (2.0, 1.0, {})


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


def test_groups_that_do_not_correspond_are_refused() -> None:
    class Layerwise(Lit):
        def configure_optimizers(self) -> Any:
            layers = [layer for layer in self.model.modules() if isinstance(layer, nn.Linear)]
            return torch.optim.SGD([{"params": x.parameters(), "lr": 0.1 * (i + 1)} for i, x in enumerate(layers)])

    peer = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="2 groups with different settings for the student and 3 for a peer"):
        fit(Layerwise(), mutual(peer))


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
