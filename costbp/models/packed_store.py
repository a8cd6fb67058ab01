"""Weights in another form, made once and kept: packed to four bits, unpacked from another format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from costbp.config.entries import short_hash
from costbp.config.sources import FolderSource, Source
from costbp.console import say
from costbp.errors import UserError, first_line
from costbp.files import lock
from costbp.models.trainable import HEADS

FORMAT = 1  # raised when packed files change
MANIFEST = "packed.json"
SHARD = "1GB"
WEIGHTS, CONFIGS = (".safetensors", ".bin"), ("config.json", "generation_config.json")


def made_once(target: Path, fresh: Callable[[], bool], make: Callable[[Path], None]) -> Path:
    """A folder that is made once; one that is not ``fresh`` is made anew.

    Args:
        make: writes the files into the folder that it is given.

    Raises:
        UserError: they can't be written; what was written is removed.
    """
    if fresh():
        return target
    scratch = target.with_name(f".{target.name}")
    with lock(target.with_name(f".{target.name}.lock")):
        if fresh():  # somebody else has made it by now
            return target
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            make(scratch)
            shutil.rmtree(target, ignore_errors=True)
            scratch.replace(target)
        except UserError:
            raise
        except Exception as error:  # of safetensors, or the disk
            raise UserError(f"{target}: can't be made ({first_line(error)})") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def packed_folder(source: Source, folder: Path, assets: Path, load: Callable[[], Any]) -> Path:
    """The packed weights of a base, as shards of safetensors beside the full ones.

    Args:
        source: packed as ``rtn`` or ``nf4``.
        folder: holds the full weights; other files there are other packed weights.
        load: the transformers model with packed layers, from the full weights.

    Raises:
        UserError: the weights can't be loaded, or there is no room.
    """
    if isinstance(source, FolderSource):  # its content names runs, and it may be read-only
        place = assets / "packed" / short_hash(str(folder.resolve()))
    else:
        place = folder
    target = place / f"packed-{source.form}-{source.packing}-{source.group}-{source.dtype}"

    def fresh() -> bool:
        try:
            found = json.loads((target / MANIFEST).read_text())
            return bool(found == _manifest(folder, target))
        except (OSError, ValueError):  # missing, or being replaced
            return False

    def make(scratch: Path) -> None:
        from huggingface_hub import save_torch_state_dict

        say(f"{folder}: packing the weights into four bits, once, for {target}")
        model, without = load(), set(HEADS if source.form == "classifier" else ())
        state = {k: v for k, v in model.state_dict().items() if not without & set(k.split("."))}
        scratch.mkdir()
        save_torch_state_dict(
            state,
            scratch,
            max_shard_size=SHARD,
            shared_tensors_to_discard=list(model.all_tied_weights_keys),
        )
        for name in CONFIGS:  # the second says how text is written
            if (folder / name).is_file():
                shutil.copy(folder / name, scratch)
        (scratch / MANIFEST).write_text(json.dumps(_manifest(folder, scratch)))

    return made_once(target, fresh, make)


def _manifest(full: Path, packed: Path) -> dict[str, Any]:
    """What shows that packed files are complete, and made of these weights."""
    of = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in _files(full)}
    return {"format": FORMAT, "of": of, "is": {p.name: p.stat().st_size for p in _files(packed)}}


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in WEIGHTS or p.name in CONFIGS)
