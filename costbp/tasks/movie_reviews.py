"""Movie-review sentiment, 2 classes: review snippets (Pang and Lee 2005) with the mean of human
ratings between -4 and 4 (Hutto and Gilbert 2014). Neither SST-2 nor the official MR labels.
"""

from collections.abc import Iterator
from pathlib import Path

from costbp.tasks.base import POOL, Row, text_task

NAMES = ("negative", "positive")
UNDECIDED = 0.5  # snippets whose mean rating is nearer to zero are left out


def rows(folder: Path) -> Iterator[tuple[str, Row]]:
    """Snippets whose mean rating is at least 0.5 away from neutral."""
    lines = (folder / "movie_reviews.txt").read_text(encoding="latin-1").splitlines()
    for line in lines[1:]:
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= UNDECIDED:
            yield POOL, {"text": text, "label": float(rating) > 0}


TASK = text_task(NAMES, "Is the review negative or positive? Answer:", rows)
