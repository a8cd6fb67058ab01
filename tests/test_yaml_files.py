"""A file that YAML would read in silence, or with a traceback, is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from costbp.config import load_plan
from costbp.config.yaml_file import read_yaml
from costbp.errors import UserError
from tests.conftest import ROOT
from tests.small_studies import snakemake

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = {  # bytes of a file -> words of the refusal
    b"a: 1\nb: 2\na: 3\n": ["key 'a' stands twice", "lines 1 and 3"],
    b"x:\n  a: 1\n  b: 2\n  'a': 3\n": ["key 'a' stands twice", "lines 2 and 4"],
    b"x: {a: 1, a: 2}": ["key 'a' stands twice", "lines 1 and 1"],
    b"x: [{a: 1}, {b: 1, b: 2}]": ["key 'b' stands twice"],
    b"&k a: 1\n*k : 2\n": ["key 'a' stands twice", "lines 1 and 2"],
    b'{"a": 1, "a": 2}': ["key 'a' stands twice"],
    "a: gr\u00f6\u00dfe".encode("latin-1"): ["not text in UTF-8", "byte 6"],
    "a: b".encode("utf-16"): ["not text in UTF-8"],
    b"a: b\x00c": ["not valid YAML", "not allowed"],
    b'a: "b\\0c"': ["a, line 1", "can't be printed"],
    b'a: "\\ud800"': ["line 1", "not valid YAML"],
    b"a:\n\t- b": ["line 2", "not valid YAML"],
    b"[" * 100_000: ["line 1", "levels"],
    b"a: " * 20 + b"b": ["not valid YAML"],
    BOMB.encode(): ["aliases", "values"],
    b"a: &a [*a]": ["aliases"],
    b"a: 2024-01-01": ["a, line 1", "read as timestamp", "quotes"],
    b"a: 2024-13-45": ["a, line 1", "read as timestamp"],
    b"2024-01-01: a": ["read as timestamp"],
    b"a: {b: .inf}": ["a.b, line 1", "no finite number"],
    b"a: .nan": ["no finite number"],
    b"a: 1.0e+999": ["no finite number"],
    b"a: " + b"9" * 5000: ["a, line 1", "too large"],
    b"a: !!python/object:os.system {}": ["tag", "os.system"],
    b"a: !!python/object/apply:os.system ['touch planted']": ["tag"],
    b"a: !!set {b, c}": ["tag"],
    b"a: !!binary aGk=": ["binary"],
    b"? [a, b]\n: c": ["not valid YAML"],
    b"a: 1\n---\nb: 2": ["not valid YAML"],
    b"a: [1, 2": ["not valid YAML", "line"],
    b"a: *b": ["not valid YAML"],
}  # fmt: skip


@pytest.mark.parametrize("content", REFUSED)
def test_refused(tmp_path, content):
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:") and "\n" not in message
    assert len(message) - len(str(path)) < 300
    for word in REFUSED[content]:
        assert word in message, message


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"", {}),
        (b"# nothing\n", {}),
        (b"\xef\xbb\xbfa: 1\n", {"a": 1}),
        (b"a: &a {b: 1, c: 2}\nd: {<<: *a, b: 3}\n", {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}}),
        (b"1: a\n'1': b\n", {1: "a", "1": "b"}),
        (b"a: !!str 1\nb: 1:30\n", {"a": "1", "b": 90}),
        ("a: gr\u00f6\u00dfe \U0001f600 \u4e2d".encode(), {"a": "gr\u00f6\u00dfe \U0001f600 \u4e2d"}),
        (b"[]", []),
    ],
)  # fmt: skip
def test_read(tmp_path, content, value):
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    assert read_yaml(path) == value


def test_what_ships_reads_as_ever():
    for path in [*ROOT.glob("config/*.yaml"), *ROOT.glob("config/*/*.yaml")]:
        assert read_yaml(path) == (yaml.safe_load(path.read_text()) or {})


@pytest.mark.parametrize(
    "file",
    ["config.yaml", "claims.yaml", *(f"catalog/{k}.yaml" for k in ("methods", "models", "tasks", "budgets", "assets", "groups"))],
)  # fmt: skip
def test_a_key_that_stands_twice_is_refused_in_every_file(workdir, file):
    path = Path("config", file)
    text = path.read_text()
    key = next(line for line in text.splitlines() if line.endswith(":") and line[0].isalpha())
    path.write_text(f"{text}\n{key} {{}}\n")
    with pytest.raises(
        UserError, match=rf"{file}: key '{key[:-1]}' stands twice.*lines \d+ and \d+"
    ):
        load_plan()


def test_snakemake_refuses_a_study_with_a_key_twice(workdir):
    study = Path("config/studies/smoke.yaml")
    study.write_text(study.read_text() + "\nseeds: [5]\n")
    said = snakemake("-n", "--configfile", str(study), code=1)
    assert "smoke.yaml: key 'seeds' stands twice in one mapping, at lines " in said
    assert "Traceback" not in said
    assert not Path("results").exists()


def test_an_overlay_without_keys_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.yaml"
    path.write_text("# yaml-language-server: $schema=../../")
    with pytest.raises(UserError, match=r"cut\.yaml: holds no keys; is it cut off"):
        load_plan([path], base=ROOT / "config/config.yaml")
