"""GSM8K: grade-school word problems, answered in words that end with a number (Cobbe et al. 2021,
arXiv 2110.14168). Scored by exact match of the final number."""

import re
from functools import partial

from costbp.tasks.base import Example, Row, Task, accuracy

CALCULATOR = re.compile(r"<<[^>]*>>")  # annotations that nobody is to write
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
MARK = "####"


def example(row: Row) -> Example:
    return Example(str(row["question"]).strip(), CALCULATOR.sub("", str(row["answer"])).strip())


def final_number(text: str) -> str:
    """The number after the first ``####``, or else the last one, without signs of currency and
    thousands: ``1,234.50`` and ``$1234.5`` are ``1234.5``. Empty where there is none."""
    marked = NUMBER.findall(text.split(MARK, 1)[1]) if MARK in text else []
    found = marked[:1] or NUMBER.findall(text)[-1:]
    if not found:
        return ""
    plain = found[0].replace(",", "").replace("$", "")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


TASK = Task(
    example=example,
    columns=("question", "answer"),
    instruction="Answer step by step; end with #### and the number.",
    parse=final_number,
    score=partial(accuracy, read=final_number),
    new_tokens=256,
)
