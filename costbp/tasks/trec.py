"""TREC question classification, 6 coarse classes (Li and Roth 2002).

The file is a concatenation of nested training subsets, so each question is kept once. The official
500-question test set is not among them: accuracies are not comparable with published TREC figures.
"""

from pathlib import Path

from costbp.tasks.base import Examples, distinct

NAMES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


def read(folder: Path) -> Examples:
    """Distinct questions with their coarse class, the part of the label before the colon."""
    lines = (folder / "question_labels.txt").read_text(encoding="latin-1").splitlines()
    pairs = []
    for line in lines:
        label, _, question = line.strip().partition(" ")
        if question:
            pairs.append((" ".join(question.split()), label.partition(":")[0]))
    return distinct(pairs, NAMES)
