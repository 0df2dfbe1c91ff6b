"""Sharded training (FSDP2, ``ModelParallelStrategy``) is the same training; what cannot work there is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_kd.callbacks import EMATeacher
from processes import run_script
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from lightning_kd import Distillation, Term, losses, teachers
from lightning_kd.teachers import frozen as frozen_file

# Run as a script, once per process; the user shards in configure_model, as Lightning's documentation shows it.
SCRIPT = """
import sys, torch
from test_invariants import Net, Validated, loader, trainer
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.data import DataLoader, DistributedSampler
from lightning_kd import Distillation, Term, losses, schedules, teachers
from lightning_kd.attachment import attachments_of
from lightning_kd.callbacks import EMATeacher, MutualDistillation, TemperatureScheduler
from lightning_kd.sharding import whole

accelerator, devices, folder, kinds = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]
sharded = devices > 1 or accelerator == "gpu"

class Halves(LightningDataModule):
    def train_dataloader(self):
        data, trainer = loader().dataset, self.trainer
        halves = DistributedSampler(data, trainer.world_size, trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=8 // trainer.world_size, sampler=halves)

    def val_dataloader(self):
        return loader()

class Sharded(Validated):
    def __init__(self, teacher=None):
        super().__init__(norm=False)
        self.others = [teacher] if teacher else []  # in a list, so that it is not a submodule

    def configure_model(self):
        for net in (self.model, *self.others) if sharded else ():
            fully_shard(net.stem, mesh=self.device_mesh["data_parallel"])
            fully_shard(net, mesh=self.device_mesh["data_parallel"], reshard_after_forward=not net.training)

class AllSharded(Callback):
    def on_train_start(self, trainer, pl_module):
        params = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        assert {id(p) for p in params} == {id(p) for p in pl_module.parameters()}
        learners = [p for each in attachments_of(trainer) for p in each.distiller.parameters()]
        assert len(params) >= len(list(pl_module.model.parameters())) + len(learners)
        assert all(isinstance(p, DTensor) for p in params) == sharded
        for teacher in (each.distiller.teacher for each in attachments_of(trainer)):
            for copy in getattr(teacher, "copies", []) or getattr(teacher, "peers", []):
                assert isinstance(copy.stem, FSDPModule) == isinstance(copy, FSDPModule) == sharded
            if isinstance(teacher, teachers.EMA):
                teacher.update = without_messages(teacher.update)

def without_messages(update):
    def watched(moment):
        with CommDebugMode() as messages:
            update(moment)
        assert not messages.get_total_counts()
    return watched

def callbacks_of(kind, teacher):
    hints = dict(student="stem", teacher="stem", weight=10.0)
    kd = {"kd": Term(losses.KD(), weight=0.5), "dkd": Term(losses.DKD(), weight=0.1)}
    if kind == "averages":
        own = torch.nn.ConvTranspose2d(4, 4, 1)
        terms = {"hint": Term(losses.FitNet(), projector=own, **hints), **kd}
        average = EMATeacher(terms, decay=0.9, student="model", count=2, evaluate=True)
        past = {"past": Term(losses.KD(), weight=schedules.Linear(0.1, 0.8))}
        return [average, Distillation(teachers.PastSelf(), past, student="model")]
    if kind == "mutual":
        hint = {"hint": Term(losses.FitNet(), **hints)}
        return [MutualDistillation([Net(6, norm=False)], {**hint, **kd}, student="model")]
    if kind == "ensemble":
        both = teachers.Ensemble([teacher, Net(6, norm=False)], weights="confidence")
        return [Distillation(both, kd, student="model"), TemperatureScheduler("kd", schedules.Linear(8.0, 1.0))]
    if kind == "ctkd":
        terms = {"ctkd": Term(losses.CTKD(losses.KD()))}
    elif kind == "vid":
        terms = {"vid": Term(losses.VID(), student="stem", teacher="stem")}
    else:
        own = torch.nn.ConvTranspose2d(4, 6, 2, 2)
        terms = {"hint": Term(losses.FitNet(), **hints), "own": Term(losses.FitNet(), projector=own, **hints)}
        if kind != "features":
            terms |= kd
    routed = teachers.Ensemble([teacher, Net(6, norm=False)], weights=teachers.Router(2, 5))
    return [Distillation(routed if kind == "routed" else teacher, terms, student="model")]

def tensors(state):
    return {key: tensors(v) if isinstance(v, dict) else v for key, v in state.items() if key != "wiring"}

def run(kind, name, epochs, resume=None):
    seed_everything(0)
    teacher = Net(6, norm=False).eval()
    callbacks = callbacks_of(kind, teacher)
    module = Sharded(teacher if kind in ("logits and features", "features") else None)
    strategy = ModelParallelStrategy(devices, 1, save_distributed_checkpoint=name != "resumed") if sharded else "auto"
    keep = ModelCheckpoint(f"{folder}/{kind}/{name}", filename="{epoch}", save_top_k=-1)
    run = trainer(
        *callbacks, AllSharded(), keep, epochs=epochs, strategy=strategy, devices=devices,
        use_distributed_sampler=False, accelerator=accelerator, gradient_clip_val=5.0, enable_checkpointing=True,
    )
    seed_everything(0)  # a strategy resets the seed of its processes before projectors are made
    run.fit(module, Halves(), ckpt_path=resume, weights_only=True)
    assert all(float(value) > 0 for value in run.callback_metrics.values()), run.callback_metrics
    run.save_checkpoint(f"{folder}/{kind}/{name}/after.ckpt")
    assert not any("_distillation" in key for key, _ in module.named_parameters())
    result = {"student": whole(module.state_dict())}
    result["val"] = {key: v for key, v in run.callback_metrics.items() if "val" in key}  # others are of a half
    for i, callback in enumerate(callbacks):
        result[str(i)] = tensors(callback.state_dict())  # every process gathers
    if run.is_global_zero:
        torch.save(result, f"{folder}/{kind}/{name}.pt")

def export(saved):
    dcp_to_torch_save(saved, f"{folder}/file.ckpt")
    student, peer = (Net(4, stride=2, norm=False), f"{folder}/file.ckpt"), (Net(6, norm=False), f"{saved}/meta.pt")
    for peer, (net, file) in enumerate((student, peer)):
        teachers.load_weights(net, file, peer=peer)
        torch.save(net.state_dict(), f"{folder}/exported{peer}.pt")

if __name__ == "__main__":
    for kind in kinds:
        run(kind, "whole", 2)
        before = "whole/epoch=0"
        if kind == "mutual":  # without schedules, which know how long a run is
            run(kind, "one", 1)
            before = "one/after"
        run(kind, "resumed", 2, f"{folder}/{kind}/{before}.ckpt")
    if sharded:
        if torch.distributed.get_rank() == 0:
            export(f"{folder}/mutual/whole/epoch=1.ckpt")
        try:
            run("ctkd", "one", 1)
        except ValueError as error:
            open(f"{folder}/refused.txt", "w").write(str(error))
"""
KINDS = ["logits and features", "features", "ensemble", "routed", "vid", "averages", "mutual"]
Results = dict[str, dict[str, Any]]


def trained(accelerator: str, devices: int, folder: Path) -> dict[str, Results]:
    """Returns of every kind what was learned: in one epoch and one more that was resumed, and in two at once."""
    folder.mkdir()
    run_script(SCRIPT, accelerator, str(devices), str(folder), *KINDS, folder=folder, ranks=devices, timeout=600)
    return {
        kind: {
            name: torch.load(folder / kind / f"{name}.pt", weights_only=True, map_location="cpu")
            for name in ("resumed", "whole")
        }
        for kind in KINDS
    }


@pytest.mark.slow
def test_two_sharded_processes_are_the_same_training(tmp_path: Path) -> None:
    one, two = trained("cpu", 1, tmp_path / "one"), trained("cpu", 2, tmp_path / "two")
    for kind in KINDS:
        torch.testing.assert_close(two[kind], one[kind], msg=lambda text, kind=kind: f"{kind}: {text}")
        for result in (one[kind], two[kind]):
            torch.testing.assert_close(result["resumed"], result["whole"], rtol=0, atol=0)
        assert kind == "ensemble" or one[kind]["whole"]["0"]["learned"]
        folder = tmp_path / "two" / kind / "whole" / "epoch=1.ckpt"
        saved = FileSystemReader(folder).read_metadata().state_dict_metadata
        weights = {key.removeprefix("state_dict.") for key in saved if key.startswith("state_dict.")}
        assert weights == set(one[kind]["whole"]["student"])
        file = torch.load(tmp_path / "two" / kind / "resumed" / "epoch=1.ckpt", weights_only=True)
        torch.testing.assert_close(file["state_dict"], two[kind]["resumed"]["student"], rtol=0, atol=0)
    assert set(two["averages"]["whole"]["0"]["teacher"]) == {"copies", "active", "student"}
    mutual = two["mutual"]["whole"]
    for peer, state in enumerate((mutual["student"], mutual["0"]["peers"]["peer1"]["state_dict"])):
        exported = torch.load(tmp_path / "two" / f"exported{peer}.pt", weights_only=True)
        torch.testing.assert_close({f"model.{key}": v for key, v in exported.items()}, state, rtol=0, atol=0)
    refused = (tmp_path / "two" / "refused.txt").read_text()
    assert "CTKD learns a number, theta, which cannot be" in refused


@pytest.mark.slow
@pytest.mark.gpu
def test_a_sharded_gpu_is_the_same_training(tmp_path: Path) -> None:
    cpu, gpu = trained("cpu", 1, tmp_path / "cpu"), trained("gpu", 1, tmp_path / "gpu")
    torch.testing.assert_close(gpu, cpu, rtol=1e-2, atol=1e-3)  # convolutions may be in TF32


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_wrappers_that_split_parameters_are_refused_where_something_learns(strategy: str) -> None:
    hint = Term(losses.FitNet(), student="model", teacher="output")
    run = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    run._accelerator_connector.strategy = type(strategy, (), {"process_dataloader": id})()  # neither runs on a CPU
    for callback in (Distillation(nn.Linear(2, 2), {"hint": hint}), EMATeacher({"kd": Term(losses.KD())})):
        run.callbacks.append(callback)
        with pytest.raises(ValueError, match=f"{strategy} splits parameters.*ModelParallelStrategy"):
            callback.setup(run, BoringModel(), "fit")
        run.callbacks.pop()
    frozen = Distillation(nn.Linear(32, 2), {"kd": Term(losses.KD())})
    run.callbacks.append(frozen)
    module = BoringModel()
    frozen.setup(run, module, "fit")
    assert "training_step" in vars(module)


def test_a_sharded_teacher_runs_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for sharded in (False, True):
        monkeypatch.setattr(frozen_file, "is_sharded", lambda model, sharded=sharded: sharded)
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        teacher, calls = teachers.Frozen(model), []
        teacher.bind(nn.Linear(2, 2), ["0"])
        model[1].register_forward_hook(lambda module, args, output, calls=calls: calls.append(1))
        for _ in range(3):
            teacher(torch.zeros(1, 2))
        ends.append(len(calls))
    assert ends == [1, 3]
