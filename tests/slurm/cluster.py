"""A private Slurm of one node under one folder: no systemd, no accounting, nothing outside it.

Needs root and the Debian packages slurmctld, slurmd, slurm-client and munge. The GPUs exist in the
books only: Slurm counts them and hands them out, no device is behind them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
PARTITION = "main"

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
# plain processes, found through /proc: no cgroups, no pinning
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# start and reap jobs at once, and remember them until the test has looked
SchedulerParameters=bf_interval=1,sched_interval=1,defer_batch,batch_sched_delay=0,sched_min_interval=0
KillWait=2
MinJobAge=3600
ReturnToService=2
GresTypes=gpu
# believe the line of the node, whatever the machine has
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName={partition} Nodes={host} Default=YES DefMemPerCPU=100 MaxTime=1-0 DefaultTime=10 State=UP
"""

# The jobstep plugin calls srun without any SLURM_ variable, SLURM_CONF included: so each client is
# wrapped. The wrapper also notes its arguments, a line a call.
WRAPPER = """\
#!/bin/sh
echo "$*" >> {calls}/{tool}
SLURM_CONF={folder}/slurm.conf exec {real} "$@"
"""


def missing() -> str:
    """Why no cluster can be started here; empty when one can."""
    if os.geteuid() != 0:
        return "Slurm's daemons must be started by root"
    absent = [tool for tool in (*DAEMONS, *CLIENTS) if not shutil.which(tool)]
    return f"not installed: {', '.join(absent)}" if absent else ""


def calls(folder: Path, tool: str) -> list[str]:
    """Arguments of every call of a client so far, oldest first."""
    file = folder / "calls" / tool
    return file.read_text().splitlines() if file.exists() else []


@contextmanager
def one_node_slurm(folder: Path, gpus: int = 1) -> Iterator[dict[str, str]]:
    """Run a cluster for the block; yields the environment in which its commands work.

    Args:
        folder: empty; holds configuration, logs and state. Its path must be short, since a socket
            lies in it.
        gpus: how many GPUs the node claims to have.
    """
    for name in ("state", "spool", "bin", "calls", "devices"):
        (folder / name).mkdir(parents=True)
    environment = _write(folder, gpus)

    def answers(*words: str) -> str | None:
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=10, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    def idle() -> bool:
        return answers("sinfo", "--noheader", "--format=%T") == "idle"

    munged = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    socket_file = f"--socket={folder}/munge.socket"
    with ExitStack() as stack:

        def start(*words: str) -> None:
            stack.enter_context(_daemon(folder, environment, *words))

        start("munged", "--foreground", "--force", socket_file, *munged)
        _wait(lambda: answers("munge", socket_file, "--no-input") is not None, "munged", folder)
        start("slurmctld", "-D", "-c")
        _wait(lambda: answers("scontrol", "ping") is not None, "slurmctld", folder)
        start("slurmd", "-D")
        _wait(idle, "an idle node", folder)
        try:
            yield environment
        finally:  # jobs first: a job's daemon would outlive slurmd
            answers("scancel", f"--partition={PARTITION}")
            _wait(lambda: answers("squeue", "--noheader") == "", "the end of all jobs", folder)


def _write(folder: Path, gpus: int) -> dict[str, str]:
    """Write configuration and wrappers; returns the environment that leads to them."""
    host = socket.gethostname().split(".")[0]
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        ports = one.getsockname()[1], two.getsockname()[1]
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    text = CONF.format(
        host=host,
        folder=folder,
        gpus=gpus,
        partition=PARTITION,
        controller_port=ports[0],
        node_port=ports[1],
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    with (folder / "gres.conf").open("w") as gres:
        for number in range(gpus):  # slurmd wants a device file of each: copies of /dev/null
            device = folder / "devices" / f"nvidia{number}"
            os.mknod(device, 0o20666, os.makedev(1, 3))
            gres.write(f"NodeName={host} Name=gpu File={device}\n")
    for tool in CLIENTS:
        wrapper = folder / "bin" / tool
        wrapper.write_text(
            WRAPPER.format(
                calls=folder / "calls", tool=tool, folder=folder, real=shutil.which(tool)
            )
        )
        wrapper.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    return environment | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }


@contextmanager
def _daemon(folder: Path, environment: dict[str, str], *words: str) -> Iterator[None]:
    """A daemon in the foreground of its own session; only that process is stopped."""
    with (folder / f"{words[0]}.out").open("w") as out:
        process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(condition: Callable[[], bool], what: str, folder: Path, seconds: float = 30) -> None:
    """Poll until the condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"gave up waiting for {what}; logs are in {folder}")
        time.sleep(0.1)
