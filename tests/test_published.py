"""Predictions against what others measured: medians are kept, and what can't be expressed says why."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest

from costbp.config.load import load_plan
from costbp.config.study import Plan
from costbp.cost.published import (
    COLUMNS,
    FOLDER,
    Row,
    difference_scores,
    pairs,
    predict,
    read_rows,
    scores,
)
from costbp.errors import UserError

FEW = {  # of each source some rows that take little time
    "Lightning-AI/litgpt": (
        "llama-3.2-1b",
        "llama-3.2-3b",
        "stablelm-3b",
        "mistral-7b",
        "falcon-7b",
    ),
    "arXiv 2305.17333 Table 22": ("opt-13b",),
    "HF transformers docs": ("bert-large-uncased",),
    "GRZO": ("llama-3-8b",),
}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan()


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "hardware"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def found(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    chosen = [
        row
        for row in read_rows(FOLDER / "measurements.csv")
        for source, models in FEW.items()
        if row["source"].startswith(source) and row["model"] in models
    ]
    return list(predict(plan, table(tmp_path_factory.mktemp("rows") / "few.csv", chosen)))


def test_medians_are_kept(found: list[Row]) -> None:
    """The aim: 5 % in the median, 10 % at the 80th of 100, with no constant fitted on these rows; a
    closed form that knows of no loop is not near."""
    of = {score.name: score for score in scores(found)}
    assert of["LitGPT"].count == 10
    assert of["LitGPT"].median < 0.03
    assert of["LitGPT"].eighty < 0.04
    assert of["HF docs"].median < 0.04
    assert of["MeZO"].median < 0.03
    assert of["all"].count >= 18
    assert of["all"].median < 0.05
    assert of["all"].eighty < 0.10
    assert of["all"].rival > 3 * of["all"].median


def test_differences_are_kept(found: list[Row]) -> None:
    every = {score.name: score for score in difference_scores(pairs(found))}["all"]
    assert every.count >= 8
    assert every.median < 0.1


def test_every_row_of_memory_is_expressed_or_says_why_not(plan: Plan) -> None:
    rows = read_rows(FOLDER / "measurements.csv")
    assert len(rows) == 192
    silent = [
        row
        for row in rows
        if row["source"].startswith(("huggingface/peft README", "liang", "B-PDF"))
    ]
    assert silent
    path = FOLDER / "measurements.csv"
    kept = list(predict(plan, path, lambda given: [g for g in given if g[1] in silent]))
    assert kept
    assert all(row.predicted is None and row.why for row in kept)
    assert math.isnan(kept[0].error)


def row(**changed: str) -> dict[str, str]:
    first = dict(read_rows(FOLDER / "measurements.csv")[0])
    return first | {"source": "Lightning-AI/litgpt@x", "model": "tiny-llama", **changed}


MEZO = {"source": "arXiv 2305.17333 Table 22", "method": "mezo_or_zero_shot"}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"source": "a blog"}, "no such source is known"),
        ({"model": "gpt-17", **MEZO}, "the model's sizes are not known"),
        ({"method": "qlora", "batch": "?"}, "its batch is not stated"),
        ({"method": "galore"}, "no rule expresses its method"),
        ({"method": "qlora", "seq": "999999"}, "length 999999 exceeds the model's maximum"),
    ],
)
def test_why_not(plan: Plan, tmp_path: Path, changed: dict[str, str], why: str) -> None:
    given = {"method": "lora", "batch": "1", "seq": "32", **changed}
    (only,) = predict(plan, table(tmp_path / "one.csv", [row(**given)]))
    assert only.predicted is None
    assert why in only.why


def test_tables_that_can_t_be_read(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="value = 'much' is no number"):
        list(predict(plan, table(tmp_path / "one.csv", [row(value="much")])))
    (tmp_path / "two.csv").write_text("model,value\n")
    with pytest.raises(UserError, match="no column source, measure"):
        read_rows(tmp_path / "two.csv")


def test_pairs_differ_in_one_thing_that_is_not_lost_in_rounding() -> None:
    def made(published: float, predicted: float, **settings: str) -> Row:
        named = {"part": "step", "length": "8", "batch": "1"} | settings
        keys = {"source": "s", "model": "m", "method": "", "batch": "", "seq": ""}
        return Row(published=published, predicted=predicted, settings=named, **keys)

    rows = [
        made(10.0, 11.0),
        made(20.0, 19.0, length="16"),
        made(10.1, 11.0, batch="2"),  # a hundredth
        made(40.0, 50.0, length="16", batch="2"),  # differs in both from the first
    ]
    assert [score.name for score in difference_scores(pairs(rows))] == ["length", "batch", "all"]
    apart = [replace(row, bounds=True) for row in rows]
    assert [score.name for score in difference_scores(pairs(apart))] == ["s, bounds"]
    got = [(p.key, p.published, p.predicted) for p in pairs(rows)]
    assert got == [
        ("length", 10.0, 8.0),
        ("batch", 20.0, 31.0),
        ("length", pytest.approx(29.9), 39.0),
    ]
