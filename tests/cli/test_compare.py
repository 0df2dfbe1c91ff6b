"""The rows of a comparison: what each network costs, and that each has a name of its own."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from lightning_kd.tasks import Classification
from torch import nn
from toy_run import Net, Toy, configuration

from lightning_kd.cli import compare, main, plot, teacher
from lightning_kd.cli.recipe import KEY


class Both(nn.Module):
    """A student and its teacher, one network in the end."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.student(x) - self.teacher(x)


class Together(Classification):
    """Where the teacher runs, too."""

    _taught: tuple[nn.Module, ...] = ()

    def meet(self, student: nn.Module, teacher: nn.Module) -> None:
        self._taught = (teacher,)

    def deployed(self, student: nn.Module) -> nn.Module:
        return Both(student, *self._taught) if self._taught else student


@pytest.fixture
def unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of one's own, and no pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "save", lambda *_: None)
    monkeypatch.setattr(compare, "_draw", lambda *_: False)


def compared(*files: str) -> dict[str, dict[str, float]]:
    """What the networks of a comparison cost, by the names of their rows."""
    assert main(["compare", "--config", *files, "--output", "out", "--traceback"]) == 0
    rows = csv.DictReader(Path("out", "comparison.csv").read_text().splitlines())
    costs = ("parameters", "flops", "latency_ms", "size_bytes")
    return {row["name"]: {cost: float(row[cost]) for cost in costs} for row in rows}


def parameters(width: int, classes: int) -> int:
    return sum(p.numel() for p in Net(width, classes).parameters())


@pytest.mark.usefixtures("unseen")
def test_data_of_another_number_of_classes_make_another_network() -> None:
    found = compared(configuration("four"), configuration("two", {"num_classes": 2}))
    assert {name: row["parameters"] for name, row in found.items()} == {
        "teacher": parameters(6, 4), "teacher 2": parameters(6, 2), "student alone": parameters(3, 4),
        "student alone 2": parameters(3, 2), "four": parameters(3, 4), "two": parameters(3, 2),
    }  # fmt: skip
    assert found["four"] == found["student alone"]  # one latency of one architecture
    assert found["two"] == found["student alone 2"]


@pytest.mark.usefixtures("unseen")
def test_larger_images_take_more_operations() -> None:
    found = compared(configuration("small"), configuration("large", {"size": 16}))
    assert found["small"] == found["student alone"]
    assert found["large"] == found["student alone 2"]
    assert found["large"]["parameters"] == found["small"]["parameters"]
    convolution, head = 2 * 9 * 3, 2 * 3 * 4
    assert found["small"]["flops"] == 8 * 8 * convolution + head
    assert found["large"]["flops"] == 16 * 16 * convolution + head


@pytest.mark.usefixtures("unseen")
def test_a_teacher_that_runs_in_the_end_counts() -> None:
    task = f"{__name__}.Together"
    found = compared(configuration("wide", task=task), configuration("narrow", task=task, width=2))
    assert found["wide"]["parameters"] == parameters(3, 4) + parameters(6, 4)
    assert found["narrow"]["parameters"] == parameters(3, 4) + parameters(2, 4)
    again = compared(configuration("wide", task=task), configuration("other", task=task))
    assert again["wide"] == again["other"]  # the teachers are two files of one architecture


class Helped(Together):
    """Which takes other data to train with, and a network."""

    only_trains = ("others",)

    def __init__(self, num_classes: int, others: LightningDataModule | None = None, eye: nn.Module | None = None):
        super().__init__(num_classes)
        self.others, self.eye = others, eye


@pytest.mark.usefixtures("unseen")
def test_what_a_task_only_trains_with_is_not_needed_to_run_it() -> None:
    file, task = configuration("mine", task=f"{__name__}.Helped"), "--model.task.init_args"
    data, eye = f"{task}.others=toy_run.Toy", f"{task}.eye=toy_run.Net"
    assert main(["fit", "--config", file, data, eye, "--traceback"]) == 0
    (saved,) = Path("runs").rglob("*.ckpt")
    deployed = torch.load(saved, weights_only=True)[KEY]["deployed"]
    assert deployed["task"]["init_args"].keys() == {"num_classes", "eye"}
    assert main(["export", str(saved), "--format", "state_dict", "--traceback"]) == 0


class Scaled(Toy):
    """Images times what is in a file."""

    def __init__(self, file: str = "factor.txt") -> None:
        super().__init__()
        self.factor = float(Path(file).read_text())

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * self.factor, batch[1]


@pytest.mark.usefixtures("unseen")
def test_another_content_of_a_file_of_the_data_is_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    config = configuration("mine", {"file": "factor.txt"})
    Path(config).write_text(Path(config).read_text().replace("Toy", "Scaled").replace("toy_run.Sc", f"{__name__}.Sc"))
    found = []
    for factor, trained in (("1.0", 2), ("-9.5", 2), ("-9.5", 0)):
        Path("factor.txt").write_text(factor)
        compared(config)
        assert capsys.readouterr().out.count("seed 0: training") == trained
        found.append(Path("out", "runs.csv").read_text().splitlines())
    assert found[0][1] != found[1][1]  # the teacher, which is measured again
    assert found[1] == found[2]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config", "teacher.yaml"], "--config: 'teacher' is what another row of the table is called, or may be"),
        (["--config", "student alone 2.yaml"], "--config: 'student alone 2' is what another row"),
        (["--config", "mine.yaml", "mine, peer 1.yaml"], "--config: 'mine, peer 1' is what another row"),
        (["--config", "mine, peer 1 alone.yaml"], "'mine, peer 1 alone' is what another row"),
        (["--config", "student alone, teacher of it.yaml"], "'student alone, teacher of it' is what another row"),
        (["--config", "mine.yaml", "--student-ckpt", "./mine"], "--student-ckpt: 'mine' is what another row"),
        (["--config", "mine.yaml", "--student-ckpt", "teacher"], "--student-ckpt: 'teacher' is what another row"),
        (["--config", "mine.yaml", "--student-ckpt", "a.pt", "./a.pt"], "--student-ckpt: expected different ones"),
    ],
)
@pytest.mark.usefixtures("unseen")
def test_a_name_that_another_row_has_is_refused(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "read", lambda *_: pytest.fail("it was begun"))
    for file in (each for each in arguments if each.endswith(".yaml")):
        configuration(file.removesuffix(".yaml"))
    assert main(["compare", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_what_only_sounds_like_a_row_is_a_name() -> None:
    compare.refuse_names(["teacher_kd", "teachers", "student alone, wide", "my teacher"], ["runs/teacher.ckpt"])


@pytest.mark.usefixtures("unseen")
def test_two_rows_of_one_name_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "refuse_names", lambda *_: None)
    with pytest.raises(AssertionError, match="teacher"):
        main(["compare", "--config", configuration("teacher"), "--output", "out"])


@pytest.mark.usefixtures("unseen")
def test_a_teachers_file_is_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    compared(configuration("mine"))
    assert KEY not in torch.load("mine.ckpt", weights_only=True)
    assert main(["export", "mine.ckpt", "--format", "state_dict"]) == 2
    assert "mine.ckpt is a teacher's file, with the record of its training beside it" in capsys.readouterr().err


class Misspelt(Classification):
    """Which is to be judged by what it does not measure."""

    main_metric = "acuracy"


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")
@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("validates", [True, False])
def test_a_main_metric_that_is_not_measured_is_told(
    validates: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if validates:
        monkeypatch.setattr(teacher, "fit", lambda *_: pytest.fail("a teacher was trained"))
    else:
        monkeypatch.delattr(Toy, "val_dataloader")
    assert main(["compare", "--config", configuration("mine", task=f"{__name__}.Misspelt")]) == 2
    told = "main_metric of Misspelt is 'acuracy', by which compare judges, and measured are accuracy, "
    assert told in capsys.readouterr().err
