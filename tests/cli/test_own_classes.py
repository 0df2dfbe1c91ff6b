"""Classes of one's own in the folder one stands in: data that do not say how many classes there are, one callback."""

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from lightning_kd.cli import compare, examples, main, plot
from lightning_kd.cli.command import DistillationCLI

NET = {"class_path": "lightning_kd.models.CifarResNet", "init_args": {"depth": 8, "in_channels": 1, "num_classes": 5}}
CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {
        "max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1,
        "enable_progress_bar": False, "enable_model_summary": False,
    },
    "model": {
        "task": {"class_path": "lightning_kd.tasks.Classification", "init_args": {"num_classes": 5}},
        "student": NET,
        "teacher": {
            "class_path": "lightning_kd.teachers.Frozen", "init_args": {"model": NET, "checkpoint": "teacher.ckpt"},
        },
        "terms": {"kd": {"loss": {"class_path": "lightning_kd.losses.KD"}}},
    },
    "teacher_fit": {"max_epochs": 1, "lr": 0.01},
}  # fmt: skip
ONE = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"monitor": "val/loss"}}
REPO = Path(__file__).parents[2]
NAMES = (f"own_data_{number}" for number in itertools.count())
"""Of modules: Python keeps what it imported."""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with data that say nothing of classes, and a configuration in a folder below; the file's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    module = next(NAMES)
    Path(f"{module}.py").write_text(
        "import torch, lightning\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "class Data(lightning.LightningDataModule):\n"
        "    def train_dataloader(self):\n"
        "        images = torch.rand(8, 1, 8, 8)\n"
        "        return DataLoader(TensorDataset(images, torch.arange(8) % 5), batch_size=8)\n"
        "    val_dataloader = test_dataloader = predict_dataloader = train_dataloader\n"
    )
    Path("configs").mkdir()
    Path("configs", "mine.yaml").write_text(yaml.safe_dump(CONFIG | {"data": {"class_path": f"{module}.Data"}}))
    return "configs/mine.yaml"


def numbers(config: Any) -> list[int | None]:
    """The number of classes of the task and of both networks."""
    model = config["model"]
    owners = (model["task"], model["student"], model["teacher"]["init_args"]["model"])
    return [owner["init_args"].get("num_classes") for owner in owners]


def test_what_was_written_is_printed(project: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", project, "--print_config"])
    assert numbers(yaml.safe_load(capsys.readouterr().out)) == [5, 5, 5]


@pytest.mark.slow
def test_what_was_written_stays_where_the_data_do_not_say_it(project: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", project, "--traceback"]) == 0
    assert json.loads(Path("teacher.ckpt.json").read_text())["model"]["student"]["init_args"]["num_classes"] == 5
    (saved,) = Path("runs").rglob("config.yaml")
    assert numbers(yaml.safe_load(saved.read_text())) == [5, 5, 5]
    assert main(["fit", "--config", str(saved.resolve()), "--traceback"]) == 0
    assert "teacher: found at teacher.ckpt" in capsys.readouterr().out


@pytest.mark.slow
def test_compare_makes_the_networks_that_were_written(project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_add_costs", lambda *_: None)
    for shown in (plot, examples):
        monkeypatch.setattr(shown, "save", lambda *_: None)
    content = yaml.safe_load(Path(project).read_text())
    content["trainer"]["callbacks"] = ONE
    Path(project).write_text(yaml.safe_dump(content))
    assert main(["compare", "--config", project, "--output", "out", "--traceback"]) == 0


def test_what_was_written_decides_a_run(project: str) -> None:
    sys.path.insert(0, str(Path.cwd()))
    cli = DistillationCLI(["--config", project], run=False, make=False)
    assert numbers(compare.settings_of(cli)) == [5, 5, 5]


def test_where_the_data_say_it_nothing_is_printed_that_nobody_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", "digits_kd", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert numbers(printed) == [None, None, None]
    assert "num_classes" not in printed["model"]["student"]["init_args"]


def test_classes_without_arguments_are_trained_and_measured(project: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = next(NAMES)
    Path(f"{module}.py").write_text(
        "from torch import nn\n"
        "class Plain(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    plain = f"{module}.Plain"
    frozen = {"class_path": "lightning_kd.teachers.Frozen"}
    teacher = frozen | {"init_args": {"model": {"class_path": plain}, "checkpoint": "teacher.ckpt"}}
    Path("plain.yaml").write_text(yaml.safe_dump({"model": {"student": {"class_path": plain}, "teacher": teacher}}))
    short = ["--trainer.max_epochs=1", "--teacher_fit.max_epochs=1", "--trainer.enable_progress_bar=false"]
    assert main(["fit", "--config", "digits_kd", "--config", "plain.yaml", *short]) == 0
    (saved,) = Path("runs").rglob("*.ckpt")
    assert main(["test", "--config", "digits_kd", "--config", "plain.yaml", "--ckpt_path", str(saved)]) == 0


def test_the_record_of_a_teacher_has_nothing_that_nobody_wrote() -> None:
    cli = DistillationCLI(["--config", "digits_kd"], run=False, make=False)
    network = cli.plain_config["model"]["teacher"]["init_args"]["model"]
    assert "num_classes" not in network["init_args"]


def test_the_folder_one_stands_in_stands_once_and_first(
    project: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path / "other", tmp_path):
        monkeypatch.chdir(folder)
        assert main(["--version"]) == 0 == main(["list", "tasks"])
        assert sys.path[0] == str(folder)
        assert sys.path.count(str(folder)) == 1


def test_one_callback_alone_is_a_list_of_one(project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    options = [f"--trainer.callbacks={ONE['class_path']}", "--trainer.callbacks.monitor=val/loss"]
    Path("one.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": ONE}}))
    for given in (options, ["--config", "one.yaml"]):
        cli = DistillationCLI(["--config", project, *given], run=False, make=False)
        (callback,) = cli.plain_config["trainer"]["callbacks"]
        assert callback["class_path"] == ONE["class_path"]


def test_images_in_folders_as_the_documentation_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    block = re.search(r'```python title="my_data.py"\n(.*?)```', (REPO / "docs" / "cli.md").read_text(), re.DOTALL)
    assert block
    Path("my_data.py").write_text(block[1])
    for split, kind, number in itertools.product(("train", "val", "test"), ("cat", "dog"), range(2)):
        folder = Path("images", split, kind)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 12), (number, 0, 0)).save(folder / f"{number}.png")
    init = {"root": "images", "size": 32, "batch_size": 2}
    student = {"class_path": "lightning_kd.models.Timm", "init_args": {"name": "resnet10t"}}
    model = {"task": {"class_path": "lightning_kd.tasks.Classification"}, "student": student}
    trainer = {**CONFIG["trainer"], "logger": False}
    data = {"class_path": "my_data.ImageFolders", "init_args": init}
    Path("mine.yaml").write_text(yaml.safe_dump({"trainer": trainer, "data": data, "model": model}))
    for command in ("fit", "test", "predict"):
        assert main([command, "--config", "mine.yaml", "--traceback"]) == 0
    assert torch.load("predictions.pt", weights_only=True).shape == (4, 2)
    cli = DistillationCLI(["--config", "mine.yaml"], run=False)
    assert cli.model.task.class_names == ["cat", "dog"]
    assert [tuple(each.images[0].shape) for each in examples.examples(cli)] == [(3, 32, 32)] * 4
    assert all(each.images[0][0].max() <= 1 for each in examples.examples(cli))  # as dark as the files
