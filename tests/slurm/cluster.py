"""A SLURM of four nodes on this machine, with daemons, ports and folders of its own.

Each node has 8 GPUs and 64 cores, on paper.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
NODES = ("n1", "n2", "n3", "n4")

# cred_expire: seconds for which a requeued job is held back, 5 at least, else 120. proctrack/pgid signals what
# proctrack/cgroup does: the task, not its children. Ports come from job numbers, which no other cluster here may have.
CONF = """
ClusterName=test
FirstJobId={job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=10
OverTimeLimit=1
GresTypes=gpu
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
NodeName=n[1-4] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=64 RealMemory=65536 Gres=gpu:8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES PriorityTier=2 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
"""


def lacking() -> str:
    """Why there can be no cluster here, "" if there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"no {', '.join(missing)}: apt-get install slurm-wlm munge" if missing else ""


PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"  # Debian's daemons are in /usr/sbin


class Cluster:
    """Started when made. `stop` ends the daemons and every process of their jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {k: value for k, value in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "OMP_"))}
        self.env |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("munge", "state", *NODES):
            (folder / name).mkdir(mode=0o755)
        key = folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        (folder / "gpus").mkdir()
        for i in range(8):
            (folder / "gpus" / f"gpu{i}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpus/gpu[0-7]\n")
        ports = _free_ports(1 + len(NODES))
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        values = {"host": socket.gethostname(), "folder": folder, "user": user}
        values |= {"job": 64 * (os.getpid() % 500_000), "port": ports[0], "first": ports[1], "last": ports[-1]}
        (folder / "slurm.conf").write_text(CONF.format(**values))
        paths = [f"--{name}={folder}/munge/{name}" for name in ("socket", "pid-file", "seed-file", "log-file")]
        self._start("munged", "munged", "--foreground", "--force", f"--key-file={key}", *paths)
        self.until(lambda: (folder / "munge" / "socket").exists(), "munged's socket", 60)
        self._start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.until(lambda: self("sinfo", "-h", "-o", "%T %D") == "idle 4", "four idle nodes", 120)

    def __call__(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Standard output of a SLURM command, stripped. Raises AssertionError with what it said if it fails."""
        done = subprocess.run(command, cwd=cwd, env=self.env | (env or {}), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node, env={"TEST_NODE": node})

    def kill_node(self, node: str) -> None:
        """As when it loses power."""
        for pid in [
            self.daemons[node].pid,
            *self.processes(f"TEST_NODE={node}"),
            *self.processes(f"SLURMD_NODENAME={node}"),
        ]:
            _kill(pid, signal.SIGKILL)
        self.daemons.pop(node).wait()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, …"""
        found = re.search(r"JobState=(\w+)", self("scontrol", "show", "job", "-o", job))
        assert found
        return found.group(1)

    def processes(self, *settings: str) -> list[int]:
        """Those of this cluster that have these NAME=value in the environment they started with."""
        wanted = {s.encode() for s in (f"SLURM_CONF={self.folder}/slurm.conf", *settings)}
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if wanted <= set(path.read_bytes().split(b"\0")):
                    found.append(int(path.parent.name))
            except OSError:
                pass  # it has ended
        return found

    def until(self, true: Callable[[], bool], what: str, seconds: float = 480) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"{what}: not within {seconds} s\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return (self.folder / "slurmctld.log").read_text()[-1500:]

    def stop(self) -> None:
        for name in reversed(self.daemons):
            _kill(self.daemons[name].pid, signal.SIGTERM)
        for pid in self.processes():
            _kill(pid, signal.SIGKILL)
        for daemon in self.daemons.values():
            daemon.wait()
        self.until(lambda: not self.processes(), "the end of all processes", 60)

    def _start(self, name: str, *command: str, env: dict[str, str] | None = None) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            # Should pytest be killed, they go with it.
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command], env=self.env | (env or {}), stdout=log, stderr=log, cwd="/"
            )


def check_out(folder: Path, config: str) -> Path:
    """A copy of this project in `folder`, as a user would have it, with configs/small.yaml."""
    for name in ("trainer", "models", "data", "kernels", "configs", "slurm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "configs" / "small.yaml").write_text(config)
    return folder


def _free_ports(count: int) -> list[int]:
    """Consecutive ones, above those of the jobs (slurm/launch.sh) and below the system's own."""
    for first in range(30000 + 16 * (os.getpid() % 128), 32768 - count, count):
        probes = []
        try:
            for port in range(first, first + count):
                probes.append(socket.create_server(("127.0.0.1", port)))
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
        return list(range(first, first + count))
    raise RuntimeError("no free ports")


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
