"""What a checkpoint holds of peers, and who goes on with it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_kd.callbacks import Distillation, MutualDistillation
from mutual import Lit, Net, accuracy, fit, loader, mutual, same, state_of, trainer
from torch import nn

from lightning_kd import Term, losses, teachers

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


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


def test_another_number_of_peers_does_not_resume(tmp_path: Path) -> None:
    *_, file = saved(tmp_path, Net(7), Net(9))
    run = trainer(mutual(Net(7)), ModelCheckpoint(tmp_path, filename="other"))
    with pytest.raises(ValueError, match="holds 2 peers of the student, and here are 1"):
        run.fit(Lit(), loader(), loader(32), ckpt_path=file, weights_only=True)


def test_evaluation_before_a_fit_leaves_the_peers_to_learn() -> None:
    peer, module = Net(7), Lit()
    callback = mutual(peer)
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(callbacks=[callback], **quiet).validate(module, loader(), verbose=False)
    assert peer.training
    before = peer.body[1].running_mean.clone()
    fit(module, callback, max_epochs=1)
    assert not torch.equal(peer.body[1].running_mean, before)


def test_a_checkpoint_without_peers_measures_none(tmp_path: Path) -> None:
    fit(Lit(), ModelCheckpoint(tmp_path, filename="alone"))
    with pytest.raises(ValueError, match="holds 0 peers of the student, and here are 1"):
        trainer(mutual(Net(7))).test(Lit(), loader(32), ckpt_path=tmp_path / "alone.ckpt", weights_only=True)
