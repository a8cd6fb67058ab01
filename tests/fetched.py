"""What a study fetches, made small, as if it had been fetched: packages, and models and data sets of the
hub, in the layouts of the real ones and with the records that ``costbp assets`` leaves."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    List,
    Value,
    disable_progress_bars,
)
from PIL import Image as Pictures

from costbp.assets.fetch import RECORD, WANTED
from costbp.config.catalog import AssetEntry, Fetchable, HubData
from costbp.config.study import Plan
from costbp.files import sha256
from costbp.tasks import easy_vqa, trec
from tests.fetched_models import efficientnet, minilm, repository, smollm2_gguf
from tests.test_standins import draw_easy_vqa

Row = dict[str, Any]
ROWS = {"train": 60, "auxiliary_train": 60, "validation": 30, "test": 30}  # of a data set's splits
COLOURS = easy_vqa.COLOURS
TEXT, NUMBER = Value("string"), Value("int64")


def build(plan: Plan) -> None:
    """Everything that a plan fetches, in its cache, each once."""
    disable_progress_bars()
    by_folder = {m.repository.folder: m for m in plan.catalog.models.values() if m.repository}
    for name, what in plan.assets().items():
        folder = plan.study.paths.cache / "assets" / name
        if folder.exists():
            continue
        folder.mkdir(parents=True)
        if isinstance(what, AssetEntry):
            PACKAGES[name](folder)
            (folder / "LICENSE").write_text("as the package has it")
        elif isinstance(what, HubData):
            data_set(what).save_to_disk(str(folder))
        else:
            repository(folder, by_folder[name])
        record(folder, what)


def record(folder: Path, what: Fetchable) -> None:
    """What fetching notes down of an asset."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    facts: Row
    if isinstance(what, AssetEntry):
        sums = {name: sha256(path) for name, path in files.items()}
        facts = {"package": what.package, "sha256": what.sha256, "members": what.members}
    else:
        sums = {name: path.stat().st_size for name, path in files.items()}
        wanted = what.model_dump(mode="json", include=WANTED)
        facts = {"wanted": wanted, "commit": what.revision}
    (folder / RECORD).write_text(json.dumps({**facts, "files": sums}))


# --- packages --------------------------------------------------------------------------------------


def nlp_data(folder: Path) -> None:
    """Two text files in Latin-1."""
    chance = random.Random(0)
    questions = [f"{trec.NAMES[i % 6]}:other What is caf\xe9 number {i:04} ?" for i in range(90)]
    (folder / "question_labels.txt").write_text("\n".join(questions) + "\n", encoding="latin-1")
    ratings = [chance.choice((-1, 1)) * chance.uniform(0.2, 4) for _ in range(90)]
    lines = [
        f"{i + 1}\t{r:.2f}\tA film \x97 number {i:04} of its kind ." for i, r in enumerate(ratings)
    ]
    text = "\n".join(["ID\tSentimentRating\tSnippet", *lines])
    (folder / "movie_reviews.txt").write_text(text, encoding="latin-1")


PACKAGES: dict[str, Callable[[Path], None]] = {
    "minilm": minilm,
    "nlp_data": nlp_data,
    "smollm2": smollm2_gguf,
    "easy_vqa": draw_easy_vqa,
    "efficientnet_lite0": efficientnet,
}


# --- data sets of the hub --------------------------------------------------------------------------


def data_set(what: HubData) -> DatasetDict:
    """The splits that are kept of a data set, with all columns of the real one."""
    rows, features = DATA[what.repo.split("/")[1]]
    chance = random.Random(0)
    return DatasetDict(
        {
            split: Dataset.from_list([rows(i, chance) for i in places(split)], Features(features))
            for split in what.splits.values()
        }
    )


def places(split: str) -> range:
    """Numbers of a split's rows, none of them in another; all of four digits, so that batches have
    few shapes: the cost of a step is counted once a shape."""
    start = 1000 * (1 + list(ROWS).index(split))
    return range(start, start + ROWS[split])


def news(i: int, chance: random.Random) -> Row:
    return {"text": f"Wall St. opens {i} points higher (Reuters)", "label": chance.randrange(4)}


def yes_or_no(i: int, chance: random.Random) -> Row:
    passage = (
        f"The {i // 2:04} hills are a range in the north of that country, and the oldest of it."
    )
    return {"question": f"is hill {i} the oldest", "answer": chance.random() < 0.6, "passage": passage}  # fmt: skip


def reading(i: int, chance: random.Random) -> Row:
    idx = {"paragraph": i // 4, "question": i // 2, "answer": i}
    return {
        "paragraph": f"Sent 1: Ada has {i // 4:04} cats. Sent 2: They sleep.",
        "question": f"Who has {i // 2 % 2} cats?",
        "answer": f"Ada {i}",
        "idx": idx,
        "label": chance.randrange(2),
    }


def word_problem(i: int, chance: random.Random) -> Row:
    answer = f"Ada has 1+{i}=<<1+{i}={i + 1}>>{i + 1:,} cats.\n#### {i + 1:,}"
    return {"question": f"Ada has a cat and finds {i} more. How many are there?", "answer": answer}


def exam(i: int, chance: random.Random) -> Row:
    choices = [f"{i}", f"{i + 1}", f"{i + 2}", "none of them"]
    return {"question": f"What is {i} + 1?", "subject": "elementary_mathematics", "choices": choices, "answer": chance.randrange(4)}  # fmt: skip


def picture(i: int) -> bytes:
    """A JPEG or PNG of its own."""
    one = Pictures.new("RGB", (84, 64), COLOURS[i % 8])
    one.paste((i % 256, 2, 3), (i % 60, 0, 60, 32))
    stream = io.BytesIO()
    one.save(stream, "PNG" if i % 2 else "JPEG")
    return stream.getvalue()


def looked_at(i: int, chance: random.Random) -> Row:
    colour = COLOURS[i % 8]
    answers = [colour if k < 7 else chance.choice(COLOURS) for k in range(10)]
    return {
        "question_type": "what color is the",
        "multiple_choice_answer": colour,
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": k + 1}
            for k, answer in enumerate(answers)
        ],
        "image_id": i,
        "answer_type": "other",
        "question_id": 10 * i,
        "question": f"What color is number {i}?",
        "image": {"bytes": picture(i), "path": None},
    }


def read_off(i: int, chance: random.Random) -> Row:
    answers = [str(i) if k < 6 else "unanswerable" for k in range(10)]
    return {
        "image_id": f"{i:016x}",
        "question_id": i,
        "question": f"what number is on shirt {i}?",
        "question_tokens": ["what", "number"],
        "image": {"bytes": picture(i), "path": None},
        "image_width": 84,
        "image_height": 64,
        "answers": answers,
        "ocr_tokens": [str(i)],
        "set_name": "train",
    }


ANSWER = {"answer": TEXT, "answer_confidence": TEXT, "answer_id": NUMBER}
PART = dict.fromkeys(("paragraph", "question", "answer"), NUMBER)
DATA: dict[str, tuple[Callable[[int, random.Random], Row], Row]] = {
    "ag_news": (
        news,
        {"text": TEXT, "label": ClassLabel(names=["World", "Sports", "Business", "Sci/Tech"])},
    ),
    "boolq": (
        yes_or_no,
        {"question": TEXT, "answer": Value("bool"), "passage": TEXT},
    ),
    "super_glue": (
        reading,
        {"idx": PART, "label": ClassLabel(names=["False", "True"])}
        | dict.fromkeys(("paragraph", "question", "answer"), TEXT),
    ),
    "gsm8k": (word_problem, {"question": TEXT, "answer": TEXT}),
    "mmlu": (
        exam,
        {"choices": List(TEXT), "answer": ClassLabel(names=list("ABCD"))}
        | dict.fromkeys(("question", "subject"), TEXT),
    ),
    "VQAv2": (
        looked_at,
        {"answers": List(ANSWER), "image": Image(), "image_id": NUMBER, "question_id": NUMBER}
        | dict.fromkeys(("question", "question_type", "answer_type"), TEXT)
        | {"multiple_choice_answer": TEXT},
    ),
    "textvqa": (
        read_off,
        {"image": Image(), "question_id": NUMBER, "image_width": NUMBER, "image_height": NUMBER}
        | dict.fromkeys(("image_id", "question", "set_name"), TEXT)
        | dict.fromkeys(("question_tokens", "answers", "ocr_tokens"), List(TEXT)),
    ),
}
