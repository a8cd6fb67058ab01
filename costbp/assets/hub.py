"""Fetching models and data sets of the Hugging Face hub: weights that hold tensors and nothing else,
and tables; never code."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from costbp.config.catalog import HubData
from costbp.config.sources import Repository
from costbp.errors import UserError, first_line
from costbp.files import ensure_folder

Say = Callable[[str], None]
MARGIN = 2**30  # bytes that are left free
UNREACHABLE = {
    *("OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError"),
    *("ConnectTimeout", "ReadTimeout", "NetworkError", "TimeoutException", "ProxyError"),
}
TEXTS = (".json", ".txt", ".model", ".jinja")  # a model's configuration and tokenizer
TABLES = (".parquet", ".json", ".jsonl", ".csv", ".arrow", ".gz", ".zip")


def from_hub(what: Repository | HubData, scratch: Path, say: Say) -> str:
    """Fetch a repository into ``scratch``; returns the commit.

    What has been downloaded is kept there when the connection breaks, and removed when the disk is
    full.

    Raises:
        OSError: the disk is full.
        UserError: the hub can't be reached, has no such repository or revision, or wants a login.
    """
    ensure_folder(scratch)
    try:
        return _data(what, scratch) if isinstance(what, HubData) else _model(what, scratch, say)
    except UserError:
        raise
    except Exception as error:
        if full := _disk_full(error):
            shutil.rmtree(scratch, ignore_errors=True)
            raise full from error
        raise UserError(explained(what, error)) from error


def _disk_full(error: BaseException | None) -> OSError | None:
    """The refusal to write that libraries may have wrapped."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        error = error.__cause__ or error.__context__
    return None


def explained(what: Repository | HubData, error: Exception) -> str:
    """What a failure of the hub's libraries means, in one line."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    reason, repo = first_line(error), what.repo
    if "GatedRepoError" in kinds:
        return (
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then log in with "
            "`hf auth login`, or set HF_TOKEN"
        )
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return (
            f"the hub has no repository '{repo}' that you may read; was it renamed, or is a login "
            "missing (`hf auth login`)?"
        )
    if "RevisionNotFoundError" in kinds:
        return f"{repo} has no revision '{what.revision}' on the hub; correct it in the catalog"
    if kinds & UNREACHABLE:
        return (
            f"{repo}: the hub can't be reached ({reason}); fetch on a machine with a network, or "
            "name a local folder in its place (docs/data.md)"
        )
    return f"{repo}: {reason}"


def wanted_files(names: Iterable[str], repo: str) -> list[str]:
    """The files of a model's repository that are needed: safetensors or else torch's state dicts.

    Raises:
        UserError: it has no such weights.
    """
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors")] or [
        name for name in top if name.startswith("pytorch_model") and name.endswith(".bin")
    ]
    if not weights:
        raise UserError(f"{repo} has neither safetensors nor pytorch_model.bin")
    return sorted({*weights, *(name for name in top if name.endswith(TEXTS))})


def _files(what: Repository) -> tuple[str, dict[str, int]]:
    """The commit, and bytes of each file that is needed."""
    from huggingface_hub import HfApi

    info: Any = HfApi().model_info(what.repo, revision=what.revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    return info.sha, {name: sizes[name] for name in wanted_files(sizes, what.repo)}


def _model(what: Repository, folder: Path, say: Say) -> str:
    from huggingface_hub import snapshot_download

    commit, sizes = _files(what)
    total, free = sum(sizes.values()), shutil.disk_usage(folder).free
    fetched = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if total - fetched + MARGIN > free:
        raise UserError(
            f"{what.repo} takes {total / 2**30:.1f} GiB, and {folder.parent} has "
            f"{free / 2**30:.1f} GiB free; set paths.cache to a larger disk"
        )
    say(f"{what.repo}: {total / 2**30:.2f} GiB")
    snapshot_download(what.repo, revision=commit, allow_patterns=list(sizes), local_dir=folder)
    return commit


def _data(what: HubData, folder: Path) -> str:
    import datasets
    from huggingface_hub import HfApi

    commit: str = HfApi().dataset_info(what.repo, revision=what.revision).sha or what.revision
    options: dict[str, Any] = {"cache_dir": str(folder / ".cache")}
    if what.files:
        where = f"hf://datasets/{what.repo}@{commit}"
        patterns = {split: f"{where}/{pattern}" for split, pattern in what.files.items()}
        found = datasets.load_dataset("parquet", data_files=patterns, **options)
    else:
        found = datasets.load_dataset(what.repo, what.config, revision=commit, **options)
    splits = dict.fromkeys(what.splits.values()) or dict.fromkeys(found)
    if missing := [split for split in splits if split not in found]:
        raise UserError(
            f"{what.repo} has no split '{missing[0]}' (it has {', '.join(found)}); correct "
            "data.splits in the catalog"
        )
    kept = datasets.DatasetDict({split: found[split] for split in splits})
    kept.save_to_disk(str(folder))
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return commit


def size_of(what: Repository | HubData) -> int:
    """Bytes that fetching takes, about: of a data set all tables of its configuration.

    Raises:
        UserError: see ``from_hub``.
    """
    from huggingface_hub import HfApi

    try:
        if not isinstance(what, HubData):
            return sum(_files(what)[1].values())
        info = HfApi().dataset_info(what.repo, revision=what.revision, files_metadata=True)
        sizes = {
            f.rfilename: f.size or 0 for f in info.siblings or () if f.rfilename.endswith(TABLES)
        }
        patterns = list(what.files.values()) or [f"{what.config}/*", f"data/{what.config}/*"]
        chosen = [n for n in sizes if any(fnmatch(n, pattern) for pattern in patterns)]
        return sum(sizes[name] for name in chosen or sizes)
    except UserError:
        raise
    except Exception as error:
        raise UserError(explained(what, error)) from error
