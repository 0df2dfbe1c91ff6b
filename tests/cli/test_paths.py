"""Paths of a configuration and of options, in which environment variables and ``~`` are filled in."""

from pathlib import Path

import pytest
import torch
from lightning_kd.callbacks import TeacherCache
from toy_run import Net, configuration

from lightning_kd.cli import compare, main, plot
from lightning_kd.teachers import Cached, Frozen


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is called ``~`` and ``$HERE``; one stands in another one, which is empty."""
    folder = tmp_path / "home"
    for each in (folder, tmp_path / "empty"):
        each.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("HERE", str(folder))
    configuration("mine", checkpoint="$HERE/new/t.ckpt")
    monkeypatch.chdir(tmp_path / "empty")
    return folder


@pytest.mark.parametrize("name", ["~/t.ckpt", "$HERE/t.ckpt", "${HERE}/t.ckpt"])
def test_weights_are_found(name: str, home: Path) -> None:
    torch.save(Net(6).state_dict(), home / "t.ckpt")
    assert torch.equal(Frozen(Net(6), name).model.head.bias, torch.load(home / "t.ckpt")["head.bias"])  # type: ignore[union-attr]
    with pytest.raises(FileNotFoundError, match=f"No checkpoint at '{home}/u.ckpt'"):
        Frozen(Net(6), name.replace("/t", "/u"))


def test_a_cache_is_where_it_is_said_to_be(home: Path) -> None:
    assert Cached("~/cache").folder == Cached("$HERE/cache").folder == home / "cache"
    assert Cached(TeacherCache("~/cache").folder).folder == home / "cache"


def test_every_command_takes_them(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", "$HERE/mine.yaml", "--traceback"]
    assert main(["fit", *config, "--trainer.default_root_dir", "~/mine"]) == 0
    assert {each.name for each in (home / "new").iterdir()} == {"t.ckpt", "t.ckpt.json"}
    (checkpoint,) = (home / "mine").rglob("*.ckpt")
    student = f"~/{checkpoint.relative_to(home)}"
    assert (home / "mine" / "mine" / "version_0" / "metrics.csv").is_file()
    assert main(["test", *config, "--ckpt_path", student]) == 0
    assert main(["predict", *config, "--ckpt_path", student, "--output", "$HERE/said.pt"]) == 0
    assert (home / "said.pt").is_file()
    assert main(["cache", *config, "--output", "~/cache"]) == 0
    assert (home / "cache" / "cache.json").is_file()
    assert main(["export", student, "--format", "state_dict", "--output", "$HERE/out.pt", "--traceback"]) == 0
    assert (home / "out.pt").is_file()
    monkeypatch.setattr(plot, "save", lambda *_: None)
    monkeypatch.setattr(compare, "_draw", lambda *_: False)
    capsys.readouterr()
    given = ["--teacher", "$HERE/new/t.ckpt", "--student-ckpt", "~/out.pt", "--output", "~/compared"]
    assert main(["compare", *config, *given]) == 0
    assert f"{home}/out.pt" in (home / "compared" / "comparison.md").read_text()
    assert main(["compare", *config, "--output", "$HERE/compared"]) == 0
    told = capsys.readouterr().out
    assert f"teacher: found at {home}/new/t.ckpt, trained before" in told
    assert not list(Path().iterdir())
