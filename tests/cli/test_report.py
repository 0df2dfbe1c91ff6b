import csv
from pathlib import Path

import pytest

from lightning_kd.cli.report import Row, markdown, save, verdict


def rows(distilled: list[float]) -> list[Row]:
    def metrics(values: list[float]) -> dict[int, dict[str, float]]:
        return {seed: {"accuracy": v, "agreement": 0.9, "loss": 1.0} for seed, v in enumerate(values)}

    higher = {"accuracy": True, "agreement": True}
    return [
        Row(
            "teacher", "teacher", {0: {"accuracy": 0.95, "agreement": 1.0}}, main="accuracy", higher=higher, itself=True
        ),
        Row("student alone", "alone", metrics([0.90, 0.91, 0.92])),
        Row("kd", "distilled", metrics(distilled), baseline="student alone", costs={"parameters": 1234.0}),
    ]


@pytest.mark.parametrize(
    ("distilled", "said"),
    [
        (
            [0.92, 0.931, 0.939],
            "+2.00 points of accuracy against the student alone (± 0.10 over 3 seeds, better in 3; ",
        ),
        ([0.93, 0.90, 0.91], "no difference is shown"),
        ([0.80, 0.81, 0.825], ": a loss."),
        ([0.95], "cannot be told"),
        # Gains of 4, 2 and 6 points: mean 4, standard error 2 / sqrt(3); the table's t of two degrees is 4.303.
        ([0.94, 0.93, 0.98], "95 % interval -0.97 to +8.97): no difference is shown"),
    ],
)
def test_the_verdict_is_honest(distilled: list[float], said: str) -> None:
    assert said in verdict(rows(distilled))


def test_the_table_has_mean_and_sample_deviation() -> None:
    table = markdown(rows([0.90, 0.92, 0.94]))
    assert "92.00 ± 2.00" in table
    assert "1,234" in table
    assert "loss" not in table


def test_a_teacher_agrees_with_an_ensemble_and_not_with_itself() -> None:
    members = [
        Row(f"teacher {i}", "teacher", {0: {"accuracy": 0.94, "agreement": often}}) for i, often in ((2, 0.975), (3, 1))
    ]
    itself, _, _, one, other = markdown([*rows([0.9]), *members]).splitlines()[2:7]
    assert "100.00" not in itself
    assert "97.50" in one
    assert "100.00" in other


def test_the_csv_files_hold_rows_and_runs(tmp_path: Path) -> None:
    save(rows([0.90, 0.92, 0.94]), "text", tmp_path)
    with (tmp_path / "comparison.csv").open() as file:
        *_, kd = csv.DictReader(file)
    assert float(kd["accuracy_std"]) == pytest.approx(0.02)
    with (tmp_path / "runs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 7


def of(metric: str, values: list[float], alone: list[float], higher: bool | None) -> list[Row]:
    def each(measured: list[float]) -> dict[int, dict[str, float]]:
        return {seed: {"a": 0.5, metric: v, f"{metric}/sky": v} for seed, v in enumerate(measured)}

    about: dict[str, bool | None] = {metric: higher}
    return [
        Row("alone", "alone", each(alone), main=metric, higher=about),
        Row("kd", "distilled", each(values), baseline="alone", main=metric, higher=about),
    ]


@pytest.mark.parametrize(
    ("higher", "said"),
    [
        (True, "better in 3"),
        (True, ": a gain."),
        (False, ": a loss."),
        (False, "better in 0"),
        (None, ": a difference."),
    ],
)
def test_what_is_better_depends_on_the_metric(higher: bool | None, said: str) -> None:
    assert said in verdict(of("error", [2.0, 2.1, 2.2], [1.0, 1.11, 1.2], higher))


def test_fractions_of_what_is_right_are_in_percent_and_nothing_else_is() -> None:
    assert "miou, %" in markdown(of("miou", [0.5], [0.25], True))
    assert "error, %" not in markdown(of("error", [0.5], [0.25], False))
    assert "psnr, %" not in markdown(of("psnr", [30.0], [0.25], True))


def test_a_correlation_is_no_fraction() -> None:
    rows = of("correlation", [0.5], [0.25], True)
    rows[0].fraction = {"correlation": False}
    assert "correlation, %" not in markdown(rows)


def test_a_teacher_has_no_error_to_itself() -> None:
    about = {"agreement": False}
    itself = Row("teacher", "teacher", {0: {"mae": 0.5, "agreement": 0.0}}, higher=about, itself=True)
    table = markdown([itself, Row("student alone", "alone", {0: {"mae": 0.6, "agreement": 0.25}}, higher=about)])
    assert "agreement, %" not in table
    assert "0.0000" not in table
    assert "0.2500" in table


def test_single_classes_are_in_the_files_only(tmp_path: Path) -> None:
    rows = of("miou", [0.5], [0.25], True)
    assert markdown(rows).splitlines()[0].split("|")[2].strip() == "miou, %"  # the main one is the first
    assert "sky" not in markdown(rows)
    save(rows, "text", tmp_path)
    assert "miou/sky_mean" in (tmp_path / "comparison.csv").read_text()


def test_what_no_seed_has_is_no_number_and_no_error(tmp_path: Path) -> None:
    each = {
        seed: {"mAP": 0.5 + seed / 10, "mAP/large": float("nan")} for seed in range(3)
    }  # scenes without large boxes
    save([Row("student alone", "alone", each, main="mAP", higher={"mAP": True, "mAP/large": True})], "text", tmp_path)
    with (tmp_path / "comparison.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["mAP_std"]) == pytest.approx(0.1)
    assert (row["mAP/large_mean"], row["mAP/large_std"]) == ("nan", "nan")
