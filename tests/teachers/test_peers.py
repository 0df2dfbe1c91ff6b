"""Peers against deep mutual learning by hand, in plain torch."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_kd.callbacks import MutualDistillation
from project import QUIET
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import Term, losses, teachers


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.Tanh())
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Lit(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(24, 6, generator=generator), torch.randint(0, 4, (24,), generator=generator))
    return DataLoader(data, batch_size=8)


def fit(callback: MutualDistillation, module: LightningModule, epochs: int = 2) -> None:
    run = Trainer(callbacks=[callback], **QUIET | {"max_epochs": epochs})
    run.fit(module, batches())


def networks(count: int) -> list[Net]:
    torch.manual_seed(0)
    return [Net(width) for width in (5, 9, 7)[:count]]


def kl(imitated: Tensor, own: Tensor) -> Tensor:
    """Equation 4 of arXiv 1706.00384: D(p_imitated || p_own), the mean over the batch."""
    p, q = imitated.softmax(-1), own.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def by_hand(nets: list[Net], ensemble: bool = False, epochs: int = 2) -> None:
    """Equations 6 and 7, with the weight 1 of equation 5; all are updated at once."""
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9) for net in nets]
    for _ in range(epochs):
        for x, y in batches():
            logits = [net(x) for net in nets]
            fixed = [z.detach() for z in logits]
            found = []
            for k, z in enumerate(logits):
                others = [sum(fixed) / len(nets)] if ensemble else [o for i, o in enumerate(fixed) if i != k]
                found.append(F.cross_entropy(z, y) + sum(kl(o, z) for o in others) / len(others))
            for optimizer, loss in zip(optimizers, found, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


@pytest.mark.parametrize("imitate", ["each", "ensemble"])
@pytest.mark.parametrize("count", [2, 3])
def test_it_is_deep_mutual_learning(count: int, imitate: Any) -> None:
    nets = networks(count)
    expected = copy.deepcopy(nets)
    by_hand(expected, ensemble=imitate == "ensemble")
    alone = copy.deepcopy(nets[0])
    terms = {"kd": Term(losses.KD(temperature=1.0))}
    fit(MutualDistillation(nets[1:], terms, student="model", imitate=imitate), Lit(nets[0]))
    for net, other in zip(nets, expected, strict=True):
        torch.testing.assert_close(net.state_dict(), other.state_dict())
    assert not torch.allclose(nets[0].head.weight, alone.head.weight, atol=1e-2)


def test_n_networks_run_n_times_and_the_imitated_one_gets_no_gradient() -> None:
    nets = networks(3)
    calls = []
    for i, net in enumerate(nets):
        net.register_forward_hook(lambda *_, i=i: calls.append(i))
    before = copy.deepcopy([net.state_dict() for net in nets[1:]])

    class Blocked(nn.Module):
        """Only the student learns: were the peers given a gradient, they would move."""

        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            assert student.requires_grad
            assert not teacher.requires_grad
            return (student - teacher).square().mean() * (1.0 if student is logits[0] else 0.0)

    logits: list[Tensor] = []
    nets[0].register_forward_hook(lambda module, args, output: logits.__setitem__(slice(None), [output]))
    fit(MutualDistillation(nets[1:], {"l2": Term(Blocked())}, "model", task_weight=0.0), Lit(nets[0]), epochs=1)
    assert calls == [0, 1, 2] * 3
    for net, state in zip(nets[1:], before, strict=True):
        torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)


def test_features_are_projected_in_both_directions() -> None:
    nets = networks(2)
    expected = copy.deepcopy(nets)
    hint = Term(losses.FitNet(), student="body", teacher="body", weight=2.0, projector=nn.Linear(5, 9, bias=False))
    callback = MutualDistillation([nets[1]], {"hint": hint}, "model")

    projectors: list[nn.Module] = []

    class Grab(Lit):
        def on_fit_start(self) -> None:  # what was built for the peer
            projectors[:] = copy.deepcopy([term.projector for _, term in _terms(callback)])

    fit(callback, Grab(nets[0]), epochs=1)
    assert [tuple(p.weight.shape) for p in projectors] == [(9, 5), (5, 9)]
    parameters = [p for part in (*expected, *projectors) for p in part.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
    for x, y in batches():
        a, b = (net.body(x) for net in expected)
        loss = sum(F.cross_entropy(net.head(f), y) for net, f in zip(expected, (a, b), strict=True))
        loss = loss + 2.0 * (F.mse_loss(projectors[0](a), b.detach()) + F.mse_loss(projectors[1](b), a.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for net, other in zip(nets, expected, strict=True):
        torch.testing.assert_close(net.state_dict(), other.state_dict())
    learned = [term.projector for _, term in _terms(callback)]
    for projector, other in zip(learned, projectors, strict=True):
        torch.testing.assert_close(projector.state_dict(), other.state_dict())


def _terms(callback: MutualDistillation) -> Any:
    return [pair for distiller in callback._distillers for pair in distiller.named_terms()]


def test_different_paths_change_sides_with_the_direction() -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.top = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return self.top(self.trunk(x))

    seen: list[tuple[int, ...]] = []

    class See(nn.Module):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            seen.append((student.shape[1], teacher.shape[1]))
            return student.square().mean() + teacher.square().mean()

    terms = {"see": Term(See(), student="body", teacher="trunk")}
    fit(MutualDistillation([Renamed()], terms, "model"), Lit(Net(9)), epochs=1)
    assert seen == [(9, 5), (5, 9)] * 3


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: teachers.Peers(Net(3)), TypeError, r"peers is a list of networks, got a Net: write"),
        (lambda: teachers.Peers(2), TypeError, r"peers is a list of networks, got a int: write"),
        (lambda: teachers.Peers(["net.pt"]), TypeError, r"A peer is a network, an nn\.Module; got 'net\.pt'"),
        (lambda: teachers.Peers([]), ValueError, "one or more different networks beside the student; got 0"),
        (lambda: teachers.Peers([net := Net(3), net]), ValueError, "one or more different networks"),
        (lambda: teachers.Peers([Net(3)], "all"), ValueError, "imitate is 'each' or 'ensemble', got 'all'"),
    ],
)
def test_mistakes_are_told(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_features_of_different_networks_have_no_mean() -> None:
    hint = {"hint": Term(losses.FitNet(), student="body", teacher="body")}
    with pytest.raises(ValueError, match=r"no mean: \(2, 5\), \(2, 9\)\. With imitate='ensemble'"):
        fit(MutualDistillation([Net(9)], hint, "model", imitate="ensemble"), Lit(Net(5)))


def test_the_balanced_divergence_is_both_ways() -> None:
    """BD-KD between peers: each imitates the other by forward and reverse KL, weighted per sample."""
    nets = networks(2)
    expected = copy.deepcopy(nets)
    fit(MutualDistillation([nets[1]], {"bd": Term(losses.BDKD())}, "model", task_weight=0.5), Lit(nets[0]))
    optimizer = torch.optim.SGD([p for net in expected for p in net.parameters()], lr=0.3, momentum=0.9)
    for x, y in [*batches()] * 2:
        a, b = (net(x) for net in expected)
        loss = losses.BDKD()(a, b.detach()) + losses.BDKD()(b, a.detach())
        optimizer.zero_grad()
        (loss + 0.5 * (F.cross_entropy(a, y) + F.cross_entropy(b, y))).backward()
        optimizer.step()
    for net, other in zip(nets, expected, strict=True):
        torch.testing.assert_close(net.state_dict(), other.state_dict())
