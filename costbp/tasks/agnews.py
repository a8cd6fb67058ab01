"""AG News: the topic of a news item, 4 classes (Zhang, Zhao and LeCun 2015, arXiv 1509.01626)."""

from costbp.tasks.base import Task, labelled

NAMES = ("World", "Sports", "Business", "Technology")


TASK = Task(
    example=labelled(NAMES),
    columns=("text", "label"),
    names=NAMES,
    instruction=f"Topic of this news, one of {', '.join(NAMES)}:",
)
