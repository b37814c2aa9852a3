"""The shipped scripts in a real SLURM: jobs that are preempted, fail or are stopped by hand, nodes that are lost."""

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, began_at, newest, weights


@pytest.mark.slow
def test_preemption_saves_and_requeues(cluster: Cluster, site: Path) -> None:
    run = site / "runs" / "low"
    job = Job(cluster, site, "--nodes=1", "--partition=low", "--nodelist=n4", f"run.dir={run}")
    job.in_progress(run)
    cluster("sbatch", "--nodelist=n4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    job.send(signal.SIGCONT)
    job.says("requeued: stopped in good order")
    job.ends()
    (stopped,) = (int(s) for s in re.findall(r"good order at step (\d+) \(SIGTERM\)", job.log))
    assert began_at(job.log) == [stopped]
    assert (run / "results.json").exists()


@pytest.mark.slow
def test_a_lost_node_requeues(cluster: Cluster, site: Path, undisturbed: dict[str, str]) -> None:
    """The first one, with the batch shell, so that only SLURM itself can."""
    run = site / "runs" / "lost"
    job = Job(cluster, site, f"run.dir={run}", "run.step_timeout=30")
    step = job.in_progress(run)
    first = re.findall(r"\(n\[?(\d)", job.log)[0]
    cluster.kill_node(f"n{first}")
    job.send(signal.SIGCONT)
    job.says("slurm: start 1")
    cluster.start_node(f"n{first}")
    job.ends()
    assert began_at(job.log) == [step]
    assert weights(run) == undisturbed
    cluster.until(lambda: cluster("sinfo", "-h", "-t", "idle,mixed,allocated", "-o", "%D") != "", "the node back")


@pytest.mark.slow
def test_a_crash_at_every_start_ends_with_the_reason(cluster: Cluster, site: Path) -> None:
    job = Job(cluster, site, "--nodes=1", "run.dir=runs/crash", "data.train=/nowhere", MAX_FAILURES="2")
    job.ends("FAILED")
    assert job.log.count("error: data: /nowhere does not exist") == 2, job.log
    assert "requeued: training failed with exit code 1, 1 of 2 without a new checkpoint (newest: step 0)" in job.log
    assert job.log.endswith(
        "slurm: giving up: training failed with exit code 1; 2 starts in a row without a new checkpoint "
        "(newest: step 0)\n"
    )


@pytest.mark.slow
def test_a_bad_configuration_is_not_started(cluster: Cluster, site: Path) -> None:
    job = Job(cluster, site, "--nodes=1", "run.epoch=3")
    job.ends("FAILED")
    assert "error: runs/slurm" in job.log
    assert "run.epoch: unknown key, did you mean run.epochs?" in job.log
    assert "requeued" not in job.log


@pytest.mark.slow
def test_a_cancelled_job_stays_cancelled(cluster: Cluster, site: Path) -> None:
    run = site / "runs" / "cancelled"
    job = Job(cluster, site, "--nodes=1", f"run.dir={run}", "run.epochs=3000")
    job.in_progress(run)
    cluster("scancel", job.id)
    job.send(signal.SIGCONT)
    job.ends("CANCELLED")
    time.sleep(3)
    assert cluster.state(job.id) == "CANCELLED", "requeueing would bring it back"


@pytest.mark.slow
def test_a_file_stops_for_good(cluster: Cluster, site: Path) -> None:
    run = site / "runs" / "asked"
    job = Job(cluster, site, "--nodes=1", f"run.dir={run}", "run.epochs=3000")
    job.in_progress(run)
    (run / "stop").touch()
    job.send(signal.SIGCONT)
    job.ends()
    assert f"stopped by the file {run}/stop; the same sbatch goes on from step {newest(run)}" in job.log


@pytest.mark.slow
def test_a_bad_node_is_named_and_left_out(cluster: Cluster, make_site: Callable[[], Path]) -> None:
    """One of three has another version of a package. And data are staged on each."""
    site = make_site()
    package = site / "old" / "timm-0.1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.1\n")
    (site / "run_in").write_text(
        f"[[ ${{SLURM_RESTART_COUNT:-0}} != 0 || $SLURM_NODEID != 1 ]] || export PYTHONPATH={site}/old:$PYTHONPATH\n"
        'exec "$@"\n'
    )
    settings = site / "slurm" / "env.sh"
    text = settings.read_text().replace("container=()", f"container=(bash {site}/run_in)")
    settings.write_text(text + 'stage() { touch "staged-$SLURMD_NODENAME"; }\n')
    job = Job(cluster, site, "--nodes=3", "run.dir=runs/bad", "run.epochs=1", PREFLIGHT="1", EXCLUDE_BAD_NODES="1")
    job.ends()
    (bad,) = re.findall(r"(n\d): package timm 0\.1, but [\d.]+ on 2 of 3 nodes", job.log)
    assert f"requeued: the preflight found what is wrong, on {bad}, 1 of 3" in job.log
    first, second = (_nodes(text) for text in re.findall(r"3 nodes \((.*?)\) x 1 ranks", job.log))
    assert bad in first
    assert bad not in second
    assert {path.name for path in site.glob("staged-*")} == {f"staged-{node}" for node in first | second}
    assert f"slurm: finished: {site}/runs/bad" in job.log


def _nodes(text: str) -> set[str]:
    """n[1,3-4] as names."""
    parts = [part.split("-") for part in re.sub(r"[n\[\]]", "", text).split(",")]
    return {f"n{i}" for part in parts for i in range(int(part[0]), int(part[-1]) + 1)}
