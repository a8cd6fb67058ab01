"""Images on their way from a source to a pair's folder: whole, named where broken, and few at a time
in memory."""

from __future__ import annotations

import errno
import hashlib
import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image

from costbp.config.catalog import LocalData, TaskEntry
from costbp.data.images import ImageTokens, open_image, store_images
from costbp.data.sources import read_examples
from costbp.errors import UserError
from costbp.tasks.base import Example, encoded_image

COUNT, SIDE = 40, 200


def png(colour="red", size=(8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def test_an_unreadable_image_names_its_question_and_leaves_nothing(tmp_path):
    examples = [
        Example("ok?", "yes", image=encoded_image(png())),
        Example("what is this?", "no", image=encoded_image(b"\x89PNG half")),
    ]
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"the image of 'what is this\?' can't be read") as caught:
        store_images({"train": examples}, path, 8, None)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_images(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        store_images(
            {"train": [Example("q", "a", image=encoded_image(png()))]},
            tmp_path / "x.safetensors",
            8,
            None,
        )
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_any_mode_become_rgb():
    stream = io.BytesIO()
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(stream, "PNG")
    assert open_image(stream.getvalue()).mode == "RGB"


# --- from the source -------------------------------------------------------------------------------


def noise() -> Iterator[bytes]:
    """Pictures of 120 kB, no two alike."""
    for seed in range(COUNT):
        pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
        yield stream.getvalue()


def rows(folder: Path, kind: str, images=None):

    folder.mkdir()
    for index, data in enumerate(images if images is not None else noise()):
        value = {"bytes": data, "path": None}
        if kind == "files":
            value = {"bytes": None, "path": str(folder / f"{index}.png")}
            (folder / f"{index}.png").write_bytes(data)
        yield {"question": f"what is {index}?", "answers": ["noise"] * 3, "image": value}


def source(folder: Path, kind: str, images=None) -> TaskEntry:
    """A visual task whose rows are a saved data set or a parquet file, images inside or beside."""
    from datasets import Dataset, Features, Sequence, Value
    from datasets import Image as Feature

    kinds = {"question": Value("string"), "answers": Sequence(Value("string")), "image": Feature()}
    table = Dataset.from_list(list(rows(folder, kind, images)), features=Features(kinds))
    path = folder / ("set" if kind == "saved" else "train.parquet")
    table.save_to_disk(path) if kind == "saved" else table.to_parquet(path)
    return TaskEntry(
        label="x", loader="textvqa", data=LocalData(path=str(path)), batch_size=2, max_length=64,
        validation=2, test=2,
    )  # fmt: skip


@pytest.fixture
def caches(tmp_path, monkeypatch) -> list[Path]:
    """Where libraries put what is temporary."""
    folders = [tmp_path / "temporary", tmp_path / "datasets"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folders[0]))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folders[1])
    return folders


@pytest.mark.parametrize("kind", ["saved", "parquet", "files"])
def test_images_are_read_one_at_a_time_and_whole(kind, tmp_path, caches):
    task, total = source(tmp_path / "a", kind), sum(map(len, noise()))
    assert total > COUNT * 100_000
    read_examples(source(tmp_path / "first", kind, [png()]), "x", tmp_path)  # imports
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    found = read_examples(task, "x", tmp_path).examples
    facts = store_images(found, tmp_path / "x.safetensors", 8, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < total / 4
    assert pyarrow.total_allocated_bytes() - before < total / 10
    ((names, examples),) = zip(facts["names"].values(), found.values(), strict=True)
    for index, data in enumerate(noise()):
        assert examples[index].image.digest == hashlib.sha256(data).hexdigest()
        assert examples[index].image.read() == data
        assert (tmp_path / "x.images" / names[index]).read_bytes() == data
    assert not any(path for folder in caches for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_a_missing_image_names_its_row(kind, tmp_path, caches):
    task = source(tmp_path / "a", kind, [png(), b"", png()])
    with pytest.raises(UserError, match=r"task 'x': .*, row 2: no image"):
        read_examples(task, "x", tmp_path)
    task = source(tmp_path / "b", "files", [png()] * 3)
    (tmp_path / "b" / "2.png").unlink()
    with pytest.raises(UserError, match=r"task 'x': .* 3: image .*2\.png: No such file"):
        read_examples(task, "x", tmp_path)


def test_an_image_of_many_questions_is_read_once_for_each_use(tmp_path):
    read: list[int] = []

    def value() -> bytes:
        read.append(1)
        return png(size=(8, 16))

    examples = [Example(f"{i}?", "yes", image=encoded_image(value)) for i in range(3)]
    assert len(read) == 3
    facts = store_images({"train": examples}, tmp_path / "x.safetensors", 8, None)
    assert len(set(facts["names"]["train"])) == 1 and len(read) == 4

    class Processor:
        merge_size = 2

        def get_number_of_image_patches(self, height, width):
            return height * width

    tokens = ImageTokens(5, 6, 7, 64, Processor())
    shown = [tokens.shown([9], e.image) for e in examples]
    assert shown == [[6, *[5] * 32, 7, 9]] * 3 and len(read) == 5
