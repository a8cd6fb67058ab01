"""A small study run as people run it, to be disturbed and started again by the same command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from tests.conftest import working_copy

STUDY: dict[str, Any] = {
    "study": "faults",
    "seeds": [0, 1],
    "trace_claims": False,
    "experiments": [
        {
            "models": ["tiny_lora"],
            "tasks": ["docstrings"],
            "methods": ["bp_checkpointing", "zo_svrg"],
            "budgets": ["units_400"],
        },
        {
            "models": ["tiny_head"],
            "tasks": ["docstrings"],
            "methods": ["bp_checkpointing", "zo_adam"],
            "budgets": ["units_400"],
        },
    ],
    "evaluation": {"points": [0, 0.25, 0.5, 1]},
    "tuning": {"file": "absent.yaml"},
    "resources": {"checkpoint_seconds": 0.0},
    "paths": {"reports": "reports"},
}
TIMES = ("seconds", "finished", "resumed", "rss_bytes", "reserved_bytes")  # in a column's name
FOLDERS = ("runs", "cache", "results", "reports", "mlflow")


class Chain:
    """A working copy with the study, and what is asked of it."""

    def __init__(self, folder: Path, cache: Path | None = None) -> None:
        self.folder = working_copy(folder)
        (folder / "faults.yaml").write_text(yaml.safe_dump(STUDY))
        if cache is not None:
            shutil.copytree(cache, folder / "cache")

    def command(self, *words: str) -> list[str]:
        given = ["--cores", "2", "--configfile", "faults.yaml", *words]
        return [sys.executable, "-m", "snakemake", *given]

    def start(self, **environment: str) -> subprocess.Popen[str]:
        """The main command in a process group of its own."""
        return subprocess.Popen(
            self.command(),
            cwd=self.folder,
            env=_environment() | environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The main command to its end; stderr is in stdout."""
        return subprocess.run(
            self.command(*words),
            cwd=self.folder,
            env=_environment() | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def kill(self, process: subprocess.Popen[str], after: float) -> bool:
        """Kill the command and all its jobs after some seconds; False if it had ended by then."""
        try:
            process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return True
        assert process.returncode == 0
        return False

    def finished(self) -> dict[Path, int]:
        """Records of the store and when they were written."""
        found = self.folder.glob("runs/*/*/*/*/*/record.json")
        return {path: path.stat().st_mtime_ns for path in found}

    def tables(self) -> dict[str, Any]:
        """All that the study found, times aside."""
        results, reports = self.folder / "results/faults", self.folder / "reports"
        frames = {name: results / f"{name}.parquet" for name in ("runs", "curves", "costs")}
        for path in sorted(self.folder.glob("runs/*/*/*/*/*/steps.parquet")):
            frames[str(path.parent.relative_to(self.folder))] = path
        found: dict[str, Any] = {name: _timeless(path) for name, path in frames.items()}
        summary = pd.read_csv(reports / "tables/summary.csv")
        found["summary"] = _dropped(summary).to_csv()
        claims = json.loads((reports / "claims.json").read_text())["claims"]
        found["claims"] = [
            [claim["id"], claim["verdict"]] for claim in claims if claim.get("measure") != "seconds"
        ]
        return found

    def left_over(self) -> list[Path]:
        """Files that only work in progress has."""
        return [path for path in self.files() if path.name in ("checkpoint.pt", "progress.json")
                or path.name.endswith(".tmp")]  # fmt: skip

    def files(self) -> Iterator[Path]:
        """Of what the study writes, logs included."""
        for name in (*FOLDERS, "logs"):
            yield from (p for p in sorted((self.folder / name).rglob("*")) if p.is_file())

    def said(self) -> str:
        """All that the jobs' logs say."""
        return "\n".join(p.read_text() for p in sorted((self.folder / "logs").rglob("*.log")))


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}


def _timeless(path: Path) -> str:
    return _dropped(pd.read_parquet(path)).to_csv()


def _dropped(frame: pd.DataFrame) -> pd.DataFrame:
    timed = [column for column in frame if any(word in str(column) for word in TIMES)]
    return frame.drop(columns=timed)
