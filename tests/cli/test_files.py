"""Several files, and files that a command or a run has written."""

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
    Path("none.yaml").write_text("model: {terms: null}")
    assert [*terms("--config", "none.yaml", "--config", "hint.yaml")] == ["hint"]
    assert [*terms("--model.terms=null", "--config", "hint.yaml")] == ["hint"]


@pytest.mark.usefixtures("files")
def test_a_printed_configuration_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("fit", "validate", "predict"):
        with pytest.raises(SystemExit):
            main([command, "--config", "digits_kd", "--config", "lighter.yaml", "--print_config"])
        Path("printed.yaml").write_text(capsys.readouterr().out)
        cli = compare.read("printed.yaml", None, [])
        assert cli.config["model"]["terms"]["kd"]["init_args"]["weight"] == 0.25


def test_a_run_that_is_gone_on_with_is_not_compared(tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text("ckpt_path: last.ckpt")
    with pytest.raises(UsageError, match="ckpt_path is of one run"):
        compare.read("digits_kd", None, ["--config", str(tmp_path / "it.yaml")])
