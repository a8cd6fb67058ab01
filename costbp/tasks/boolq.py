"""BoolQ: yes/no questions on a passage (Clark et al. 2019, arXiv 1905.10044)."""

from costbp.tasks.base import Example, Row, Task, named, one_of

NAMES = ("no", "yes")


def example(row: Row) -> Example:
    question = str(row["question"]).strip().rstrip("?")
    return Example(f"{question}?", named(row["answer"], NAMES), str(row["passage"]))


TASK = Task(
    example=example,
    columns=("question", "passage", "answer"),
    names=NAMES,
    instruction="Answer yes or no:",
    parse=one_of(NAMES),
)
