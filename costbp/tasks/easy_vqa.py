"""easy-VQA: questions on drawn shapes, not photographs, 13 answers (Zhou 2019, package easy-vqa)."""

import json
from collections.abc import Iterator
from pathlib import Path

from costbp.tasks.base import Example, Row, Task, encoded_image, named, one_of

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")
NAMES = (*SHAPES, *COLOURS, "yes", "no")


def rows(folder: Path) -> Iterator[tuple[str, Row]]:
    for split in ("train", "test"):
        for question, answer, image in json.loads((folder / split / "questions.json").read_text()):
            path = folder / split / "images" / f"{image}.png"
            yield split, {"question": question, "answer": answer, "image": str(path)}


def example(row: Row) -> Example:
    answer = named(row["answer"], NAMES)
    return Example(str(row["question"]), answer, image=encoded_image(row["image"]))


TASK = Task(
    example=example,
    columns=("question", "answer", "image"),
    names=NAMES,
    rows=rows,
    instruction="Answer with one word:",
    parse=one_of(NAMES),
)
