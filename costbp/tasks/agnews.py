"""AG News: the topic of a news item, 4 classes (Zhang, Zhao and LeCun 2015, arXiv 1509.01626)."""

from costbp.tasks.base import text_task

NAMES = ("World", "Sports", "Business", "Technology")


TASK = text_task(NAMES, f"Topic of this news, one of {', '.join(NAMES)}:")
