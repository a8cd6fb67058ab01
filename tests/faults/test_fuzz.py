"""Mutated studies, entries, catalogs and claims: each is accepted, or refused in one line, and what is
accepted makes a workflow. Nothing that a string holds is run.

``pytest -m faults tests/faults`` tries 2,000; the first 150 of them belong to every run of the tests.
"""

from __future__ import annotations

import copy
import datetime
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from snakemake.cli import main

from costbp.config import load_plan
from costbp.cost.outlook import outlook_lines
from costbp.data.pairs import check_pairs
from costbp.errors import UserError
from tests.conftest import working_copy

FEW, ALL = 150, 2000
LONGEST = 600
PLANTED = "PLANTED"  # a file that exists as soon as a string was run
TEXTS = (
    *("", " ", "-", "-rf", ".", "..", "../../out", "/etc/passwd", "~", "a b", "a#b", "a/b", "a+b", "x."),
    *(f"$(touch {PLANTED})", f"`touch {PLANTED}`", f"; touch {PLANTED} #", f"' && touch {PLANTED} '"),
    *(f'"; touch {PLANTED}; "', f"a\ntouch {PLANTED}\n", f"__import__('os').system('touch {PLANTED}')"),
    *("<script>alert(1)</script>", '" onload="alert(1)', "{{7*7}}", "{x}", "{config}", "{", "}", "<x>"),
    *("$\\frac", "$", "$x_{$", "^_{}", "\\textbf{", "=1+1", "|", "%s %d", "100 %", "&amp;", "*", "?", "[a]"),
    *("\u4e2d\u6587 \U0001f600", "\u202etxt", "\ud800", "\x00", "\x1b[31m", "a" * 300, "a" * 100_000),
    *("null", "yes", "0x10", "1e5", "2024-01-01", "bp_checkpointing", "python", "config", "random", "study"),
)  # fmt: skip
NUMBERS = (-1, 0, 1, 2, 3, 10**9, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308)
NUMBERS += (float("inf"), float("-inf"), float("nan"))
OTHERS = (None, True, False, [], {}, [[[]]], {"a": {"b": {}}}, {1: 2}, {None: 1}, {"kind": "python"},
          [None], datetime.date(2024, 1, 1), b"\xff\x00")  # fmt: skip
SOURCES = ("config.yaml", "claims.yaml", "studies", "catalog")


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything inside of ``value``."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield (*above, key)
        yield from places(inner, (*above, key))


def another(dice: random.Random, value: Any) -> Any:
    """Something else in a value's place."""
    kind = dice.randrange(6)
    if kind == 0:
        return dice.choice(TEXTS)
    if kind == 1:
        return dice.choice(NUMBERS)
    if kind == 2:
        return copy.deepcopy(dice.choice(OTHERS))
    if kind == 3:
        return nested(dice.choice((1, 3, 40, 60)))
    if kind == 4:  # another type, or a list of it
        return dice.choice(([value], {"a": value}, str(value), [value] * 3))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{value}{dice.choice(TEXTS)}"[:2000]
    return dice.choice((-value, value * 10**12, value / 3, value + 1, str(value)))


def mutate(dice: random.Random, data: Any) -> None:
    """Change one place of parsed YAML: delete, rename or copy it, or put something else there."""
    found = list(places(data))
    if not found:
        return
    *way, last = dice.choice(found)
    parent = data
    for key in way:
        parent = parent[key]
    kind = dice.randrange(6)
    if kind == 0:
        del parent[last]
    elif kind == 1 and isinstance(parent, dict):
        parent[dice.choice(TEXTS)] = parent.pop(last)
    elif kind == 2 and isinstance(parent, dict):
        parent[dice.choice(TEXTS)] = copy.deepcopy(parent[last])
    elif kind == 3 and isinstance(parent, list):
        parent.insert(0, copy.deepcopy(dice.choice(parent)))
    else:
        parent[last] = another(dice, parent[last])


def damaged(dice: random.Random, text: bytes) -> bytes:
    """Text as an editor, a disk or a merge leaves it."""
    place, lines = dice.randrange(len(text)), text.splitlines(keepends=True)
    line = dice.randrange(len(lines))
    kind = dice.randrange(8)
    if kind == 0:
        return text[:place]
    if kind == 1:
        return (
            text[:place]
            + bytes(dice.randrange(256) for _ in range(dice.randrange(1, 9)))
            + text[place:]
        )
    if kind == 2:
        return text[:place] + text[place + dice.randrange(1, 40) :]
    if kind == 3:
        return b"".join([*lines[: line + 1], *lines[line:]])
    if kind == 4:
        return b"".join([*lines[:line], b"\t" + lines[line], *lines[line + 1 :]])
    if kind == 5:
        return b"".join([*lines[:line], *lines[line + 1 :]])
    if kind == 6:
        return text.decode(errors="replace").encode(dice.choice(("utf-16", "utf-8-sig", "utf-32")))
    return text + lines[line]


class Fuzz:
    """Mutations by number, each of one file of a working copy, which is put back afterwards."""

    def __init__(self, config: Path) -> None:
        files = [
            path
            for name in SOURCES
            for path in (sorted((config / name).glob("*.yaml")) or [config / name])
        ]
        self.texts = {path: path.read_bytes() for path in files}
        self.parsed = {path: yaml.safe_load(text) for path, text in self.texts.items()}

    def write(self, number: int) -> tuple[Path, list[Path]]:
        """Mutate a file; returns it, and what is to be laid over the default study."""
        dice = random.Random(number)
        path = dice.choice(list(self.texts))
        text = self.texts[path]
        if dice.random() < 0.8:
            data = copy.deepcopy(self.parsed[path])
            for _ in range(dice.choice((1, 1, 1, 2, 4))):
                mutate(dice, data)
            text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode(
                errors="surrogatepass"
            )
        else:
            text = damaged(dice, text)
        path.write_bytes(text)
        studies = [p for p in self.texts if p.parent.name == "studies"]
        if path.parent.name == "studies":
            return path, [path]
        return path, dice.choice(([], [], [dice.choice(studies)]))

    def restore(self, path: Path) -> None:
        path.write_bytes(self.texts[path])


def verdict(overlays: list[Path]) -> str:
    """Of what the Snakefile does before its first rule: nothing, or the one line that refuses it."""
    try:
        plan = check_pairs(load_plan(overlays))
        outlook_lines(plan, tunes=True)
        plan.model_dump_json()
        assert list(plan.jobs()) and all(
            plan.hashes(m, t, "+".join(ms), b) for m, t, b, ms in plan.jobs()
        )
    except UserError as error:
        return str(error)
    return ""


def fuzz(folder: Path, numbers: range, every: int) -> Counter[str]:
    """Try mutations; of the accepted ones every so manieth makes a workflow."""
    fuzz, found = Fuzz(working_copy(folder) / "config"), Counter[str]()
    for number in numbers:
        path, overlays = fuzz.write(number)
        try:
            said = verdict(overlays)
            found["refused" if said else "accepted"] += 1
            if said:
                assert len(said) < LONGEST and said.isprintable(), (number, path, said)
            elif found["accepted"] % every == 0:
                dry_run(overlays)
                found["workflows"] += 1
        except Exception as error:
            raise AssertionError(f"mutation {number}: {path}, over {overlays}") from error
        finally:
            fuzz.restore(path)
        assert not Path(PLANTED).exists(), number
    assert not list(Path().rglob(PLANTED))
    return found


def dry_run(overlays: list[Path]) -> None:
    """Snakemake finds every rule's jobs, in this process."""
    files = ["--configfile", *map(str, overlays)] if overlays else []
    with pytest.raises(SystemExit) as ended:
        main(["-n", "--quiet", "all", "--cores", "1", *files])
    assert not ended.value.code


def test_fuzz(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = fuzz(tmp_path, range(FEW), every=6)
    assert min(found.values()) >= 3, found


@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_fuzz_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = fuzz(tmp_path, range(ALL), every=4)
    with capsys.disabled():
        print(f"\n{dict(found)}")
