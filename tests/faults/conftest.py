"""The undisturbed study that all others are compared with."""

from __future__ import annotations

import shutil

import pytest

from tests.faults.chain import FOLDERS, Chain


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Chain:
    chain = Chain(tmp_path_factory.mktemp("undisturbed") / "study")
    done = chain.run()
    assert done.returncode == 0, done.stdout
    return chain


@pytest.fixture
def chain(tmp_path, undisturbed) -> Chain:
    """The same study, nothing run."""
    return Chain(tmp_path / "study")


@pytest.fixture
def finished(tmp_path, undisturbed) -> Chain:
    """The same study, all of it run."""
    chain = Chain(tmp_path / "study")
    for name in (*FOLDERS, "logs", ".snakemake"):
        shutil.copytree(undisturbed.folder / name, chain.folder / name, symlinks=True)
    return chain
