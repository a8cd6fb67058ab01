"""The MLflow UI on the right store."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from costbp.config.study import Plan
from costbp.errors import UserError
from costbp.tracking.mlflow_store import database, sync, tracking_uri

HOST = "127.0.0.1"


def serve(plan: Plan, port: int) -> None:
    """Log what has finished, then run ``mlflow server`` on the store until it is interrupted.

    Raises:
        UserError: the port is taken, or no run has finished yet.
    """
    uri = tracking_uri(plan)
    if database(uri) is None:
        raise UserError(f"MLFLOW_TRACKING_URI is {uri}: open that server's own UI in a browser")
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
    print(f"{finished} runs at http://{HOST}:{port}  (Ctrl-C ends it)", flush=True)
    subprocess.run([*command, "--host", HOST, "--port", str(port)], env=environment, check=False)
