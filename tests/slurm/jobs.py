"""Jobs of the shipped scripts in a test's SLURM, and the checkpoints they leave."""

import json
import os
import re
import signal
from pathlib import Path

from tests.slurm.cluster import Cluster

SMALL = ("--gpus-per-node=1", "--cpus-per-task=1")
STEPS = 180
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Job:
    """A job with these options and settings; two nodes of one rank if not told otherwise."""

    def __init__(
        self,
        cluster: Cluster,
        site: Path,
        *options: str,
        by_hand: bool = False,
        script: str = "slurm/adco_800ep.sh",
        **environment: str,
    ) -> None:
        self.cluster, self.site = cluster, site
        split = next((i for i, option in enumerate(options) if not option.startswith("-")), len(options))
        before, after = ["--nodes=2", *SMALL, *options[:split]], options[split:]
        order = [script, *before, *after] if by_hand else ["sbatch", *before, script, *after]
        said = cluster(*order, cwd=site, env={"CONFIG": "configs/small.yaml", "PREFLIGHT": "0"} | environment)
        self.id = re.findall(r"job (\d+)", said)[0]

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in self.site.glob(f"*-{self.id}.log"))

    def says(self, text: str, times: int = 1, seconds: float = 480) -> None:
        try:
            self.cluster.until(lambda: self.log.count(text) >= times, f"{text!r} in the log of {self.id}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    def ends(self, state: str = "COMPLETED") -> None:
        self.cluster.until(lambda: self.cluster.state(self.id) in FINAL, f"the end of {self.id}")
        assert self.cluster.state(self.id) == state, self.log

    def in_progress(self, run: Path, step: int = 20) -> int:
        """Wait until `step` is saved and hold the ranks there; the newest step that is."""
        self.cluster.until(lambda: newest(run) >= step, f"step {step} of {run}")
        self.send(signal.SIGSTOP)
        assert not (run / "results.json").exists(), "too fast to be interrupted"
        return newest(run)

    def interrupt(self) -> None:
        """USR1 to the held ranks by SLURM, which delivers it some time after scancel has returned; then they go on."""
        self.cluster("scancel", "--signal=USR1", self.id)
        self.cluster.until(lambda: all(pending(pid, signal.SIGUSR1) for pid in self.ranks()), "USR1 at all ranks")
        self.send(signal.SIGCONT)

    def send(self, number: int) -> None:
        """To all ranks."""
        for pid in self.ranks():
            os.kill(pid, number)

    def ranks(self) -> list[int]:
        return [pid for r in range(2) for pid in self.cluster.processes(f"SLURM_JOB_ID={self.id}", f"RANK={r}")]


def pending(pid: int, number: int) -> bool:
    (waiting,) = re.findall(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(waiting, 16) >> (number - 1) & 1)


def newest(run: Path) -> int:
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step-*")), default=0)


def weights(run: Path) -> dict[str, str]:
    """SHA-256 of all that the last checkpoint has."""
    manifest = json.loads((run / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text())
    assert (run / "results.json").exists()
    tensors = {name: entry["sha256"] for name, entry in manifest.items() if name != ".metadata"}
    assert len(tensors) == 3  # of two ranks, and the whole networks
    return tensors


def began_at(log: str) -> list[int]:
    """The steps at which its starts went on."""
    return [int(step) for step in re.findall(r"continuing from .*step-(\d+)", log)]
