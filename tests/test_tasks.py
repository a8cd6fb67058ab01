"""Splits are deterministic and disjoint; batches hold what they should."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from costbp.config import load_plan
from costbp.errors import UserError
from costbp.models.prepare import load_prepared, prepare
from costbp.models.tokenizer import hashed
from costbp.tasks import movie_reviews, trec
from costbp.tasks.base import Examples, Split, distinct, split
from costbp.train.loop import BatchStream


@pytest.fixture
def task(workdir):
    entry = load_plan().catalog.tasks["docstrings"]
    return entry.model_copy(update={"validation": 20, "test": 30})


def examples(n: int = 200) -> Examples:
    return Examples([f"text {i}" for i in range(n)], [i % 3 for i in range(n)], ["a", "b", "c"])


def test_splits_are_disjoint_and_whole(task):
    parts = split(examples(), task)
    texts = [set(part.texts) for part in parts.values()]
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [150, 20, 30]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert set.union(*texts) == set(examples().texts)


def test_splits_depend_on_the_seed_and_not_on_the_order_of_reading(task):
    order = list(range(200))
    random.Random(1).shuffle(order)
    first, shuffled = split(examples(), task), split(examples().take(order), task)
    assert {name: part.texts for name, part in first.items()} == {
        name: part.texts for name, part in shuffled.items()
    }
    assert first["test"].labels == shuffled["test"].labels
    other = split(examples(), task.model_copy(update={"split_seed": 1}))
    assert other["test"].texts != first["test"].texts


def test_a_text_that_comes_back_is_kept_once():
    found = distinct([("x", "b"), ("y", "a"), ("x", "a")], ["a", "b"])
    assert (found.texts, found.labels) == (["x", "y"], [1, 0])


def test_trec_reads_coarse_labels(tmp_path: Path):
    lines = ["DESC:manner How  so ?", "HUM:ind Who ?", "DESC:def How so ?"]
    (tmp_path / "question_labels.txt").write_text("\n".join(lines), encoding="latin-1")
    found = trec.read(tmp_path)
    assert found.texts == ["How so ?", "Who ?"]
    assert [found.names[i] for i in found.labels] == ["DESC", "HUM"]


def test_movie_reviews_leave_out_the_undecided(tmp_path: Path):
    rows = ["id\tsentiment\ttext", "1\t2.5\tgood", "2\t-0.4\tmeh", "3\t-3\tbad"]
    (tmp_path / "movie_reviews.txt").write_text("\n".join(rows), encoding="latin-1")
    found = movie_reviews.read(tmp_path)
    assert (found.texts, found.labels) == (["good", "bad"], [1, 0])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_batches_pad_to_multiples_of_eight_and_mask_the_padding(lengths):
    rows = [torch.arange(1, n + 1) for n in lengths]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    encoded = Split(torch.cat(rows), torch.arange(len(rows)), offsets)
    batch = encoded.batch(torch.arange(len(rows)))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape[1] % 8 == 0 and ids.shape[1] - max(lengths) < 8
    assert mask.sum(1).tolist() == lengths
    assert all(torch.equal(ids[i, : len(row)], row) for i, row in enumerate(rows))
    seen = torch.cat([b["labels"] for b in encoded.ordered(3)])
    assert sorted(seen.tolist()) == list(range(len(rows)))


def test_an_epoch_shows_every_example_once_and_epochs_differ():
    data = Split(torch.arange(12.0).reshape(12, 1), torch.arange(12))
    stream = BatchStream(data, 4, seed=5)
    epochs = [torch.cat([stream[3 * e + i]["labels"] for i in range(3)]).tolist() for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]
    assert torch.equal(BatchStream(data, 4, seed=5)[4]["labels"], stream[4]["labels"])


def test_prepared_data_round_trips_and_counts_truncation(workdir):
    plan = load_plan([Path("config/studies/smoke.yaml")])
    path = prepare(plan, "tiny_lora", "docstrings")
    data = load_prepared(path)
    assert data.facts["examples"]["test"] == len(data.splits["test"]) == 500
    assert data.facts["truncated"]["train"] > 0
    longest = max(int(n) for n in data.splits["train"].offsets.diff())
    assert longest == plan.catalog.tasks["docstrings"].max_length
    path.write_bytes(b"half")
    with pytest.raises(UserError, match="is damaged"):
        load_prepared(path)


def test_hashed_words_stay_inside_the_vocabulary():
    (row,) = hashed(16)(["The quick, brown fox; jumps!"])
    assert row[0] == 1 and row[-1] == 2 and all(3 <= token < 16 for token in row[1:-1])
