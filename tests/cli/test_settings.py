import json
from pathlib import Path
from typing import Any

import pytest

from lightning_kd.cli.errors import UsageError
from lightning_kd.cli.settings import check_record, fingerprint


def test_what_is_only_shown_decides_no_run() -> None:
    settings = {"seed_everything": 0, "trainer": {"max_epochs": 2, "log_every_n_steps": 5}}
    shown = {"max_epochs": 2, "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False}
    shown |= {"logger": False, "profiler": "simple", "default_root_dir": "elsewhere", "limit_predict_batches": 1}
    assert fingerprint(settings) == fingerprint(settings | {"trainer": shown})
    assert fingerprint(settings) != fingerprint(settings | {"trainer": shown | {"max_epochs": 3}})


def test_how_data_are_loaded_decides_no_run(tmp_path: Path) -> None:
    def settings(**given: Any) -> dict[str, Any]:
        return {"data": {"class_path": "mine.Data", "init_args": {"root": "a", **given}}}

    quick = {"num_workers": 4, "pin_memory": True, "persistent_workers": True, "prefetch_factor": 8}
    slow = {"num_workers": 0, "pin_memory": False, "persistent_workers": False, "prefetch_factor": None}
    assert fingerprint(settings(**quick)) == fingerprint(settings(**slow))
    assert fingerprint(settings(**quick)) != fingerprint(settings(**quick, size=8))
    (tmp_path / "a.ckpt.json").write_text(json.dumps(settings(num_workers=4)))
    check_record(tmp_path / "a.ckpt", settings(**slow))
    with pytest.raises(UsageError, match=r"other settings \(data\.init_args\.root: a then, b now\)"):
        check_record(tmp_path / "a.ckpt", settings(**slow | {"root": "b"}))


def test_a_mistyped_folder_is_not_another_teacher(tmp_path: Path) -> None:
    file, data = tmp_path / "teacher.ckpt", tmp_path / "images"
    data.mkdir()
    (tmp_path / "teacher.ckpt.json").write_text(json.dumps({"data": {"folder": str(data)}}))
    with pytest.raises(UsageError, match=r"data\.folder: there is no .*imagse \(looked from"):
        check_record(file, {"data": {"folder": str(tmp_path / "imagse")}})
    with pytest.raises(UsageError, match="was trained with other settings"):
        check_record(file, {"data": {"folder": str(tmp_path)}})


def test_a_record_of_a_teacher_that_is_broken_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt.json").write_text("{")
    with pytest.raises(UsageError, match=r"a\.ckpt\.json, the record of how the teacher was trained, cannot be read"):
        check_record(tmp_path / "a.ckpt", {})
