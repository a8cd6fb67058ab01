"""The Kubernetes profile and its container, as far as they can be judged without a cluster."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from costbp import __version__
from tests.conftest import ROOT

FOLDER = ROOT / "workflow/profiles/kubernetes"
PROFILE = yaml.safe_load((FOLDER / "config.yaml").read_text())
CONTAINER = (FOLDER / "Containerfile").read_text()


def test_the_plugins_take_every_key_of_the_profile(tmp_path: Path):
    for name in ("executor_plugin_kubernetes", "storage_plugin_fs"):
        pytest.importorskip(f"snakemake_{name}")
    from snakemake.cli import parse_args

    _, args = parse_args(["--profile", str(FOLDER)])
    for key in PROFILE.keys() - {"until", "default-resources"}:
        given = PROFILE[key] if key != "kubernetes-persistent-volumes" else [PROFILE[key]]
        assert str(getattr(args, key.replace("-", "_"))) == str(given), key
    assert set(args.until) == set(PROFILE["until"])
    assert args.default_resources.keys() >= PROFILE["default-resources"].keys()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(PROFILE | {"kubernetes-volumes": "a:/b"}))
    with pytest.raises(SystemExit):
        parse_args(["--profile", str(tmp_path)])


def test_the_profile_names_rules_and_one_volume():
    text = "".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    assert set(PROFILE["until"]) <= set(re.findall(r"rule (?:\w+ as )?(\w+)", text))
    _, mounted = PROFILE["kubernetes-persistent-volumes"].split(":")
    assert PROFILE["directory"] == PROFILE["default-storage-prefix"]
    assert Path(PROFILE["directory"]).is_relative_to(mounted)
    assert not Path(PROFILE["remote-job-local-storage-prefix"]).is_relative_to(mounted)


def test_the_container_holds_what_the_repository_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (image,) = re.findall(r"^FROM (\S+)", CONTAINER, re.MULTILINE)
    assert f"docker://{image}" in (ROOT / "Snakefile").read_text()
    assert image.removeprefix("python:").removesuffix("-slim") == project["requires-python"][2:]
    for words in re.findall(r"^COPY (.+) \S+$", CONTAINER, re.MULTILINE):
        assert all((ROOT / name).exists() for name in words.split()), words
    (extra,) = re.findall(r"-e '\.\[(\w+)\]'", CONTAINER)
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for requirement in project["optional-dependencies"][extra]:
        name, least = requirement.split(">=")
        pin = [int(part) for part in pins[name].split(".")]
        assert pin >= [int(part) for part in least.split(".")], name
    assert PROFILE["container-image"].endswith(f":{__version__}")
    assert PROFILE["container-image"] in CONTAINER
