"""MMLU: four-way multiple choice in 57 subjects (Hendrycks et al. 2021, arXiv 2009.03300).

The letter is chosen by likelihood or read from what the model writes; both are reported.
"""

from costbp.errors import UserError
from costbp.tasks.base import Example, Row, Task, named, one_of

LETTERS = ("A", "B", "C", "D")


def example(row: Row) -> Example:
    """A question with its choices, a letter each."""
    question, choices = str(row["question"]).strip(), row["choices"]
    if len(choices) != len(LETTERS):
        raise UserError(f"{len(choices)} choices instead of {len(LETTERS)}")
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    return Example("\n".join([question, *lines]), named(row["answer"], LETTERS))


TASK = Task(
    example=example,
    columns=("question", "choices", "answer"),
    names=LETTERS,
    instruction="Answer with one letter:",
    parse=one_of(LETTERS),
)
