"""Rows from files and saved data sets, and what is said when they aren't as they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from costbp.config.catalog import HubData, LocalData, TaskEntry
from costbp.config.load import load_plan
from costbp.data.pairs import Pair
from costbp.data.prepare import load_prepared, prepare
from costbp.data.sources import read_examples
from costbp.data.splits import split
from costbp.errors import UserError
from costbp.models.tokenizer import Pretrained

ROWS = [{"text": f"item {i}", "label": i % 4} for i in range(80)]


def agnews(**data) -> TaskEntry:
    kind = HubData if data.get("kind") == "hub" else LocalData
    return TaskEntry(
        label="x", loader="agnews", data=kind(**data), batch_size=4, max_length=16,
        validation=8, test=8,
    )  # fmt: skip


def read(task, assets=Path()):
    return read_examples(task, "news", assets).examples


def written(folder: Path, kind: str, rows=ROWS, name="train") -> Path:
    import pandas as pd

    folder.mkdir(exist_ok=True, parents=True)
    path, frame = folder / f"{name}.{kind}", pd.DataFrame(rows)
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=kind == "jsonl")
    return path


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_a_file_of_each_format_gives_the_same_examples(kind, tmp_path):
    found = read(agnews(path=str(written(tmp_path, kind))))
    assert [(e.text, e.answer) for e in found[""]][:2] == [
        ("item 0", "World"),
        ("item 1", "Sports"),
    ]
    assert len(found[""]) == 80
    parts = split(found, agnews(path="x"))
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 64,
        "validation": 8,
        "test": 8,
    }


def test_files_named_like_splits_are_those_splits(tmp_path):
    written(tmp_path, "jsonl", ROWS[:60])
    written(tmp_path, "jsonl", ROWS[60:], "test")
    task = agnews(path=str(tmp_path))
    parts = split(read(task), task)
    assert {e.text for e in parts["test"]} <= {row["text"] for row in ROWS[60:]}
    assert {e.text for e in parts["train"] + parts["validation"]} == {r["text"] for r in ROWS[:60]}


def test_a_saved_data_set_and_mapped_columns_and_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = [{"body": row["text"], "topic": row["label"]} for row in ROWS]
    saved = DatasetDict(
        {"first": Dataset.from_list(rows[:60]), "other": Dataset.from_list(rows[60:])}
    )
    saved.save_to_disk(str(tmp_path / "set"))
    names = {"text": "body", "label": "topic"}
    splits = {"train": "first", "test": "other"}
    found = read(agnews(path=str(tmp_path / "set"), columns=names, splits=splits))
    assert [len(found[name]) for name in ("first", "other")] == [60, 20]
    assert found["first"][3].answer == "Technology"


@pytest.mark.parametrize(
    ("make", "data", "words"),
    [
        (lambda f: None, {}, r"is not there; check data.path"),
        (lambda f: (f / "m").mkdir(), {}, r"holds no .csv, .tsv, .json, .jsonl, .parquet file"),
        (lambda f: written(f / "m", "csv"), {"splits": {"train": "training"}}, r"has no split 'training'; allowed: train"),
        (lambda f: written(f / "m", "csv", [{"txt": "a", "label": 1}]), {}, r"has no column 'text' for 'text'; allowed: txt, label; did you mean 'txt'\? \(map it"),
        (lambda f: written(f / "m", "csv", [{"text": "a", "label": 7}]), {}, r"m/train.csv, line 2: label 7 is outside the set: World"),
        (lambda f: written(f / "m", "csv", [{"text": " ", "label": 1}]), {}, r"its source is empty"),
        (lambda f: written(f / "m", "csv", [], "train").write_text("text,label\n"), {"splits": {"train": "train"}}, r"m/train.csv is empty"),
        (lambda f: written(f / "m", "jsonl").write_text("{not json"), {}, r"m/train.jsonl, line 1: is not JSON \("),
        (lambda f: written(f / "m", "parquet").write_bytes(b"PAR1 half"), {}, r"can't be read \("),
    ],
)  # fmt: skip
def test_sources_that_are_not_as_they_should_be(make, data, words, tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        read(agnews(path=str(tmp_path / "m"), **data))
    assert str(caught.value).startswith("task 'news'")
    assert "\n" not in str(caught.value)


def test_splits_without_train_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"data.splits must say which of the source's splits is train"
    ):
        agnews(path=str(tmp_path), splits={"test": "test"})


def test_splits_of_other_names_are_asked_for(tmp_path):
    written(tmp_path, "csv", ROWS, "january")
    written(tmp_path, "csv", ROWS, "june")
    task = agnews(path=str(tmp_path))
    with pytest.raises(UserError, match=r"has the splits january, june; say under data.splits"):
        split(read(task), task, "news")


# --- a study that lays its own data over the catalog's -----------------------------------------


STUDY = """
study: mine
entries:
  tasks:
    gsm8k: {data: {kind: local, path: PATH}, batch_size: 2, validation: 2, test: 3}
experiments:
  - {models: [tiny_decoder], tasks: [gsm8k], methods: [bp_checkpointing], budgets: [units_96]}
paths: {reports: reports/mine}
tuning: {file: config/tuned/mine.yaml}
"""


@pytest.fixture
def mine(workdir):
    rows = [
        {"question": f"What is {i} + 1?", "answer": f"<<{i}+1={i + 1}>>{i}+1\n#### {i + 1}"}
        for i in range(40)
    ]
    folder = workdir / "data"
    folder.mkdir()
    for name, part in (("train", rows[:30]), ("test", rows[30:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    path = Path("config/studies/mine.yaml")
    path.write_text(STUDY.replace("PATH", "data"))
    return path


def test_a_study_replaces_a_source_and_its_content_names_the_runs(mine):
    plan = load_plan([mine])
    assert isinstance(plan.catalog.tasks["gsm8k"].data, LocalData)
    assert plan.assets() == {}
    data = load_prepared(prepare(Pair.of(plan, "tiny_decoder", "gsm8k")))
    assert data.facts["examples"] == {"train": 28, "validation": 2, "test": 3}
    (cell,) = plan.cells()
    before = plan.spec(cell, 0)
    assert before.assets.keys() == {"data"}
    digest = plan.assets_of("tiny_decoder", "gsm8k")
    assert digest == before.assets
    with Path("data/train.jsonl").open("a") as stream:
        stream.write(json.dumps({"question": "new", "answer": "#### 1"}) + "\n")
    from costbp.files import digest as digest_of

    digest_of.cache_clear()
    assert plan.spec(cell, 0).hash != before.hash


def test_a_partition_is_laid_over_a_task(mine):
    mine.write_text(
        mine.read_text().replace("batch_size: 2,", "batch_size: 2, partition: {parts: 2},")
    )
    partition = load_plan([mine]).catalog.tasks["gsm8k"].partition
    assert (partition.alpha, partition.parts, partition.part, partition.test) == (1.0, 2, 0, 0.2)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("path: data", "path: dada", "mine.yaml: entries.tasks.gsm8k.data.path = 'dada': no such file or folder"),
        ("gsm8k: {data", "gsm9k: {data", "tasks.gsm9k.label' is missing"),
        ("kind: local, path: data", "kind: local, pfad: data", "unknown key 'tasks.gsm8k.data.pfad'; allowed: columns, header, kind, path, splits"),
        ("validation: 2", "validation: none", "mine.yaml: tasks.gsm8k.validation"),
    ],
)  # fmt: skip
def test_mistakes_in_entries_of_a_study(mine, old, new, words):
    mine.write_text(mine.read_text().replace(old, new))
    with pytest.raises(UserError) as caught:
        load_plan([mine])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_free_text_is_no_answer_for_a_classifier(mine, costbp):
    mine.write_text(mine.read_text().replace("tiny_decoder", "tiny_lora"))
    done = costbp("prepare", "-c", str(mine), "-m", "tiny_lora", "-t", "gsm8k")
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "answers of task 'gsm8k' are free text; use a model of form causal" in done.stderr


# --- tokenizers --------------------------------------------------------------------------------


def tokenizer(folder: Path, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[END]": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special).save_pretrained(
        folder
    )


def test_a_tokenizer_without_pad_token_pads_with_its_end_or_is_refused(tmp_path):
    tokenizer(tmp_path / "end", eos_token="[END]")
    assert Pretrained(tmp_path / "end").pad == 1
    tokenizer(tmp_path / "none")
    with pytest.raises(
        UserError, match="neither a pad token nor one that ends a text; set pad_token"
    ):
        Pretrained(tmp_path / "none")
    with pytest.raises(UserError, match=r"no tokenizer that can be read"):
        Pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no chat template: set source.chat to false"):
        Pretrained(tmp_path / "end").chat("a", False)
