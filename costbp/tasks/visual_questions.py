"""What VQAv2 and TextVQA share: rows with ten annotators' answers, and VQA accuracy."""

import re
from collections import Counter
from collections.abc import Sequence

from costbp.errors import UserError
from costbp.tasks.base import Example, Metrics, Row, Task, encoded_image

ARTICLES = {"a", "an", "the"}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(WORDS)} | {"none": "0"}
AGREEING = 3  # annotators for full marks


def normal(answer: str) -> str:
    """An answer as the benchmark compares it: lower case, no punctuation or article, number words as
    digits. Apostrophes are left out on both sides, where the benchmark's code puts them in."""
    text = re.sub(r"(?<=\d),(?=\d)", "", answer.lower().replace("'", ""))
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w\s.:]|_", " ", text)
    words = [DIGITS.get(word, word) for word in text.split() if word not in ARTICLES]
    return " ".join(words)


def example(row: Row) -> Example:
    """A question on an image; the commonest answer is what is learnt, all of them count."""
    answers = [str(a["answer"] if isinstance(a, dict) else a) for a in row["answers"] or ()]
    if not answers:
        raise UserError("no answers (a test split without labels?)")
    commonest = Counter(answers).most_common(1)[0][0]
    return Example(
        str(row["question"]).strip(),
        commonest,
        references=tuple(answers),
        image=encoded_image(row["image"]),
    )


def score(examples: Sequence[Example], given: Sequence[str]) -> Metrics:
    """VQA accuracy (Antol et al. 2015, arXiv 1505.00468): mean over the annotators of min(1, others
    that gave this answer / 3)."""
    total = 0.0
    for e, answer in zip(examples, given, strict=True):
        references = [normal(reference) for reference in e.references or (e.answer,)]
        total += _agreement(references, normal(answer))
    return {"accuracy": total / len(examples)}


def _agreement(references: Sequence[str], answer: str) -> float:
    if len(references) == 1:
        return float(references[0] == answer)
    same = references.count(answer)
    others = [same - (reference == answer) for reference in references]
    return sum(min(1.0, count / AGREEING) for count in others) / len(references)


def first_line(text: str) -> str:
    """The first line that says something."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def visual_task() -> Task:
    """A benchmark of this kind."""
    return Task(
        example=example,
        columns=("question", "answers", "image"),
        instruction="Answer with a word or a short phrase:",
        parse=first_line,
        score=score,
        new_tokens=12,
    )
