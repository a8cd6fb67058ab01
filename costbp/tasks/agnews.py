"""AG News: the topic of a news item, 4 classes (Zhang, Zhao and LeCun 2015, arXiv 1509.01626)."""

from costbp.tasks.base import Example, Row, Task, named

NAMES = ("World", "Sports", "Business", "Technology")


def example(row: Row) -> Example:
    return Example(" ".join(str(row["text"]).split()), named(row["label"], NAMES))


TASK = Task(
    example=example,
    columns=("text", "label"),
    names=NAMES,
    instruction=f"Topic of this news, one of {', '.join(NAMES)}:",
)
