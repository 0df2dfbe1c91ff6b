"""Several files, and files that a command or a run has written."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_kd.cli import UsageError, compare, main
from lightning_kd.cli.command import DistillationCLI

HINT = {"loss": {"class_path": "lightning_kd.losses.FitNet"}, "student": "stage1", "teacher": "stage1", "weight": 2.0}


def terms(*arguments: str) -> dict[str, Any]:
    """The terms of what those arguments make of digits_kd, by name."""
    cli = DistillationCLI(["--config", "digits_kd", *arguments], run=False, make=False)
    found: dict[str, Any] = cli.config["model"]["terms"]
    return found


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts = {
        "hint": {"hint": HINT},
        "lighter": {"kd": {"weight": 0.25}},
        "other": {"kd": {"loss": {"class_path": "lightning_kd.losses.DIST"}}},
        "same": {"kd": {"loss": {"class_path": "KD"}}},
        "warm": {"kd": {"loss": {"init_args": {"temperature": 7.0}}}},
        "long": {"kd": {"class_path": "lightning_kd.Term", "init_args": {"weight": 0.7}}},
        "long_hint": {"hint": {"class_path": "lightning_kd.Term", "init_args": HINT}},
        "light_hint": {"hint": {"weight": 0.5}},
        "none": {},
    }
    for name, part in parts.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump({"model": {"terms": part}}))


@pytest.mark.usefixtures("files")
def test_a_file_that_names_some_terms_leaves_the_others() -> None:
    found = terms("--config", "hint.yaml", "--config=lighter.yaml")
    assert {name: term["init_args"]["weight"] for name, term in found.items()} == {"kd": 0.25, "hint": 2.0}
    assert found["kd"]["init_args"]["loss"]["init_args"]["temperature"] == 4.0
    found = terms("--config", "lighter.yaml", "--config", "hint.yaml", "--model.terms.hint.weight=3")
    assert {name: term["init_args"]["weight"] for name, term in found.items()} == {"kd": 0.25, "hint": 3.0}
    assert found["hint"]["init_args"]["student"] == "stage1"
    found = terms("--model.terms.kd.weight", "0.5", "--config", "hint.yaml")
    assert found["kd"]["init_args"]["weight"] == 0.5
    found = terms("--config", "other.yaml", "--config", "hint.yaml")
    assert found["kd"]["init_args"]["loss"]["class_path"] == "lightning_kd.losses.DIST"
    assert found["kd"]["init_args"]["weight"] == 0.9


@pytest.mark.usefixtures("files")
def test_terms_that_a_file_takes_away_do_not_come_back() -> None:
    Path("null.yaml").write_text("model: {terms: null}")
    only = json.dumps({"at": HINT | {"loss": {"class_path": "lightning_kd.losses.AT"}}})
    for given, left in (
        (["--config", "null.yaml"], []),
        (["--config", "none.yaml"], []),
        (["--model.terms=null"], []),
        (["--model.terms", "null"], []),
        ([f"--model.terms={only}"], ["at"]),
    ):
        assert [*terms(*given, "--config", "hint.yaml")] == [*left, "hint"]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("arguments", "loss", "temperature", "weight"),
    [
        ("--config warm.yaml --config same.yaml", "KD", 7.0, 0.9),
        ("--config warm.yaml --config other.yaml", "DIST", 7.0, 0.9),
        ("--config long.yaml", "KD", 4.0, 0.7),
        ("--config long.yaml --config lighter.yaml", "KD", 4.0, 0.25),
        ("--model.terms.kd.weight=2 --config lighter.yaml", "KD", 4.0, 0.25),
        ("--config lighter.yaml --model.terms.kd.weight=2", "KD", 4.0, 2.0),
    ],
)
def test_what_was_said_before_of_a_term_is_the_same_with_one_more_file(
    arguments: str, loss: str, temperature: float, weight: float
) -> None:
    found = terms(*arguments.split(), "--config", "hint.yaml")
    assert [*found] == ["kd", "hint"]
    assert found["hint"]["init_args"]["weight"] == 2.0
    given = found["kd"]["init_args"]
    assert given["loss"]["class_path"] == f"lightning_kd.losses.{loss}"
    assert given["loss"]["init_args"]["temperature"] == temperature
    assert given["weight"] == weight


@pytest.mark.usefixtures("files")
def test_a_term_with_its_class_and_one_without_are_put_together() -> None:
    found = terms("--config", "long_hint.yaml", "--config", "light_hint.yaml", "--config", "lighter.yaml")
    assert {name: term["init_args"]["weight"] for name, term in found.items()} == {"kd": 0.25, "hint": 0.5}
    assert found["hint"]["init_args"]["student"] == "stage1"


@pytest.mark.usefixtures("files")
def test_a_file_without_terms_leaves_them() -> None:
    Path("task.yaml").write_text("model: {task_weight: 0.3}")
    assert [*terms("--config", "hint.yaml", "--config", "task.yaml")] == ["kd", "hint"]


@pytest.mark.usefixtures("files")
def test_a_mistyped_term_of_several_files_is_told() -> None:
    Path("mistyped.yaml").write_text("model: {terms: {hnit: {weight: 1.0}}}")
    told = r"term 'hnit' has no loss; the terms with one are: hint, kd\. Did you mean hint\?"
    with pytest.raises(UsageError, match=told):
        terms("--config", "hint.yaml", "--config", "mistyped.yaml", "--config", "lighter.yaml")
    assert [*terms("--config", "mistyped.yaml", "--config", "none.yaml", "--config", "hint.yaml")] == ["hint"]


@pytest.mark.usefixtures("files")
def test_a_printed_configuration_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("fit", "validate", "predict"):
        with pytest.raises(SystemExit):
            main([command, "--config", "digits_kd", "--config", "lighter.yaml", "--print_config"])
        Path("printed.yaml").write_text(capsys.readouterr().out)
        cli = compare.read("printed.yaml", None, ["--config", "hint.yaml"])
        assert [*cli.config["model"]["terms"]] == ["kd", "hint"]
        assert cli.config["model"]["terms"]["kd"]["init_args"]["weight"] == 0.25


def test_a_run_that_is_gone_on_with_is_not_compared(tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text("ckpt_path: last.ckpt")
    with pytest.raises(UsageError, match="ckpt_path is of one run"):
        compare.read("digits_kd", None, ["--config", str(tmp_path / "it.yaml")])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("models: {}", r"no section models\. Did you mean model\?"),
        ("models: {terms: {}}", r"no section models\. Did you mean model\?"),
        ("datas: {init_args: {}}", r"no section datas\. Did you mean data\?"),
        ("zzz: {}", r"no section zzz\. There are: trainer, model, data, "),
        ("model: {termss: {}}", r"no section model\.termss\. Did you mean terms\?"),
        ("trainer: {loger: {}}", r"no section trainer\.loger\. Did you mean logger\?"),
    ],
)
def test_a_mistyped_section_in_which_nothing_is_given_is_told(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text(content)
    with pytest.raises(UsageError, match=told):
        terms("--config", str(tmp_path / "typo.yaml"))


def test_a_section_in_which_nothing_is_given_is_none_that_is_mistyped(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("trainer: {}\nmodel: {student: {init_args: {}}}\ndata: {init_args: {}}\n")
    assert [*terms("--config", str(tmp_path / "empty.yaml"))] == ["kd"]
