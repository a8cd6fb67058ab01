"""TREC question classification, 6 coarse classes (Li and Roth 2002).

The file is a concatenation of nested training subsets, so each question is kept once. The official
500-question test set is not among them: accuracies are not comparable with published TREC figures.
"""

from collections.abc import Iterator
from pathlib import Path

from costbp.tasks.base import POOL, Row, text_task

NAMES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


def rows(folder: Path) -> Iterator[tuple[str, Row]]:
    """Questions with their coarse class, the part of the label before the colon."""
    lines = (folder / "question_labels.txt").read_text(encoding="latin-1").splitlines()
    for line in lines:
        label, _, question = line.strip().partition(" ")
        if question:
            yield POOL, {"text": question, "label": label.partition(":")[0]}


TASK = text_task(NAMES, f"What does the question ask for? One of {', '.join(NAMES)}:", rows)
