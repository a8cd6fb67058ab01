"""What the environment holds of secrets is written nowhere."""

from __future__ import annotations

import pytest

TOKEN = "planted-3f9c71d0"
PLACES = {
    "HF_TOKEN": f"hf_{TOKEN}",
    "MLFLOW_TRACKING_TOKEN": TOKEN,
    "MLFLOW_TRACKING_PASSWORD": TOKEN,
    "AWS_SECRET_ACCESS_KEY": TOKEN,
}


@pytest.mark.timeout(600)
@pytest.mark.faults
def test_no_secret_of_the_environment_is_written(chain):
    done = chain.run(**PLACES, MLFLOW_TRACKING_URI=f"http://user:{TOKEN}@127.0.0.1:9")
    assert TOKEN not in done.stdout
    files = [*chain.files(), *(p for p in (chain.folder / ".snakemake").rglob("*") if p.is_file())]
    assert [str(path) for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert len(chain.finished()) == 8
