"""Each benchmark's rows, prompts, odd outputs and metrics, against values worked out by hand."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from costbp.config.load import load_catalog
from costbp.errors import UserError
from costbp.tasks import (
    agnews,
    boolq,
    gsm8k,
    mmlu,
    multirc,
    name_fits,
    visual_questions,
    word_choices,
    word_problems,
)
from costbp.tasks.base import Example, load_task, one_of
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("written", "letter"),
    [
        ("B", "B"),
        (" b", "B"),
        ("(C)", "C"),
        ("The answer is D.", "D"),
        ("A dog would say b", "A"),
        ("a good answer is C", "C"),
        ("**B**\nbecause A is wrong", "B"),
        ("Because", ""),
        ("", ""),
        ("E", ""),
    ],
)
def test_a_letter_is_read_from_odd_outputs(written, letter):
    assert mmlu.TASK.parse(written) == letter


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("Yes.", "yes"),
        ("no, it isn't", "no"),
        ("I know yes", "yes"),
        ("nothing", ""),
        ("NO", "no"),
        ("Yes, there is no doubt", "yes"),
    ],
)
def test_yes_and_no_are_read_as_words(written, answer):
    assert boolq.TASK.parse(written) == multirc.TASK.parse(written) == answer


def test_a_longer_name_goes_before_its_beginning():
    assert one_of(("red", "red wine"))("a red wine") == "red wine"


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("She makes 9 * 2 = $18.\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("#### $5.50 in all", "5.5"),
        ("#### -3", "-3"),
        ("so 12 and then 15 dollars", "15"),
        ("#### no idea", ""),
        ("#### 7 #### 8 and 9", "7"),
        ("2.0", "2"),
        ("The answer is 100.", "100"),
        ("100", "100"),
        ("twelve", ""),
        ("", ""),
    ],
)
def test_the_final_number_is_read_from_odd_outputs(written, number):
    if written == "#### no idea":
        assert gsm8k.final_number("1 #### no idea") == "1"
    assert gsm8k.final_number(written) == number


def test_gsm8k_leaves_the_calculators_notes_out_and_scores_numbers():
    row = {"question": " How many? ", "answer": "16 - 3 = <<16-3=13>>13 eggs\n#### 13"}
    example = gsm8k.TASK.example(row)
    assert example == Example("How many?", "16 - 3 = 13 eggs\n#### 13")
    assert gsm8k.TASK.score([example, example], ["13", "12"]) == {"accuracy": 0.5}
    assert gsm8k.TASK.majority([example, example, Example("x", "#### 1,000")]) == 2 / 3


def test_multirc_reports_f1_and_exact_match_by_question():
    rows = [("p", "q1", "a", 1), ("p", "q1", "b", 0), ("p", "q2", "c", 1), ("r", "q1", "d", 1)]
    names = ("paragraph", "question", "answer", "label")
    examples = [multirc.TASK.example(dict(zip(names, row, strict=True))) for row in rows]
    found = multirc.TASK.score(examples, ["yes", "no", "no", "yes"])
    # two of three right ones found, none claimed wrongly: precision 1, recall 2/3
    assert found == {
        "accuracy": 0.75,
        "f1": pytest.approx(0.8),
        "exact_match": pytest.approx(2 / 3),
    }
    assert multirc.TASK.score(examples[1:2], ["no"])["f1"] == 0.0


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("ice-cream", "ice cream"),
        ("don't", "dont"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("St. John", "st john"),
        ("none", "0"),
        ("10:30", "10:30"),
    ],
)
def test_vqa_answers_are_compared_in_their_normal_form(answer, same):
    assert visual_questions.normal(answer) == same


def test_vqa_accuracy_leaves_one_annotator_out_each_time():
    answers = ["red"] * 3 + ["blue"] * 7
    example = Example("colour?", "blue", references=tuple(answers))
    score = visual_questions.score
    # of ten subsets of nine, three have two "red" (2/3 each) and seven have three (1 each)
    assert score([example], ["Red."]) == {"accuracy": pytest.approx((3 * 2 / 3 + 7) / 10)}
    assert score([example], ["blue"]) == {"accuracy": 1.0}
    assert score([example], ["green"]) == {"accuracy": 0.0}
    one = Example("colour?", "blue", references=("green", *["blue"] * 9))
    assert score([one], ["green"])["accuracy"] == pytest.approx(9 / 10 / 3)


def test_vqa_rows_take_both_layouts_of_answers(tmp_path: Path):
    picture = tmp_path / "x.png"
    picture.write_bytes(b"bytes")
    rows = [
        {"question": "q", "answers": ["b", "a", "b"], "image": str(picture)},
        {"question": "q", "answers": [{"answer": x} for x in "bab"], "image": {"bytes": b"bytes"}},
    ]
    found = [visual_questions.example(row) for row in rows]
    assert found[0] == found[1]
    assert (found[0].answer, found[0].references, found[0].image.read()) == (
        "b",
        ("b", "a", "b"),
        b"bytes",
    )
    with pytest.raises(UserError, match="no answers"):
        visual_questions.example({"question": "q", "answers": [], "image": b"x"})


def test_rows_of_the_text_benchmarks():
    assert agnews.TASK.example({"text": "a \n b", "label": 3}) == Example("a b", "Technology")
    row = {"question": "is it so", "passage": "P", "answer": True}
    assert boolq.TASK.example(row) == Example("is it so?", "yes", "P")
    row = {"question": "Q ", "choices": ["w", "x", "y", "z"], "answer": 2}
    assert mmlu.TASK.example(row) == Example("Q\nA. w\nB. x\nC. y\nD. z", "C")
    with pytest.raises(UserError, match="3 choices instead of 4"):
        mmlu.TASK.example(row | {"choices": ["w", "x", "y"]})
    with pytest.raises(UserError, match="label 4 is outside the set: World"):
        agnews.TASK.example({"text": "a", "label": 4})


# --- stand-ins -----------------------------------------------------------------------------------


def solved(text: str) -> int:
    """The answer of a word problem, from its words."""
    number, *rest = map(int, re.findall(r"\d+", text))
    sentences = text.split(". ")
    if "boxes with" in sentences[0]:
        number, rest = number * rest[0], rest[1:]
    elif "finds" in sentences[0]:
        number, rest = number + rest[0], rest[1:]
    for sentence, value in zip(sentences[1:], rest, strict=False):
        if "brings" in sentence:
            number += value
        elif "gives" in sentence:
            number -= value
        else:
            number *= 1 + value
    return number


def test_word_problems_are_right_and_the_same_each_time():
    found = list(word_problems.problems())
    assert found == list(word_problems.problems()) and len(found) == word_problems.COUNT
    assert [solved(text) for text, _ in found] == [number for _, number in found]
    assert len({text for text, _ in found}) > 0.95 * len(found)
    assert min(number for _, number in found) >= 1


def test_word_choices_hold_the_answer_once_at_every_place():
    rows = [row for _, row in word_choices.rows(Path())]
    numbers = [number for _, number in word_problems.problems()]
    for row, number in zip(rows, numbers, strict=True):
        assert row["choices"].index(str(number)) == row["answer"]
        assert len(set(row["choices"])) == 4
    places = Counter(row["answer"] for row in rows)
    assert all(abs(count / len(rows) - 1 / 4) < 0.03 for count in places.values())


def test_half_of_the_names_keep_their_description():
    rows = [row for _, row in name_fits.rows(Path())]
    assert abs(Counter(r["label"] for r in rows)["yes"] / len(rows) - 0.5) < 0.01
    assert len({row["description"] for row in rows}) == len(rows)  # each is seen once


# --- the real thing --------------------------------------------------------------------------------


def test_every_task_of_the_catalog_has_a_module():
    catalog = load_catalog(ROOT / "config/catalog")
    for name, entry in catalog.tasks.items():
        task = load_task(entry.loader)
        assert task.columns, name
        if task.names and task.parse is not str.strip:  # what a model is asked for is understood
            assert [task.parse(name) for name in task.names] == list(task.names)
