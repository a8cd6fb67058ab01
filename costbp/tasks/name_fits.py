"""Does this description belong to that name? Yes/no pairs of documented objects and first paragraphs
of docstrings, half of them exchanged. Read from installed packages, as `docstrings` is."""

from collections.abc import Iterator
from pathlib import Path

from costbp.tasks.base import POOL, Example, Row, Task, named, one_of
from costbp.tasks.docstrings import NAMES as LIBRARIES
from costbp.tasks.docstrings import documented

NAMES = ("no", "yes")


def rows(folder: Path) -> Iterator[tuple[str, Row]]:
    """Every second object keeps its description; the others hand theirs on."""
    seen: set[str] = set()
    for library in LIBRARIES:
        found = [pair for pair in documented(library) if pair[1] not in seen]
        seen.update(text for _, text in found)
        kept, moved = found[::2], found[1::2]
        handed = [text for _, text in [*moved[1:], *moved[:1]]]
        for name, text in kept:
            yield POOL, {"name": name, "description": text, "label": "yes"}
        for (name, _), text in zip(moved, handed, strict=True):
            yield POOL, {"name": name, "description": text, "label": "no"}


def example(row: Row) -> Example:
    return Example(str(row["name"]), named(row["label"], NAMES), str(row["description"]))


TASK = Task(
    example=example,
    columns=("name", "description", "label"),
    names=NAMES,
    rows=rows,
    instruction="Does the description belong to this name? Answer yes or no:",
    parse=one_of(NAMES),
)
