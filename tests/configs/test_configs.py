import re
from pathlib import Path

import pytest
import torch

from lightning_kd.cli import command, main
from lightning_kd.cli.configs import shipped, summary
from lightning_kd.cli.recipe import INITIAL_WEIGHTS, KEY, UNLIKE
from lightning_kd.models import PoseNet
from lightning_kd.teachers import Ensemble, Frozen, load_weights

CONFIGS = shipped()


def test_configs_are_found() -> None:
    assert {"digits_kd", "digits_temperature", "cifar10_kd", "cifar10_dkd", "cifar10_feature"} <= set(CONFIGS)
    folder = Path(__file__).parents[2] / "configs"
    assert set(CONFIGS) == {path.stem for path in folder.glob("*.yaml")}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_says_what_it_is_and_names_no_machine(name: str) -> None:
    assert summary(CONFIGS[name])
    text = CONFIGS[name].read_text()
    assert "/home" not in text
    assert "/work" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_runs_from_nothing_and_keeps_the_invariants(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if name.startswith(("bccd", "camvid", "cifar10", "cranfield", "face68", "magnetic", "omniglot")):
        monkeypatch.setenv("LIGHTNING_KD_DATA", str(request.getfixturevalue("data_dir").resolve()))
    monkeypatch.chdir(tmp_path)
    short = [
        "--trainer.max_epochs", "1",
        "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1",
        "--trainer.check_val_every_n_epoch", "1", "--trainer.num_sanity_val_steps", "0",
        "--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1",
    ]  # fmt: skip
    if name.startswith(("camvid", "magnetic", "scenes_segmentation")):  # large images
        short += ["--data.init_args.batch_size", "4"]
    if name.startswith("scenes"):  # which are drawn first
        short += ["--data.init_args.train_size", "32", "--data.init_args.val_size", "8"]
    if name == "face68_pose_dwpose_head":  # what the first stage exports
        Path("checkpoints").mkdir()
        first = PoseNet("mobilenetv4_conv_small_050", 68, (48, 48), stride=16, channels=64)
        for weight in first.head.parameters():
            weight.data.mul_(10)  # an untrained head says of all bins the same
        torch.save(first.state_dict(), "checkpoints/face68_dwpose.pt")
    trained = re.findall(r"checkpoint: (\S+\.ckpt)", CONFIGS[name].read_text())
    if trained:
        short += ["--teacher_fit.max_epochs", "1"]
    models = []
    monkeypatch.setattr(command.DistillationCLI, "after_fit", lambda cli: models.append(cli.model))
    assert main(["fit", "--config", name, *short, "--traceback"]) == 0
    model = models.pop()
    assert len(models) == len(trained)  # the teachers' own training came first
    student, teacher = model.student, model.teacher

    (metrics,) = Path("runs").rglob("metrics.csv")
    header, first, *_ = metrics.read_text().splitlines()
    step = {k: v for k, v in zip(header.split(","), first.split(","), strict=True) if k.startswith("train/")}
    losses = {k: float(v) for k, v in step.items() if v}
    assert len(losses) >= 3
    unsupervised = {"train/task"} if name.startswith("magnetic_tile") else set()  # normal images, and features alone
    assert all(v > 0 for k, v in losses.items() if not k.endswith("/weight") and k not in unsupervised), losses

    (checkpoint,) = Path("runs").rglob("*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    assert set(content["state_dict"]) == {f"student.{key}" for key in student.state_dict()}
    recipes = [content[KEY]["student"], *content[KEY].get("peers", [])]
    assert not any(UNLIKE in each for each in recipes), recipes
    assert not any((each.get("init_args") or {}).get(name) for each in recipes for name in INITIAL_WEIGHTS)
    for module in (*student.modules(), *teacher.modules()):
        assert not module._forward_hooks
    if not trained:
        return
    assert not any("teacher" in state for state in content["callbacks"].values())
    assert {str(path) for path in Path("checkpoints").glob("*.ckpt")} == set(trained)
    assert isinstance(teacher, Frozen | Ensemble)
    each = teacher.frozen if isinstance(teacher, Ensemble) else [teacher]
    for member, file in zip(each, trained, strict=True):
        after = {key: value.clone() for key, value in member.model.state_dict().items()}
        load_weights(member.model, file)
        assert all(torch.equal(value, after[key]) for key, value in member.model.state_dict().items())
