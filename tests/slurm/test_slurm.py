"""The shipped scripts, as they are, in a real SLURM: stopped jobs go on as if they had not been; arrays and studies."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import FINAL, SMALL, STEPS, Job, began_at, newest, pending, weights
from tests.test_docs import write_examples
from tests.trainer.small import PYTHON
from trainer.config_file import load


def time_limit(cluster: Cluster, site: Path) -> tuple[Job, Path]:
    """The limit is set to the minute when training is in progress, and the ranks are held until the signal comes."""
    run = site / "runs" / "limited"
    job = Job(cluster, site, "--time=60", "--signal=B:USR1@1", f"run.dir={run}")
    job.in_progress(run)
    minutes = int(re.findall(r"(\d+):\d+$", cluster("squeue", "-h", "-j", job.id, "-o", "%M"))[0])
    cluster("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes + 1}")
    job.says("USR1: asking all ranks to save and stop")
    job.send(signal.SIGCONT)
    job.says("requeued: stopped in good order")
    cluster("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    job.ends()
    return job, run


@pytest.fixture(scope="module")
def limited(cluster: Cluster, site: Path) -> Iterator[Future[tuple[Job, Path]]]:
    """It takes more than a minute of waiting: beside the other tests."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(time_limit, cluster, site)


@pytest.mark.slow
@pytest.mark.usefixtures("limited")  # before `undisturbed`
def test_a_signal_saves_and_requeues(
    cluster: Cluster, make_site: Callable[[], Path], undisturbed: dict[str, str]
) -> None:
    """And the restart runs the code and configuration of the submission."""
    site = make_site()
    run = site / "runs" / "small"
    job = Job(cluster, site, by_hand=True)
    (site / "trainer" / "pretrain.py").write_text("raise SystemExit('edited')")
    (site / "slurm" / "run.sh").write_text("exit 1")
    (site / "configs" / "small.yaml").unlink()
    step = job.in_progress(run)
    job.interrupt()
    job.says("requeued: stopped in good order")
    job.ends()
    (stopped,) = (int(s) for s in re.findall(r"good order at step (\d+) \(SIGUSR1\)", job.log))
    assert step <= stopped <= step + 50  # 10 until the next checkpoint, and two votes
    assert began_at(job.log) == [stopped]
    assert weights(run) == undisturbed


@pytest.mark.slow
def test_an_array_has_a_seed_and_a_folder_for_each_task(cluster: Cluster, site: Path) -> None:
    """Both at once on one host: their ports do not collide."""
    Job(cluster, site, "--nodes=1", "--array=1-2", "--nodelist=n4", "run.dir=runs/seeds", "run.epochs=6")
    runs = [site / "runs" / f"seeds-{seed}" for seed in (1, 2)]
    cluster.until(lambda: all((run / "results.json").exists() for run in runs), "the end of both")
    assert ["seed: 1" in (run / "config.yaml").read_text() for run in runs] == [True, False]
    manifests = [(run / "checkpoints/step-00000036/manifest.json").read_text() for run in runs]
    assert manifests[0] != manifests[1]


@pytest.mark.slow
def test_each_task_of_an_array_is_requeued_alone(cluster: Cluster, site: Path) -> None:
    """Also the one whose number is that of the array."""
    job = Job(cluster, site, "--nodes=1", "--array=1-2", "run.dir=runs/tasks")
    runs = [site / "runs" / f"tasks-{task}" for task in (1, 2)]
    cluster.until(lambda: all(newest(run) >= 20 for run in runs), "step 20 of both")
    ranks = cluster.processes(f"SLURM_ARRAY_JOB_ID={job.id}", "RANK=0")
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    assert not any((run / "results.json").exists() for run in runs), "too fast to be interrupted"
    cluster("scancel", "--signal=USR1", job.id)
    cluster.until(lambda: all(pending(pid, signal.SIGUSR1) for pid in ranks), "USR1 at both ranks")
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    cluster.until(lambda: all((run / "results.json").exists() for run in runs), "the end of both")
    logs = [path.read_text() for path in site.glob("adco_800ep-*.log") if "runs/tasks-" in path.read_text()]
    assert ["".join(logs).count(text) for text in ("requeued: stopped in good order", "not requeued")] == [2, 0], logs
    assert ["".join(logs).count(f"slurm: start {i} ") for i in range(3)] == [2, 2, 0]


@pytest.mark.slow
def test_a_sweep_takes_a_line_for_each_task(cluster: Cluster, site: Path) -> None:
    (site / "sweep").write_text("optim.lr=0.1\noptim.lr=0.2 run.seed=7\n")
    Job(
        cluster,
        site,
        "--nodes=1",
        "--gpus-per-node=0",
        "--array=2",
        "run.dir=runs/sweep",
        "run.epochs=1",
        SWEEP="sweep",
    )
    run = site / "runs" / "sweep-2"
    cluster.until(lambda: (run / "results.json").exists(), "the end")
    config = load(run / "config.yaml")
    assert (config.optim.lr, config.run.seed) == (0.2, 7)


@pytest.mark.slow
def test_a_scaling_study_submits_its_sizes(cluster: Cluster, site: Path) -> None:
    study = [PYTHON, "-m", "trainer", "scale"]
    options = [
        "--sizes",
        "1,2",
        "--kind",
        "strong",
        "--steps",
        "2",
        "--warmup",
        "1",
        "--sbatch",
        " ".join(["--hold", *SMALL]),
    ]
    said = cluster(*study, "submit", "configs/small.yaml", "study", *options, cwd=site)
    jobs = re.findall(r"job (\d+): ", said)
    assert len(jobs) == 2
    again = cluster(*study, "submit", "configs/small.yaml", "study", *options, cwd=site)
    assert re.findall(r"job (\d+) is PENDING already", again) == jobs, again
    for job in jobs:
        cluster("scontrol", "release", job)
        cluster.until(lambda job=job: cluster.state(job) in FINAL, f"the end of {job}")  # type: ignore[misc]
        assert cluster.state(job) == "COMPLETED", (site / f"scaling_study-{job}.log").read_text()
    table = cluster(*study, "collect", "study", cwd=site)
    assert re.findall(r"strong +\d+ +(\d+)", table) == ["1", "2"], table  # ranks: all nodes are one host


@pytest.mark.slow
def test_linear_evaluation_saves_and_requeues(cluster: Cluster, site: Path, undisturbed: object) -> None:
    """Of a run that is there, on other data than it names, until a signal and then to the end."""
    run, images = site / "runs" / "undisturbed", load(site / "configs" / "small.yaml").data.train
    settings = ["run.dir=runs/undisturbed", f"data.val={images}", "linear.batch_size=12", "linear.save_every=10"]
    job = Job(cluster, site, *settings, "linear.lr=1", "linear.epochs=30", script="slurm/evaluate.sh", PREFLIGHT="1")
    step = job.in_progress(run / "linear")
    job.interrupt()
    job.says("requeued: stopped in good order")
    job.ends()
    (stopped,) = (int(s) for s in re.findall(r"good order at step (\d+) \(SIGUSR1\)", job.log))
    assert step <= stopped <= step + 50  # 10 until the next checkpoint, and two votes
    assert f"slurm: finished: {site}/runs/undisturbed/linear" in job.log
    results = json.loads((run / "linear" / "results.json").read_text())
    assert (results["ranks"], results["images"], results["step"]) == (2, 72, STEPS)
    assert results["top1"] > 0.9
    steps = [json.loads(line)["step"] for line in (run / "linear" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted({*range(10, STEPS + 1, 10), stopped})

    other = Job(cluster, site, *settings, "linear.lr=2", script="slurm/evaluate.sh", MAX_FAILURES="1")
    other.ends("FAILED")
    assert "holds another evaluation" in other.log
    assert "finished" not in other.log, "the results there are those of the evaluation before"


@pytest.mark.slow
def test_an_array_of_fine_tunings_has_a_seed_for_each_task(cluster: Cluster, site: Path, undisturbed: object) -> None:
    run, images = site / "runs" / "undisturbed", load(site / "configs" / "small.yaml").data.train
    data = ["run.dir=runs/undisturbed", f"data.val={images}"]
    settings = ["finetune.labels=0.5", "finetune.batch_size=12", "finetune.epochs=1"]
    script, options = "slurm/evaluate.sh", ["--nodes=1", "--array=1-2"]
    Job(cluster, site, *options, *data, *settings, script=script, VERB="finetune")
    Job(cluster, site, *options, *data, script=script, VERB="knn", NAME="neighbours")
    write_examples(site)
    Job(cluster, site, *options, *data, script=script, VERB="my_evaluation.py:EVALUATOR")
    folders = [run / f"{name}-{task}" for name in ("finetune", "neighbours", "my_evaluation") for task in (1, 2)]
    cluster.until(lambda: all((folder / "results.json").exists() for folder in folders), "the results of all tasks")
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert [[result["seed"] for result in found["seeds"]] for found in results[:2]] == [[1], [2]]
    assert results[2]["knn"] == results[3]["knn"], "kNN draws nothing at random"
    assert results[4]["nearest_mean"] == results[5]["nearest_mean"] > 0.5


@pytest.mark.parametrize("script", ["adco_200ep.sh", "adco_800ep.sh", "evaluate.sh", "scaling_study.sh"])
def test_dry_run(cluster: Cluster, site: Path, script: str) -> None:
    """With nothing on the sbatch line but the number of nodes, and with a larger one than there is."""
    cluster("sbatch", "--test-only", "--nodes=4", f"slurm/{script}", cwd=site)
    with pytest.raises(AssertionError, match="Requested node configuration is not available"):
        cluster("sbatch", "--test-only", "--nodes=5", f"slurm/{script}", cwd=site)


@pytest.mark.slow
def test_the_time_limit_saves_and_requeues(limited: "Future[tuple[Job, Path]]", undisturbed: dict[str, str]) -> None:
    job, run = limited.result()
    (stopped,) = (int(s) for s in re.findall(r"good order at step (\d+) \(USR1\)", job.log))
    assert began_at(job.log) == [stopped]
    assert weights(run) == undisturbed
