"""The MLflow UI on the right store."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from costbp.config.study import Plan
from costbp.errors import UserError
from costbp.tracking.mlflow_store import database, tracking_uri

HOST = "127.0.0.1"


def serve(plan: Plan, port: int) -> None:
    """Run ``mlflow server`` on the study's store until it is interrupted.

    Raises:
        UserError: the port is taken, or there is no database yet.
    """
    uri = tracking_uri(plan)
    path = database(uri)
    if path is None and not uri.startswith("file"):
        raise UserError(f"MLFLOW_TRACKING_URI is {uri}: open that server's own UI in a browser")
    if path is not None and not path.exists():
        raise UserError(f"{path}: no runs are recorded yet; run `snakemake --cores all` first")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"port {port} is already in use; choose another: costbp ui --port {port + 1}"
            ) from error
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    print(f"http://{HOST}:{port}  (Ctrl-C ends it)", flush=True)
    subprocess.run([*command, "--host", HOST, "--port", str(port)], env=environment, check=False)
