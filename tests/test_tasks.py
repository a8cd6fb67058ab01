"""Splits are deterministic and disjoint; batches hold what they should."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from costbp.config import load_plan
from costbp.config.catalog import HubData, Partition
from costbp.data.encoded import Split, padded
from costbp.data.pairs import Pair
from costbp.data.prepare import load_prepared, prepare
from costbp.data.splits import distinct, split
from costbp.errors import UserError
from costbp.models.loss import IGNORED
from costbp.models.tokenizer import Bytes, Hashed
from costbp.tasks import movie_reviews, trec
from costbp.tasks.base import POOL, Example, encoded_image, named
from costbp.train.loop import BatchStream


@pytest.fixture
def task(workdir):
    entry = load_plan().catalog.tasks["docstrings"]
    return entry.model_copy(update={"validation": 20, "test": 30})


def examples(n: int = 200, start: int = 0) -> list[Example]:
    return [Example(f"text {i}", "abc"[i % 3]) for i in range(start, start + n)]


def texts(part):
    return {e.text for e in part}


def apart(parts):
    sets = [texts(part) for part in parts.values()]
    return sum(map(len, sets)) == len(set.union(*sets)) == sum(map(len, parts.values()))


# --- splits ------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_whole(task):
    parts = split({POOL: examples()}, task)
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [150, 20, 30]
    assert apart(parts)
    assert set.union(*map(texts, parts.values())) == texts(examples())


def test_splits_depend_on_the_seed_and_not_on_the_order_of_reading(task):
    shuffled = examples()
    random.Random(1).shuffle(shuffled)
    first = split({POOL: examples()}, task)
    assert first == split({POOL: shuffled}, task)
    other = split({POOL: examples()}, task.model_copy(update={"split_seed": 1}))
    assert texts(other["test"]) != texts(first["test"])


def test_a_text_that_comes_back_is_kept_once():
    found = distinct([Example("x", "b"), Example("y", "a"), Example("x", "a")])
    assert found == [Example("x", "b"), Example("y", "a")]
    # other contexts and other pictures make other items
    assert len(distinct([Example("x", "b", c) for c in "pq"])) == 2
    assert len(distinct([Example("x", "b", image=encoded_image(c)) for c in (b"1", b"2")])) == 2


def test_splits_of_the_source_stay_apart_and_a_missing_one_is_carved_from_train(task):
    own = {"train": "training", "test": "validation"}
    data = HubData(kind="hub", repo="a/b", splits=own)
    entry = task.model_copy(update={"data": data, "test": 40})
    held = examples(60, 180)  # 20 of them in the training split, too
    parts = split({"training": examples(), "validation": held}, entry)
    assert texts(parts["test"]) < texts(held) and len(parts["test"]) == 40
    assert texts(parts["validation"]) < texts(examples()) - texts(held)
    assert texts(parts["train"]) == texts(examples()) - texts(held) - texts(parts["validation"])
    assert (
        len(
            split(
                {"training": examples(), "validation": held},
                entry.model_copy(update={"train": 7 + task.batch_size}),
            )["train"]
        )
        == 7 + task.batch_size
    )


def test_a_label_skewed_part_is_dealt_from_the_pool(task):
    entry = task.model_copy(update={"validation": 5, "test": 500})
    pool = {"train": examples(2700), "test": examples(300, 2700)}
    parts = []
    for part in range(10):
        partition = Partition(alpha=1.0, parts=10, part=part, test=0.2)
        found = split(pool, entry.model_copy(update={"partition": partition}))
        assert apart(found)
        whole = [e for one in found.values() for e in one]
        assert len(found["test"]) == round(0.2 * len(whole))
        parts.append(whole)
    assert sorted(e.text for part in parts for e in part) == sorted(texts(examples(3000)))
    shares = [Counter(e.answer for e in part)["a"] / len(part) for part in parts]
    assert max(shares) - min(shares) > 0.2  # of a third each


@pytest.mark.parametrize("partition", [None, *(Partition(parts=3, part=i) for i in range(3))])
def test_no_two_splits_share_a_passage(task, partition):
    pool = [Example(f"text {i}", "ab"[i % 2], f"passage {i // 7}") for i in range(700)]
    for count in range(28, 36):  # wherever a passage ends
        wanted = {"validation": count, "test": 50 if partition is None else 700}
        parts = split({POOL: pool}, task.model_copy(update=wanted | {"partition": partition}))
        passages = [{e.context for e in part} for part in parts.values()]
        assert sum(map(len, passages)) == len(set.union(*passages))
        assert count <= len(parts["validation"]) <= count + 7
        held = 50 if partition is None else round(0.2 * sum(map(len, parts.values())))
        assert held <= len(parts["test"]) <= held + 7


def test_too_few_examples_are_one_sentence(task):
    with pytest.raises(UserError, match="task 'x': 60 examples are too few for 20 validation"):
        split({POOL: examples(60)}, task, "x")


# --- rows --------------------------------------------------------------------------------------


def read(task, folder):
    return [task.example(row) for _, row in task.rows(folder)]


def test_trec_reads_coarse_labels(tmp_path: Path):
    lines = ["DESC:manner How  so ?", "HUM:ind Who ?", "DESC:def How so ?"]
    (tmp_path / "question_labels.txt").write_text("\n".join(lines), encoding="latin-1")
    found = distinct(read(trec.TASK, tmp_path))
    assert [(e.text, e.answer) for e in found] == [("How so ?", "DESC"), ("Who ?", "HUM")]


def test_movie_reviews_leave_out_the_undecided(tmp_path: Path):
    rows = ["id\tsentiment\ttext", "1\t2.5\tgood", "2\t-0.4\tmeh", "3\t-3\tbad"]
    (tmp_path / "movie_reviews.txt").write_text("\n".join(rows), encoding="latin-1")
    found = read(movie_reviews.TASK, tmp_path)
    assert [(e.text, e.answer) for e in found] == [("good", "positive"), ("bad", "negative")]


def test_a_label_is_a_name_or_its_place():
    assert [named(value, ("no", "yes")) for value in (0, True, "yes")] == ["no", "yes", "yes"]
    for value in (2, -1, "maybe", None, 1.5):
        with pytest.raises(UserError, match="outside the set: no, yes"):
            named(value, ("no", "yes"))


# --- batches -----------------------------------------------------------------------------------


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
    seen = torch.cat([encoded.batch(part)["labels"] for part in encoded.order().split(3)])
    assert sorted(seen.tolist()) == list(range(len(rows)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8), st.data())
def test_only_answers_are_learnt(lengths, data):
    """Labels are the answer's tokens at their places, whatever the padding token is."""
    pad = data.draw(st.integers(0, 5))
    rows = [torch.arange(prompt + answer) for prompt, answer in lengths]
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    starts = torch.tensor([prompt for prompt, _ in lengths])
    encoded = Split(torch.cat(rows), torch.zeros(len(rows)), offsets, starts, pad)
    labels = encoded.batch(torch.arange(len(rows)))["labels"]
    for row, (prompt, answer) in zip(labels, lengths, strict=True):
        wanted = [IGNORED] * prompt + list(range(prompt, prompt + answer))
        assert row.tolist() == wanted + [IGNORED] * (len(row) - len(wanted))


def test_rows_are_padded_at_the_left_where_asked():
    batch = padded([torch.tensor([5]), torch.tensor([6, 7])], 3, 9, left=True)
    assert batch["input_ids"].tolist() == [[9, 9, 5], [9, 6, 7]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [0, 1, 1]]


def test_an_epoch_shows_every_example_once_and_epochs_differ():
    data = Split(torch.arange(12.0).reshape(12, 1), torch.arange(12))
    stream = BatchStream(data, 4, seed=5)
    epochs = [torch.cat([stream[3 * e + i]["labels"] for i in range(3)]).tolist() for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]
    assert torch.equal(BatchStream(data, 4, seed=5)[4]["labels"], stream[4]["labels"])


def test_prepared_data_round_trips_and_counts_truncation(workdir):
    plan = load_plan([Path("config/studies/smoke.yaml")])
    path = prepare(Pair.of(plan, "tiny_lora", "docstrings"))
    data = load_prepared(path)
    assert data.facts["examples"]["test"] == len(data.splits["test"]) == 500
    assert data.facts["truncated"]["train"] > 0
    longest = max(int(n) for n in data.splits["train"].offsets.diff())
    assert longest == plan.catalog.tasks["docstrings"].max_length
    test = data.splits["test"]
    assert [data.names[i] for i in test.labels.tolist()] == [e.answer for e in test.examples]
    path.write_bytes(b"half")
    with pytest.raises(UserError, match="is damaged"):
        load_prepared(path)


# --- tokens ------------------------------------------------------------------------------------


def test_hashed_words_stay_inside_the_vocabulary():
    (row,) = Hashed(16).rows(["The quick, brown fox; jumps!"])
    assert row[0] == 1 and row[-1] == 2 and all(3 <= token < 16 for token in row[1:-1])


def test_bytes_come_back_as_text():
    words = Bytes(300)
    assert words.text([1, *words.plain("Größe: 3 µm"), 2, 299]) == "Größe: 3 µm"
