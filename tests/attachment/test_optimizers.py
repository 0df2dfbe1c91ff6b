"""Whatever optimizer a module makes: what terms and peers learn is in it, or it is refused."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_kd.callbacks import MutualDistillation
from project import Project, fit, net
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_kd import Distillation, Term, losses


class Wrapped:
    """An optimizer by its methods alone, as Lightning takes one."""

    def __init__(self, parameters: Any) -> None:
        self.inner = torch.optim.SGD(parameters, lr=0.1)
        self.param_groups, self.defaults = self.inner.param_groups, self.inner.defaults
        self.state: defaultdict[Any, Any] = self.inner.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)


def zero(parameters: Any) -> ZeroRedundancyOptimizer:
    return ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.SGD, lr=0.1)


class Optimized(Project):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self.model.parameters())


def hint(projector: nn.Module) -> Distillation:
    return Distillation(
        net(16), {"hint": Term(losses.FitNet(), student="0", teacher="0", projector=projector)}, student="model"
    )


def moved(parts: nn.Module, module: LightningModule, *callbacks: Callback) -> bool:
    before = [p.detach().clone() for p in parts.parameters()]
    fit(module, *callbacks)
    return all(not torch.equal(p, q) for p, q in zip(before, parts.parameters(), strict=True))


def test_an_optimizer_by_its_methods_alone_has_what_terms_and_peers_learn() -> None:
    projector, peer = nn.Linear(8, 16), net(12)
    assert moved(projector, Optimized(Wrapped), hint(projector))
    assert moved(peer, Optimized(Wrapped), MutualDistillation([peer], {"kd": Term(losses.KD())}, student="model"))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_projector_is_made_for_what_it_is_given() -> None:
    projector = nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d())
    callback = hint(projector)
    seen: list[Any] = []

    class Looking(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            optimized = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
            seen.append({id(p) for p in projector.parameters()} <= {*optimized})
            seen.extend(part.clone() for part in (projector[0].weight.detach(), projector[1].running_mean))

    fit(Project(), callback, Looking())
    assert projector[0].in_features == 8
    assert seen[0]
    assert not torch.equal(seen[1], projector[0].weight)
    assert not seen[2].any()  # no statistics of the rehearsal
    assert projector[1].running_mean.any()
    again = hint(nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d()))
    again.load_state_dict(callback.state_dict())
    fit(Project(), again, max_epochs=0)
    torch.testing.assert_close(again.distiller.terms["hint"].projector[0].weight, projector[0].weight)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_an_optimizer_that_has_shared_its_parameters_out_is_refused() -> None:
    peers = MutualDistillation([net(12)], {"kd": Term(losses.KD())}, student="model")
    for callback in (hint(nn.Linear(8, 16)), peers):
        with pytest.raises(ValueError, match="ZeroRedundancyOptimizer shares its parameters out among the processes"):
            fit(Optimized(zero), callback)
    student = Optimized(zero)
    kd = Distillation(net(16), {"kd": Term(losses.KD())}, student="model")
    assert moved(student.model, student, kd)  # of which no term learns


@pytest.mark.filterwarnings("ignore:Found 3 module.* in eval mode")  # of a projector that is given so
@pytest.mark.parametrize("hook", ["configure_optimizers", "on_fit_start", "on_train_start"])
def test_a_module_that_is_frozen_as_a_whole_does_not_freeze_what_terms_learn(hook: str) -> None:
    class Thawed(Project):
        def _freeze(self) -> None:
            self.freeze()
            self.train()
            self.model.requires_grad_(True)

        def configure_optimizers(self) -> Any:
            if hook == "configure_optimizers":
                self._freeze()
            return super().configure_optimizers()

        def on_fit_start(self) -> None:
            if hook == "on_fit_start":
                self._freeze()

        def on_train_start(self) -> None:
            if hook == "on_train_start":
                self._freeze()

        def on_train_end(self) -> None:
            self.freeze()

    projector, own = nn.Linear(8, 16), nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16)).eval().requires_grad_(False)
    module, distillation = Thawed(), hint(projector)
    assert moved(projector, module, distillation)
    module.unfreeze()
    module.train()
    assert moved(projector, module, distillation)
    both = {"own": hint(own).distiller.terms["hint"], "built": hint(nn.Linear(8, 16)).distiller.terms["hint"]}
    assert not moved(own, Thawed(), Distillation(net(16), both, student="model"))
    assert not any(part.training for part in own.modules())
    assert own[1].num_batches_tracked == 0
