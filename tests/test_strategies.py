"""Sharded training (FSDP2, ``ModelParallelStrategy``) is the same training; what cannot work there is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_kd.callbacks import EMATeacher
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader

from lightning_kd import Distillation, Term, losses, teachers
from lightning_kd.teachers import frozen as frozen_file

# Run as a script, once per process; the user shards in configure_model, as Lightning's documentation shows it.
SCRIPT = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_invariants import Net, Plain, loader, trainer
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler
from lightning_kd import Distillation, Term, losses, teachers
from lightning_kd.callbacks import EMATeacher, MutualDistillation

kind, accelerator, devices, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
sharded = devices > 1 or accelerator == "gpu"

class Halves(LightningDataModule):
    def train_dataloader(self):
        data, trainer = loader().dataset, self.trainer
        halves = DistributedSampler(data, trainer.world_size, trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=8 // trainer.world_size, sampler=halves)

class Sharded(Plain):
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
        learned = 1 if kind == "ema" else len(list(trainer.callbacks[0].distiller.parameters()))
        assert len(params) == len(list(pl_module.model.parameters())) + learned
        assert all(isinstance(p, DTensor) for p in params) == sharded

def run(epochs, resume=None):
    seed_everything(0)
    teacher = Net(6, norm=False).eval()
    hints = dict(student="stem", teacher="stem", weight=10.0)
    own = torch.nn.ConvTranspose2d(4, 6, 2, 2)
    terms = {{"hint": Term(losses.FitNet(), **hints), "own": Term(losses.FitNet(), projector=own, **hints)}}
    if kind != "features":
        terms |= {{"kd": Term(losses.KD(), weight=0.5), "dkd": Term(losses.DKD(), weight=0.1)}}
    if kind == "ctkd":
        terms = {{"ctkd": Term(losses.CTKD(losses.KD()))}}
    if kind == "vid":
        terms = {{"vid": Term(losses.VID(), student="stem", teacher="stem")}}
    shard = kind in ("logits and features", "features")
    module = Sharded(teacher if shard else None)
    routed = teachers.Ensemble([teacher, Net(6, norm=False)], weights=teachers.Router(2, 5))
    if kind == "ema":
        callback = EMATeacher({{"kd": Term(losses.KD())}}, student="model")
    elif kind == "mutual":
        callback = MutualDistillation([Net(4, norm=False)], {{"kd": Term(losses.KD())}}, student="model")
    else:
        callback = Distillation(routed if kind == "routed" else teacher, terms, student="model")
    strategy = ModelParallelStrategy(devices, 1) if sharded else "auto"
    keep = ModelCheckpoint(folder, filename="{{epoch}}", save_top_k=-1)
    run = trainer(
        callback, AllSharded(), keep, epochs=epochs, strategy=strategy, devices=devices, use_distributed_sampler=False,
        accelerator=accelerator, gradient_clip_val=5.0, enable_checkpointing=True,
    )
    seed_everything(0)  # a strategy resets the seed of its processes before projectors are made
    run.fit(module, Halves(), ckpt_path=resume, weights_only=True)
    assert all(float(value) > 0 for value in run.callback_metrics.values()), run.callback_metrics
    state = {{k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in module.state_dict().items()}}
    memory = callback.state_dict()  # every process gathers
    if run.is_global_zero:
        torch.save({{"student": state, "learned": memory["learned"]}}, f"{{folder}}/{{epochs}}.pt")

if __name__ == "__main__":
    run(1)
    run(2, f"{{folder}}/epoch=0.ckpt")
"""


def train(kind: str, accelerator: str, devices: int, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "train.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    command = [sys.executable, str(script), kind, accelerator, str(devices), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300, check=False)


def trained(kind: str, accelerator: str, devices: int, folder: Path) -> list[dict[str, dict[str, Tensor]]]:
    """Returns the student and what else learned, after one epoch and after one more that was resumed."""
    folder.mkdir()
    done = train(kind, accelerator, devices, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{epochs}.pt", weights_only=True, map_location="cpu") for epochs in (1, 2)]


KINDS = ["logits and features", "features", "routed", "vid"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_sharded_processes_are_the_same_training(kind: str, tmp_path: Path) -> None:
    one, two = trained(kind, "cpu", 1, tmp_path / "one"), trained(kind, "cpu", 2, tmp_path / "two")
    assert one[1]["learned"]
    torch.testing.assert_close(two, one)
    folder = tmp_path / "two" / "epoch=1.ckpt"
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    weights = {key.removeprefix("state_dict.") for key in saved if key.startswith("state_dict.")}
    assert weights == set(one[1]["student"])
    callbacks = torch.load(folder / "meta.pt", weights_only=True)["callbacks"]
    (kept,) = [state for key, state in callbacks.items() if key.startswith("Distillation{")]
    torch.testing.assert_close(kept["learned"], one[1]["learned"])


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_gpu_is_the_same_training(kind: str, tmp_path: Path) -> None:
    cpu, gpu = trained(kind, "cpu", 1, tmp_path / "cpu"), trained(kind, "gpu", 1, tmp_path / "gpu")
    torch.testing.assert_close(gpu, cpu, rtol=1e-2, atol=1e-3)  # convolutions may be in TF32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("ema", "EMA does not work with that: a sharded model cannot be copied"),
        ("mutual", "Peers does not work with that"),
        ("ctkd", "CTKD learns a number, theta, which cannot be"),
    ],
)
def test_what_a_sharded_student_cannot_have_is_refused(kind: str, message: str, tmp_path: Path) -> None:
    done = train(kind, "cpu", 2, tmp_path)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_wrappers_that_split_parameters_are_refused_where_something_learns(strategy: str) -> None:
    hint = Term(losses.FitNet(), student="model", teacher="output")
    run = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    run._accelerator_connector.strategy = type(strategy, (), {})()  # neither runs on a CPU
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
