"""The shipped scripts, as they are, in a real SLURM: every way a job can end, and that training goes on as if it had
not.
"""

import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, check_out, lacking
from tests.trainer.small import PYTHON, small_config, write_images
from trainer.config_file import dump, load

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())

# About half of the tests run on another cluster at the same time.
OTHER_CLUSTER = pytest.mark.xdist_group("other cluster")
SMALL = ("--gpus-per-node=1", "--cpus-per-task=1")
STEPS = 180
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        try:
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def make_site(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a user's copy of the project, with a configuration for two ranks and some seconds."""
    images = write_images(tmp_path_factory.mktemp("pictures") / "images")
    run = {"dir": "runs/small", "epochs": 30, "device": "cpu", "log_every": 10, "save_every": 10, "keep": 2}
    config = small_config(Path("runs"), images, run=run, data={"val": None}, eval={"knn_every": 0})
    return lambda: check_out(tmp_path_factory.mktemp("site"), dump(config))


@pytest.fixture(scope="module")
def site(make_site: Callable[[], Path]) -> Path:
    return make_site()


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


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, site: Path) -> dict[str, str]:
    """The weights of a job that nothing happens to, with its preflight."""
    job = Job(cluster, site, "run.dir=runs/undisturbed", PREFLIGHT="1")
    job.ends()
    assert "2 nodes, 2 ranks; GPUs none" in job.log
    assert "preflight: all nodes are fit" in job.log
    assert "slurm: finished: runs/undisturbed" in job.log
    assert "requeue" not in job.log
    return weights(site / "runs" / "undisturbed")


@OTHER_CLUSTER
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
    assert step <= stopped <= step + 20
    assert began_at(job.log) == [stopped]
    assert weights(run) == undisturbed


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


def test_a_bad_configuration_is_not_started(cluster: Cluster, site: Path) -> None:
    job = Job(cluster, site, "--nodes=1", "run.epoch=3")
    job.ends("FAILED")
    assert "error: runs/slurm" in job.log
    assert "run.epoch: unknown key, did you mean run.epochs?" in job.log
    assert "requeued" not in job.log


@OTHER_CLUSTER
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
    assert "slurm: finished: runs/bad" in job.log


def _nodes(text: str) -> set[str]:
    """n[1,3-4] as names."""
    parts = [part.split("-") for part in re.sub(r"[n\[\]]", "", text).split(",")]
    return {f"n{i}" for part in parts for i in range(int(part[0]), int(part[-1]) + 1)}


@OTHER_CLUSTER
@pytest.mark.slow
def test_a_scaling_study_submits_its_sizes(cluster: Cluster, site: Path) -> None:
    study = [PYTHON, "-m", "trainer", "scale"]
    options = ["--sizes", "1,2", "--kind", "strong", "--steps", "2", "--warmup", "1", "--sbatch", " ".join(SMALL)]
    said = cluster(*study, "submit", "configs/small.yaml", "study", *options, cwd=site)
    jobs = re.findall(r"job (\d+): ", said)
    assert len(jobs) == 2
    for job in jobs:
        cluster.until(lambda job=job: cluster.state(job) in FINAL, f"the end of {job}")  # type: ignore[misc]
        assert cluster.state(job) == "COMPLETED", (site / f"scaling_study-{job}.log").read_text()
    table = cluster(*study, "collect", "study", cwd=site)
    assert re.findall(r"strong +\d+ +(\d+)", table) == ["1", "2"], table  # ranks: all nodes are one host


@OTHER_CLUSTER
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
    assert step <= stopped <= step + 20
    assert "slurm: finished: runs/undisturbed/linear" in job.log
    results = json.loads((run / "linear" / "results.json").read_text())
    assert (results["ranks"], results["images"], results["step"]) == (2, 72, STEPS)
    assert results["top1"] > 0.9
    steps = [json.loads(line)["step"] for line in (run / "linear" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(10, STEPS + 1, 10))

    other = Job(cluster, site, *settings, "linear.lr=2", script="slurm/evaluate.sh", MAX_FAILURES="1")
    other.ends("FAILED")
    assert "holds another evaluation" in other.log
    assert "finished" not in other.log, "the results there are those of the evaluation before"


@OTHER_CLUSTER
@pytest.mark.slow
def test_an_array_of_fine_tunings_has_a_seed_for_each_task(cluster: Cluster, site: Path, undisturbed: object) -> None:
    run, images = site / "runs" / "undisturbed", load(site / "configs" / "small.yaml").data.train
    data = ["run.dir=runs/undisturbed", f"data.val={images}"]
    settings = ["finetune.labels=0.5", "finetune.batch_size=12", "finetune.epochs=1"]
    script, options = "slurm/evaluate.sh", ["--nodes=1", "--array=1-2"]
    Job(cluster, site, *options, *data, *settings, script=script, VERB="finetune")
    Job(cluster, site, *options, *data, script=script, VERB="knn", NAME="neighbours")
    folders = [run / f"{name}-{task}" for name in ("finetune", "neighbours") for task in (1, 2)]
    cluster.until(lambda: all((folder / "results.json").exists() for folder in folders), "the results of all tasks")
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert [[result["seed"] for result in found["seeds"]] for found in results[:2]] == [[1], [2]]
    assert results[2]["knn"] == results[3]["knn"], "kNN draws nothing at random"


@pytest.mark.parametrize("script", ["adco_200ep.sh", "adco_800ep.sh", "evaluate.sh", "scaling_study.sh"])
def test_dry_run(cluster: Cluster, site: Path, script: str) -> None:
    """With nothing on the sbatch line but the number of nodes, and with a larger one than there is."""
    cluster("sbatch", "--test-only", "--nodes=4", f"slurm/{script}", cwd=site)
    with pytest.raises(AssertionError, match="Requested node configuration is not available"):
        cluster("sbatch", "--test-only", "--nodes=5", f"slurm/{script}", cwd=site)


@OTHER_CLUSTER
@pytest.mark.slow
def test_the_time_limit_saves_and_requeues(limited: "Future[tuple[Job, Path]]", undisturbed: dict[str, str]) -> None:
    job, run = limited.result()
    (stopped,) = (int(s) for s in re.findall(r"good order at step (\d+) \(USR1\)", job.log))
    assert began_at(job.log) == [stopped]
    assert weights(run) == undisturbed
