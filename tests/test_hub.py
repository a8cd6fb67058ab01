"""The hub by local fakes of its answers: what is fetched, and what its refusals mean."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

import costbp.assets.hub as hub
from costbp.assets.fetch import damage, fetch
from costbp.config.catalog import HubData, Repository
from costbp.errors import UserError
from tests.test_sources import ROWS, agnews, read


def named_error(name: str, text: str = "x", base=Exception) -> Exception:
    return type(name, (base,), {})(text)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (named_error("GatedRepoError"), r"a/b is gated: accept its terms at https://huggingface.co/a/b, then log in with `hf auth login`"),
        (named_error("RepositoryNotFoundError"), r"no repository 'a/b' that you may read; was it renamed"),
        (named_error("DatasetNotFoundError"), r"was it renamed"),
        (named_error("RevisionNotFoundError"), r"a/b has no revision 'main'"),
        (named_error("ConnectError", "Name or service not known"), r"can't be reached \(Name or service not known\)"),
        (named_error("OfflineModeIsEnabled"), r"can't be reached"),
        (named_error("ValueError", "BuilderConfig 'x' not found.\nmore"), r"a/b: BuilderConfig 'x' not found\.$"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["model", "data"])
def test_what_the_hub_refuses_is_one_line(kind, error, words, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(hub, "_model", refuse)
    monkeypatch.setattr(hub, "_data", refuse)
    what = Repository(repo="a/b") if kind == "model" else HubData(kind="hub", repo="a/b")
    with pytest.raises(UserError, match=words) as caught:
        fetch(what.folder, what, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "assets" / what.folder).exists()


def test_a_full_disk_while_fetching_leaves_nothing(tmp_path, monkeypatch):
    def full(what, folder, *_):
        (folder / "half.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "_model", full)
    with pytest.raises(
        UserError, match=r"No space left on device; what was written of it has been removed"
    ):
        fetch("m", Repository(repo="a/b"), tmp_path, lambda _: None)
    assert not [path for path in (tmp_path / "assets").iterdir() if path.is_dir()]


def test_a_broken_connection_keeps_what_has_come(tmp_path, monkeypatch):
    def broken(what, folder, *_):
        (folder / "half.safetensors").write_bytes(b"half")
        raise named_error("ReadTimeout", "timed out")

    monkeypatch.setattr(hub, "_model", broken)
    what = Repository(repo="a/b")
    with pytest.raises(UserError, match="can't be reached"):
        fetch(what.folder, what, tmp_path)
    assert (tmp_path / "assets" / f".{what.folder}.partial" / "half.safetensors").exists()


class Api:
    """The hub with one repository."""

    files: ClassVar = {"config.json": 10, "model.safetensors": 1000, "pytorch_model.bin": 1000, "tokenizer.json": 5, "README.md": 7, "onnx/model.onnx": 9}  # fmt: skip

    def model_info(self, repo, revision, files_metadata):
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in self.files.items()]
        return SimpleNamespace(sha="c" * 40, siblings=files)


@pytest.fixture
def served(monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(repo, revision, allow_patterns, local_dir):
        asked.append((repo, revision, allow_patterns))
        for name in allow_patterns:
            (Path(local_dir) / name).write_bytes(b"x" * Api.files[name])

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_a_model_is_fetched_once_by_commit_and_only_what_is_needed(tmp_path, served):
    what, said = Repository(repo="a/b"), []
    folder = fetch(what.folder, what, tmp_path, said.append)
    assert served == [("a/b", "c" * 40, ["config.json", "model.safetensors", "tokenizer.json"])]
    assert "a/b at cccccccccccc" in said[-1]
    assert json.loads((folder / "asset.json").read_text())["commit"] == "c" * 40
    assert fetch(what.folder, what, tmp_path) == folder and len(served) == 1
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing" in str(damage(folder, what))
    assert hub.size_of(what) == 1015


def test_a_disk_too_small_is_said_before_anything_is_fetched(tmp_path, served, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"a/b takes 0\.0 GiB, .* 0\.0 GiB free; set paths\.cache"):
        fetch("m", Repository(repo="a/b"), tmp_path)
    assert not served


def test_weights_are_safetensors_or_else_state_dicts():
    names = [
        "config.json",
        "pytorch_model-00001-of-2.bin",
        "flax_model.msgpack",
        "vocab.txt",
        "x/y.json",
    ]
    assert hub.wanted_files(names, "a/b") == [
        "config.json",
        "pytorch_model-00001-of-2.bin",
        "vocab.txt",
    ]
    with pytest.raises(UserError, match="neither safetensors nor"):
        hub.wanted_files(["config.json", "model.h5"], "a/b")


def test_a_data_set_of_the_hub_is_saved_by_split_and_read(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    class Info(Api):
        def dataset_info(self, repo, revision, **_):
            return SimpleNamespace(sha="d" * 40)

    def load(repo, config, revision, cache_dir):
        assert (repo, config, revision) == ("a/b", None, "d" * 40)
        table = datasets.Dataset.from_list(ROWS)
        return datasets.DatasetDict({"train": table, "test": table, "extra": table})

    monkeypatch.setattr(huggingface_hub, "HfApi", Info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    task = agnews(kind="hub", repo="a/b", splits={"train": "train", "test": "test"})
    folder = fetch(task.data.folder, task.data, tmp_path, lambda _: None)
    assert {path.name for path in folder.iterdir()} == {
        "train",
        "test",
        "dataset_dict.json",
        "asset.json",
        ".asset.json.sha256",
    }
    assert {name: len(rows) for name, rows in read(task, tmp_path / "assets").items()} == {
        "train": 80,
        "test": 80,
    }
    wrong = agnews(kind="hub", repo="a/b", splits={"train": "tain"})
    with pytest.raises(UserError, match=r"a/b has no split 'tain' \(it has train, test, extra\)"):
        fetch("wrong", wrong.data, tmp_path)


def test_a_full_disk_is_seen_through_what_libraries_wrap_around_it(tmp_path, monkeypatch):
    def full(what, folder):
        (folder / "half.arrow").write_bytes(b"half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("while generating the data set") from error

    monkeypatch.setattr(hub, "_data", full)
    what = HubData(kind="hub", repo="a/b")
    with pytest.raises(UserError, match="No space left on device"):
        fetch(what.folder, what, tmp_path, lambda _: None)
    assert not [path for path in (tmp_path / "assets").iterdir() if path.is_dir()]


def test_what_has_come_already_needs_no_room_and_is_not_lost(tmp_path, served, monkeypatch):
    what = Repository(repo="a/b")
    partial = tmp_path / "assets" / f".{what.folder}.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"x" * 1000)
    free = hub.MARGIN + 20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, free))
    assert fetch(what.folder, what, tmp_path, lambda _: None).is_dir()
    other = Repository(repo="a/c")
    with pytest.raises(UserError, match=r"GiB free; set paths\.cache"):
        fetch(other.folder, other, tmp_path, lambda _: None)
