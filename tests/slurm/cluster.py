"""A private Slurm under one folder: no systemd, no accounting, nothing outside it.

Its nodes are daemons of this machine, each with a port of its own, one core and one GPU; so they share
the files. Needs root and the Debian packages slurmctld, slurmd, slurm-client and munge. Cores and GPUs
exist in the books only: Slurm counts them and hands them out, no device is behind them.
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
PARTITION, URGENT = "main", "urgent"  # jobs of the second preempt those of the first
NODES = ("node1", "node2", "node3")

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# plain processes, no cgroups, no pinning; a group of processes ends with the first of them, as cgroups do
ProctrackType=proctrack/pgid
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
KillWait=15
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=3600
ReturnToService=2
GresTypes=gpu
# believe the line of the node, whatever the machine has
SlurmdParameters=config_overrides
{nodes}PartitionName={partition} Nodes=ALL Default=YES DefMemPerCPU=100 MaxTime=1-0 DefaultTime=10 State=UP
PartitionName={urgent} Nodes=ALL PriorityTier=10 DefMemPerCPU=100 MaxTime=1-0 DefaultTime=10 State=UP
"""

NODE = """\
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=8000 Gres=gpu:1 State=UNKNOWN
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
def running(folder: Path) -> Iterator[dict[str, str]]:
    """Run a cluster for the block; yields the environment in which its commands work.

    Args:
        folder: empty; holds configuration, logs and state. Its path must be short, since a socket
            lies in it.
    """
    spools = (f"spool-{node}" for node in NODES)
    for name in ("state", "bin", "calls", "devices", *spools):
        (folder / name).mkdir(parents=True)
    environment = _write(folder)

    def answers(*words: str) -> str | None:
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=10, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    def idle() -> bool:
        states = answers("sinfo", "--noheader", "--format=%T", f"--partition={PARTITION}")
        return states == "idle"

    munged = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    socket_file = f"--socket={folder}/munge.socket"
    with ExitStack() as stack:

        def start(*words: str) -> None:
            stack.enter_context(_daemon(folder, environment, *words))

        start("munged", "--foreground", "--force", socket_file, *munged)
        _wait(lambda: answers("munge", socket_file, "--no-input") is not None, "munged", folder)
        start("slurmctld", "-D", "-c")
        _wait(lambda: answers("scontrol", "ping") is not None, "slurmctld", folder)
        for node in NODES:
            start("slurmd", "-D", "-N", node)
        _wait(idle, "idle nodes", folder)
        try:
            yield environment
        finally:  # jobs first: a job's daemon would outlive slurmd
            answers("scancel", f"--partition={PARTITION},{URGENT}")
            _wait(lambda: answers("squeue", "--noheader") == "", "the end of all jobs", folder)


def _write(folder: Path) -> dict[str, str]:
    """Write configuration and wrappers; returns the environment that leads to them."""
    host = socket.gethostname().split(".")[0]
    with ExitStack() as stack:
        servers = [socket.create_server(("127.0.0.1", 0)) for _ in ("controller", *NODES)]
        ports = [stack.enter_context(server).getsockname()[1] for server in servers]
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    nodes = "".join(
        NODE.format(node=node, host=host, port=port)
        for node, port in zip(NODES, ports[1:], strict=True)
    )
    text = CONF.format(
        host=host,
        folder=folder,
        controller_port=ports[0],
        nodes=nodes,
        partition=PARTITION,
        urgent=URGENT,
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    with (folder / "gres.conf").open("w") as gres:
        for node in NODES:  # slurmd wants a device file of each GPU: copies of /dev/null
            device = folder / "devices" / node
            os.mknod(device, 0o20666, os.makedev(1, 3))
            gres.write(f"NodeName={node} Name=gpu File={device}\n")
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
    with (folder / f"{words[0]}.out").open("a") as out:
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
