"""A user's own classes from an entry alone: AG News' canonical CSV, and all that can be wrong with it."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest

from costbp.cli import app, doctor
from costbp.config import load_plan
from costbp.config.catalog import LocalData
from costbp.data.pairs import Pair
from costbp.data.prepare import load_prepared, prepare
from costbp.data.sources import read_examples
from costbp.errors import UserError
from costbp.tasks.base import load_task
from tests.test_sources import agnews

NAMES = ["World", "Sports", "Business", "Technology"]
STUDY = """
study: mine
entries:
  tasks:
    my_news:
      label: AG News, from its own files
      loader:
        kind: classification
        names: [World, Sports, Business, Technology]
        labels: {1: World, 2: Sports, 3: Business, 4: Technology}
      data: {kind: local, path: news, header: false, columns: {text: [2, 3], label: 1}}
      batch_size: 8
      max_length: 32
      validation: 20
      test: 30
experiments:
  - {models: [tiny_lora], tasks: [my_news], methods: [bp_checkpointing], budgets: [units_96]}
seeds: [0]
paths: {reports: reports/mine}
tuning: {file: config/tuned/mine.yaml}
"""
FILE = Path("news/train.csv")


def sentences(count: int, seed: int) -> list[list[str]]:
    """Rows as those of AG News: class from 1, title, description; quotes, commas, entities and the
    backslashes that stand for line breaks there."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        place, goods = chance.choice(["Oslo", "Lima", "Kyoto"]), chance.choice(["grain", "chips"])
        rows.append(
            [
                str(1 + number % 4),
                f"{place}'s {goods} #{seed}-{number} (Agency)",
                f'{place} - A maker of {goods}, "{number} a day", has\\grown,#39; it said.',
            ]
        )
    return rows


def written(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)


@pytest.fixture
def study(workdir):
    train, test = sentences(160, 0), sentences(40, 1)
    written(FILE, [*train, train[0], test[0], ["2", "", " "]])
    written(Path("news/test.csv"), test)
    path = Path("config/studies/mine.yaml")
    path.write_text(STUDY)
    return path


def test_canonical_agnews_is_checked_prepared_and_trained(study, capsys):
    words = ["-c", str(study)]
    app(["doctor", *words], standalone_mode=False)
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "train 162 (World 42, Sports 40, Business 40, Technology 40)",
        "test 40 (World 10, Sports 10, Business 10, Technology 10)",
        "1 without text, left out",
        "1 given twice, kept once",
        "1 in two splits, left out of train",
        "can run here",
    ):
        assert part in said
    app(["prepare", *words, "-m", "tiny_lora", "-t", "my_news"], standalone_mode=False)
    plan = load_plan([study])
    data = load_prepared(prepare(Pair.of(plan, "tiny_lora", "my_news")))
    assert data.names == NAMES
    assert data.facts["examples"] == {"train": 140, "validation": 20, "test": 30}
    assert data.splits["train"].labels.bincount().tolist() == pytest.approx([35] * 4, abs=6)
    experiment = ["-m", "tiny_lora", "-t", "my_news", "-M", "bp_checkpointing", "-b", "units_96"]
    app(["train", *words, *experiment], standalone_mode=False)
    (cell,) = plan.cells()
    (spec,) = plan.specs(cell)
    record = json.loads((spec.folder(plan.study.paths.store) / "record.json").read_text())
    assert record["outcome"] == "completed"


def test_encoding_says_in_a_log_how_far_it_is(study, monkeypatch, capsys):
    monkeypatch.setattr("costbp.console.PAUSE", -1.0)
    study.write_text(study.read_text().replace("tiny_lora", "tiny_head"))
    prepare(Pair.of(load_plan([study]), "tiny_head", "my_news"))
    told = [text for text in capsys.readouterr().err.splitlines() if "encoded" in text]
    assert told[:2] == [f"my_news: train encoded, batches of 64: {n} of 3" for n in (0, 1)]


def test_rows_are_as_the_file_has_them(study):
    task = load_plan([study]).catalog.tasks["my_news"]
    found = read_examples(task, "my_news", Path())
    first, (_, title, text) = found.examples["test"][0], sentences(1, 1)[0]
    assert (first.text, first.answer) == (f"{title} {text}", "World")
    assert found.empty == 1
    assert load_task(task.loader).instruction == "One of World, Sports, Business, Technology:"


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "json", "parquet", "header", "names"])
def test_other_formats_and_labels_give_the_same_examples(kind, study):
    import pandas as pd

    wanted = read_examples(load_plan([study]).catalog.tasks["my_news"], "my_news", Path()).examples
    text, numbers = study.read_text(), "header: false, columns: {text: [2, 3], label: 1}"
    for name in ("train", "test"):
        rows = list(csv.reader(Path(f"news/{name}.csv").read_text("utf-8").splitlines()))
        frame = pd.DataFrame(rows, columns=["class", "title", "text"]).astype({"class": int})
        Path(f"news/{name}.csv").unlink()
        if kind == "names":
            frame["class"] = [NAMES[label - 1] for label in frame["class"]]
        if kind == "tsv":
            frame.to_csv(f"news/{name}.tsv", sep="\t", index=False, header=False)
        elif kind in ("header", "names"):
            frame.to_csv(f"news/{name}.csv", index=False, encoding="utf-8-sig")
        elif kind == "parquet":
            frame.to_parquet(f"news/{name}.parquet")
        else:
            frame.to_json(f"news/{name}.{kind}", orient="records", lines=kind == "jsonl")
    if kind != "tsv":
        text = text.replace(numbers, "columns: {text: [title, text], label: class}")
    if kind == "names":
        text = text.replace("labels: {1: World, 2: Sports, 3: Business, 4: Technology}", "")
    study.write_text(text)
    task = load_plan([study]).catalog.tasks["my_news"]
    assert read_examples(task, "my_news", Path()).examples == wanted


def complaint(study: Path) -> str:
    """What doctor says is wrong with a study's files, or why the study can't be loaded."""
    try:
        found = [f.remark for f in doctor.files(load_plan([study])) if f.state == "wrong"]
    except UserError as error:
        found = [str(error)]
    (text,) = found
    assert "\n" not in text and len(text) < 600
    assert "news" in text and "Traceback" not in text
    return text


def entry(old: str, new: str):
    def change(study: Path) -> None:
        text = study.read_text()
        assert old in text
        study.write_text(text.replace(old, new))

    return change


def line(number: int, text: str):
    """The training file with another line there."""

    def change(study: Path) -> None:
        lines = FILE.read_text(encoding="utf-8").splitlines(keepends=True)
        lines[number - 1] = text
        FILE.write_text("".join(lines), encoding="utf-8")

    return change


def content(data: bytes, name: str = "train.csv"):
    def change(study: Path) -> None:
        FILE.unlink()
        FILE.with_name(name).write_bytes(data)

    return change


def typed(*labels):
    """As a jsonl, with these labels."""

    def change(study: Path) -> None:
        entry("header: false, columns: {text: [2, 3], label: 1}", "header: true")(study)
        FILE.with_name("test.csv").unlink()
        rows = [json.dumps({"text": f"t {i}", "label": label}) for i, label in enumerate(labels)]
        content("\n".join(rows).encode(), "train.jsonl")(study)

    return change


ALLOWED = "allowed: 1, 2, 3, 4"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (entry("[2, 3]", "[2, 4]"), "news/test.csv has no column '4' for 'text'; allowed: 1, 2, 3"),
        (entry("[2, 3]", "title"), "has no column 'title' for 'text'; allowed: 1, 2, 3"),
        (entry("false, columns: {text: [2, 3], label: 1}", "true"), "has no column 'text' for 'text'; allowed: "),
        (entry("header: false, ", ""), "data.columns has numbers: say data.header, true where"),
        (line(3, '"5","a","b"\n'), "news/train.csv, line 3: its label '5' is not known; " + ALLOWED),
        (line(3, '"0","a","b"\n'), "news/train.csv, line 3: its label '0' is not known; " + ALLOWED),
        (line(9, '"","a","b"\n'), "news/train.csv, line 9: its label '' is empty; " + ALLOWED),
        (line(2, '"1","two\nlines","b"\n"World","a","b"\n'), "news/train.csv, line 4: its label 'World' is not known; " + ALLOWED),
        (typed(1, 2, "3"), "news/train.jsonl, line 3: its label '3' is of another type than those before; " + ALLOWED),
        (typed(1, None), "news/train.jsonl, line 2: its label None is empty; " + ALLOWED),
        (typed(1, True), "news/train.jsonl, line 2: its label True is not known; " + ALLOWED),
        (typed(1, 2.0), "news/train.jsonl, line 2: its label 2.0 is not known; " + ALLOWED),
        (content(b'{"text": "a", "label": 1}\n{"text": "b"}\n', "train.jsonl"), "news/train.jsonl has no column '3'"),
        (entry("[World, Sports", "[World, World, Sports"), "loader.names has one twice, or an empty one: World, World"),
        (entry("3: Business, 4: Technology", "3: Trade, 4: Technology"), "loader.labels: 3 means 'Trade'; allowed: World, Sports"),
        (entry(", 4: Technology", ""), "loader.labels: no label means 'Technology'"),
        (entry("[World, Sports, Business, Technology]", "[World]"), "names"),
        (entry("      loader:\n        kind: classification\n        names: [World, Sports, Business, Technology]\n        labels: {1: World, 2: Sports, 3: Business, 4: Technology}", "      loader: classification"), "loader.names' is missing"),
        (content(b'"1","a","b"\n"1","c","d"\n'), "split 'train' of its source has one class alone, World"),
        (content(b""), "news/train.csv is empty"),
        (line(5, '"2","title"\n'), "news/train.csv, line 5: has 2 fields, not 3"),
        (line(6, '"2","title","never ended\n'), "news/train.csv, line 6: its quotes aren't balanced"),
        (content('"1","a","b"\n"2","café","b"\n'.encode("latin-1")), "news/train.csv, line 2: byte 0xe9 is not UTF-8; convert the file"),
        (content('"1","a","b"\n'.encode("utf-16")), "news/train.csv, line 1: byte 0xff is not UTF-8"),
        (entry("kind: local, path: news, header: false, columns: {text: [2, 3], label: 1}", "kind: asset, asset: nlp_data"), "loader classification needs data of kind local or hub"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_that_names_the_row(change, words, study):
    change(study)
    assert words in complaint(study)


# --- a shipped task on a file of one's own ---------------------------------------------------------


def rows(labels) -> str:
    return "text,label\n" + "".join(f"item {i},{label}\n" for i, label in enumerate(labels))


def test_a_bad_label_is_blamed_on_its_own_line_and_none_is_shifted(tmp_path):
    path = tmp_path / "x.csv"
    task = agnews(path=str(path))
    path.write_text(rows([0, 1, 2, "", 3]))
    with pytest.raises(UserError, match=r"x.csv, line 5: label '' is outside the set: World"):
        read_examples(task, "x", tmp_path)
    path.write_text(rows([1, 2, 3, 1]))
    with pytest.raises(UserError, match=r"are numbers from 1, and 'agnews' takes 0 for World"):
        read_examples(task, "x", tmp_path)
    path.write_text(rows([0, "Sports", 2]))
    found = read_examples(task, "x", tmp_path).examples[""]
    assert [e.answer for e in found] == ["World", "Sports", "Business"]


def test_texts_of_a_csv_stay_as_they_are(tmp_path):
    path = tmp_path / "x.csv"
    texts = ["007", "1.50", "1e5", "nan", "true", "12", "1.5", "-3", "inf", ""]
    path.write_text("text,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(texts)))
    found = read_examples(agnews(path=str(path)), "x", tmp_path)
    assert [e.text for e in found.examples[""]] == texts[:-1]


def test_runs_on_files_keep_their_hash_without_a_header():
    assert LocalData(path="x", columns={"text": "a"}).model_dump(mode="json") == {
        "kind": "local", "path": "x", "splits": {}, "columns": {"text": "a"},
    }  # fmt: skip
