"""The MLflow UI on the right store."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from types import FrameType

from costbp.config.study import Plan
from costbp.errors import UserError
from costbp.tracking.mlflow_store import experiment, sync, tracking_uri, without_secrets

HOST = "127.0.0.1"
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve(plan: Plan, port: int) -> None:
    """Log what has finished, then run ``mlflow server`` on the store until it is interrupted.

    Raises:
        UserError: the port is taken, or no run has finished yet.
    """
    uri = tracking_uri(plan)
    if not uri.startswith("sqlite:///"):
        where = without_secrets(uri)
        raise UserError(f"MLFLOW_TRACKING_URI is {where}: open that server's own UI in a browser")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"port {port} is already in use; choose another: costbp ui --port {port + 1}"
            ) from error
    _, finished = sync(plan)
    if not finished:
        raise UserError(f"study '{plan.name}': no run has finished yet; run `snakemake` first")
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", HOST, "--port", str(port), "--workers", "1"]
    page = (
        f"experiments/{experiment(plan)}/runs?workflowType=machine_learning"  # not the GenAI view
    )
    print(f"{finished} runs at http://{HOST}:{port}/#/{page}  (Ctrl-C ends it)", flush=True)
    sys.exit(_run(command, environment))


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run a server, which starts processes of its own, until it or this process is told to end; none
    of them remains. Returns the exit code."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in ENDS:
        signal.signal(number, end)
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return server.wait()
    finally:
        for number in ENDS:
            signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, number)
                server.wait(5)
