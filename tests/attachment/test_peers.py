"""What a peer has of its own: metrics, hooks, the batch as it came, the numbers that the student drew."""

import copy
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from mutual import Lit, Net, accuracy, fit, loader, mutual, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


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


def test_all_networks_see_the_same_noise() -> None:
    class Noisy(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0] + torch.randn_like(batch[0])), batch[1])

    module = Noisy()
    callback = mutual(copy.deepcopy(module.model))
    run = fit(module, callback, max_epochs=1)
    assert float(run.callback_metrics["train/kd"]) == pytest.approx(0.0, abs=1e-7)
    assert torch.equal(module.model.head.weight, callback.peers[0].head.weight)


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
