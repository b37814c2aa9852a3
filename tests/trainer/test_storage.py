"""Storage that fails: files that may not be read, disks that are full, reads that fail; with real file systems."""

import io
import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.trainer.small import small_config, write_images
from tests.trainer.storage import command, fill, ranks_command, small_disk, user
from trainer.config_file import dump
from trainer.interop.export import SUFFIXES
from trainer.run import checkpoint
from trainer.run.checkpoint_files import IndexUnpickler
from trainer.run.results import read_rows, write_results

LINEAR = ["linear.epochs=3", "linear.batch_size=12", "linear.save_every=4", "linear.lr=0.1"]


@pytest.fixture(scope="module")
def site() -> Iterator[Path]:
    """A folder that every user may enter, with images and a finished run of 18 steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        umask = os.umask(0o022)
        images = write_images(folder / "images", each=8)
        config = small_config(folder / "run", images, run=run_settings(folder / "run"), data=data(images))
        (folder / "small.yaml").write_text(dump(config))
        code, errors = command("pretrain", folder / "small.yaml")
        os.umask(umask)
        assert code == 0, errors
        import_all_modules(folder)
        yield folder


def import_all_modules(site: Path) -> None:
    """Run verbs once: Python imports modules late, and another user may not be allowed to read its folder."""
    run = copy_run(site, site / "first", [18])
    for arguments in (
        ["knn", run],
        ["linear", run, *LINEAR],
        ["report", run],
        ["embed", run, site / "images", "--out", run / "features.parquet"],
        ["export", run, "--format", "timm", "--out", run / "timm.safetensors"],
    ):
        code, errors = command(*arguments)
        assert code == 0, errors
    shutil.rmtree(run)


def run_settings(folder: Path) -> dict[str, Any]:
    return {"dir": str(folder), "epochs": 9, "device": "cpu", "log_every": 1, "save_every": 4, "keep": 10}


def data(images: Path) -> dict[str, Any]:
    """24 images in batches of 12, so that 9 epochs are 18 steps."""
    return {"train": str(images), "val": str(images), "batch_size": 12, "workers": 0}


def copy_run(site: Path, to: Path, steps: list[int]) -> Path:
    """Copy the run as if it had been killed when it had the checkpoints of `steps`. Every user may write to it."""
    shutil.copytree(site / "run", to)
    (to / "results.json").unlink()
    for path in (to / "checkpoints").iterdir():
        if checkpoint.step_of(path) not in steps:
            shutil.rmtree(path)
    for path in [to, *to.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    return to


@pytest.fixture
def shared(site: Path) -> Iterator[Path]:
    """An empty folder that every user may write to."""
    with tempfile.TemporaryDirectory(dir=site) as name:
        Path(name).chmod(0o777)
        yield Path(name)


def steps(run: Path) -> list[int]:
    return sorted(int(name.removeprefix("step-")) for name in os.listdir(run / "checkpoints"))


# Modes


@pytest.mark.parametrize("umask", [0o027, *(pytest.param(umask, marks=pytest.mark.slow) for umask in (0o022, 0o002))])
def test_every_file_has_the_mode_of_the_umask(site: Path, shared: Path, umask: int) -> None:
    """In a folder of a group whose files are to belong to that group."""
    group = 4321
    os.chown(shared, -1, group)
    shared.chmod(0o2775)
    before = os.umask(umask)
    try:
        config = site / "small.yaml"
        run = shared / "run"
        for arguments in (
            ["pretrain", config, f"run.dir={run}", "run.epochs=1"],
            ["linear", run, *LINEAR],
            ["linear", run, "--fast", "fast.epochs=1", "fast.batch_size=12", "fast.crops=0"],
            ["knn", run],
            ["report", run],
            ["embed", run, site / "images", "--out", shared / "out" / "features.npy"],
            ["embed", run, site / "images", "--out", shared / "out" / "features.parquet", "--points", "0"],
            ["export", run, "--format", "timm", "--out", shared / "out" / "timm.safetensors"],
            ["export", run, "--format", "huggingface", "--out", shared / "out" / "huggingface"],
            ["data", "index", site / "images", shared / "out" / "index.npz"],
        ):
            (shared / "out").mkdir(exist_ok=True)
            code, errors = command(*arguments)
            assert code == 0, errors
        code, errors = command("pretrain", config, f"run.dir={shared / 'bad'}", "optim.lr=1e30")
        assert code == 1
        assert "trainer replay" in errors
    finally:
        os.umask(before)
    paths = list(shared.rglob("*"))
    names = {path.name for path in paths}
    assert {"weights.safetensors", "manifest.json", "index-train.npz", "model.safetensors", "report.html"} <= names
    assert any(name.startswith("batch-") for name in names)
    for path in paths:
        status = path.stat()
        expected = 0o2777 & ~umask if path.is_dir() else 0o666 & ~umask
        assert stat.S_IMODE(status.st_mode) == expected, f"{path} has mode {status.st_mode:o}"
        assert status.st_gid == group, path


def test_another_user_can_use_a_run(site: Path, shared: Path) -> None:
    run = site / "run"
    with user():
        for arguments in (
            ["export", run, "--format", "timm", "--out", shared / "timm.safetensors"],
            ["embed", run, site / "images", "--out", shared / "features.parquet", "--points", "0"],
            ["pretrain", site / "small.yaml", f"run.dir={shared}/new", f"model.weights={run}", "run.epochs=1"],
        ):
            code, errors = command(*arguments)
            assert code == 0, errors


# Checkpoints that cannot be read


@pytest.mark.parametrize(
    "name",
    [
        "weights.safetensors",
        "",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("manifest.json", "__0_0.distcp", "..")),
    ],
)
def test_a_run_refuses_checkpoints_that_it_may_not_read(site: Path, shared: Path, name: str) -> None:
    run = copy_run(site, shared / "run", [4, 8])
    bad = (run / "checkpoints" / "step-00000008" / name).resolve()
    bad.chmod(0)
    with user():
        code, errors = command("pretrain", site / "small.yaml", f"run.dir={run}", "run.keep=1")
    named = bad / "manifest.json" if name == "" else bad
    assert code == 1, errors
    assert f"unreadable: {named}: Permission denied" in errors
    assert "damaged" not in errors
    bad.chmod(0o777)
    assert steps(run) == [4, 8]
    assert not (run / "results.json").exists()
    code, errors = command("pretrain", site / "small.yaml", f"run.dir={run}")
    assert code == 0, errors
    assert f"continuing from {run}/checkpoints/step-00000008" in errors


@pytest.mark.parametrize("verb", ["knn", "linear", "embed", "export", "report", "pretrain"])
def test_every_verb_names_the_file_that_it_may_not_read(site: Path, shared: Path, verb: str) -> None:
    run = copy_run(site, shared / "run", [4, 8])
    bad = run / "checkpoints" / "step-00000008" / "weights.safetensors"
    bad.chmod(0o600)
    further: dict[str, list[str | Path]] = {
        "linear": [*LINEAR],
        "embed": [site / "images", "--out", shared / "features.npy"],
        "export": ["--format", "timm", "--out", shared / "timm.safetensors"],
    }
    arguments = [verb, run, *further.get(verb, [])]
    if verb == "pretrain":
        arguments = [verb, site / "small.yaml", f"run.dir={shared}/new", f"model.weights={run}"]
    with user():
        code, errors = command(*arguments)
    assert code == 1, errors
    assert f"unreadable: {bad}: Permission denied" in errors.splitlines()[-1]
    assert "no usable checkpoint" not in errors


def test_weights_of_an_imported_model_that_may_not_be_read(site: Path, shared: Path) -> None:
    run = shared / "imported"
    run.mkdir()
    shutil.copy(site / "run" / "config.yaml", run)
    shutil.copy(site / "run" / "checkpoints" / "step-00000018" / "weights.safetensors", run)
    (run / "weights.safetensors").chmod(0o600)
    with user():
        code, errors = command("export", run, "--format", "timm", "--out", shared / "timm.safetensors")
    assert code == 1
    assert f"unreadable: {run}/weights.safetensors: Permission denied" in errors


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_several_ranks_refuse_checkpoints_that_they_may_not_read(site: Path, shared: Path, engine: str) -> None:
    run = copy_run(site, shared / "run", [4, 8])
    bad = run / "checkpoints" / "step-00000008" / "weights.safetensors"
    settings = [site / "small.yaml", f"run.dir={run}", f"engine.kind={engine}", "run.keep=1"]
    code, errors = ranks_command("pretrain", *settings, ranks=2, BROKEN_READS=str(bad))
    assert code == 1
    assert f"unreadable: {bad}: Input/output error" in errors
    assert steps(run) == [4, 8]


@pytest.mark.parametrize("verb", ["pretrain", "export", "knn"])
def test_a_read_that_fails(site: Path, shared: Path, verb: str) -> None:
    """The disk fails for a moment. The file is in good order, as the same command shows afterwards."""
    run = copy_run(site, shared / "run", [4, 8])
    bad = run / "checkpoints" / "step-00000008" / "__0_0.distcp"
    arguments: dict[str, list[str | Path]] = {
        "pretrain": ["pretrain", site / "small.yaml", f"run.dir={run}"],
        "export": ["export", run, "--format", "timm", "--out", shared / "timm.safetensors"],
        "knn": ["knn", run],
    }
    code, errors = ranks_command(*arguments[verb], BROKEN_READS=str(bad))
    assert code == 1
    assert f"unreadable: {bad}: Input/output error" in errors
    assert steps(run) == [4, 8]
    assert command(*arguments[verb])[0] == 0


# Checkpoints that are damaged


def truncate(path: Path) -> None:
    (path / "weights.safetensors").write_bytes((path / "weights.safetensors").read_bytes()[:-1])


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(site: Path, shared: Path) -> None:
    run = copy_run(site, shared / "run", [4, 8])
    for step in (4, 8):
        truncate(run / "checkpoints" / f"step-{step:08d}")
    for arguments in (["pretrain", site / "small.yaml", f"run.dir={run}"], ["knn", run], ["report", run]):
        code, errors = command(*arguments)
        assert code == 1, errors
        assert f"{run}/checkpoints has checkpoints, but all of them are damaged" in errors
        assert f"delete {run}/checkpoints to start over" in errors
        assert steps(run) == [4, 8]
    shutil.rmtree(run / "checkpoints")
    assert command("pretrain", site / "small.yaml", f"run.dir={run}")[0] == 0
    assert steps(run) == [4, 8, 12, 16, 18]


def test_an_evaluation_whose_checkpoints_are_all_damaged_does_not_start_over(site: Path, shared: Path) -> None:
    run = copy_run(site, shared / "run", [18])
    assert command("linear", run, *LINEAR)[0] == 0
    (run / "linear" / "results.json").unlink()
    (saved,) = (run / "linear" / "checkpoints").iterdir()
    next(saved.glob("*.distcp")).write_bytes(b"")
    code, errors = command("linear", run, *LINEAR)
    assert code == 1, errors
    assert f"delete {run}/linear/checkpoints to start over" in errors
    assert saved.exists()


def test_a_skipped_checkpoint_is_never_deleted(tmp_path: Path, group: None) -> None:
    state = {"weight": torch.ones(64)}
    for step in (4, 8, 9):
        assert checkpoint.save(tmp_path, step, state, keep=9)
    for step in (8, 9):
        next((tmp_path / f"step-{step:08d}").glob("*.distcp")).write_bytes(b"")
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000004"
    saver = checkpoint.Saver(tmp_path, keep=1, start=4)
    for step in (6, 8, 10):
        saver.start(step, state)
        assert saver.wait()
    assert sorted(map(checkpoint.step_of, tmp_path.iterdir())) == [9, 10]  # 8 was trained again


# Full disks


def test_no_space_for_the_weights(tmp_path: Path, group: None, caplog: pytest.LogCaptureFixture) -> None:
    """The shards fit on the disk, weights.safetensors does not."""
    state = {"student": {"weight": torch.ones(1 << 18)}}
    with small_disk(tmp_path / "disk", kib=1536) as disk:
        assert not checkpoint.save(disk, 1, state, keep=1)
        assert "No space left on device" in caplog.text
        assert "it takes about 2.1 MB" in caplog.text
        assert not list(disk.iterdir())


@pytest.mark.parametrize(
    ("ranks", "engine"),
    [(1, "ddp"), pytest.param(2, "ddp", marks=pytest.mark.slow), pytest.param(2, "fsdp", marks=pytest.mark.slow)],
)
def test_a_last_checkpoint_that_does_not_fit(site: Path, shared: Path, ranks: int, engine: str) -> None:
    with small_disk(shared / "disk", kib=8192) as disk:
        run = copy_run(site, disk / "run", [12])
        ballast = fill(disk, free=200_000)
        arguments = ["pretrain", site / "small.yaml", f"run.dir={run}", f"engine.kind={engine}", "run.keep=1"]
        code, errors = ranks_command(*arguments, ranks=ranks) if ranks > 1 else command(*arguments)
        assert code == 1, errors
        assert f"checkpoint of step 18 not saved in {run}/checkpoints: [Errno 28] No space left on device" in errors
        assert "it takes about 0." in errors
        assert not (run / "results.json").exists()
        assert steps(run) == [12]
        ballast.unlink()
        code, errors = ranks_command(*arguments, ranks=ranks) if ranks > 1 else command(*arguments)
        assert code == 0, errors
        assert f"continuing from {run}/checkpoints/step-00000012" in errors
        assert (run / "results.json").exists()
        assert steps(run) == [18]
        assert [row["step"] for row in read_rows(run / "metrics.jsonl") if "loss" in row] == list(range(1, 19))


def test_a_last_checkpoint_of_an_evaluation_that_does_not_fit(site: Path, shared: Path) -> None:
    with small_disk(shared / "disk", kib=8192) as disk:
        run = copy_run(site, disk / "run", [18])
        ballast = fill(disk, free=20_000)
        code, errors = command("linear", run, *LINEAR)
        assert code == 1, errors
        assert f"checkpoint of step 6 not saved in {run}/linear/checkpoints" in errors
        assert "repeats only the steps after the newest checkpoint" in errors.splitlines()[-1]
        assert not (run / "linear" / "results.json").exists()
        ballast.unlink()
        assert command("linear", run, *LINEAR)[0] == 0
        assert (run / "linear" / "results.json").exists()


@pytest.mark.parametrize("verb", ["pretrain", "linear"])
def test_a_stop_whose_checkpoint_does_not_fit(site: Path, shared: Path, verb: str) -> None:
    with small_disk(shared / "disk", kib=8192) as disk:
        run = copy_run(site, disk / "run", [12] if verb == "pretrain" else [18])
        folder = run if verb == "pretrain" else run / "linear"
        folder.mkdir(exist_ok=True)
        arguments = {
            "pretrain": ["pretrain", site / "small.yaml", f"run.dir={run}"],
            "linear": ["linear", run, *LINEAR],
        }[verb]
        ballast = fill(disk, free=200_000 if verb == "pretrain" else 20_000)
        (folder / "stop").touch()
        code, errors = command(*arguments)
        assert code == 1, errors
        assert "(asked by file), but: checkpoint of step" in errors.splitlines()[-1]
        assert not (folder / "stopped.json").exists()
        assert not (folder / "results.json").exists()
        assert not (folder / "stop").exists(), "the next start must not stop"
        ballast.unlink()
        assert command(*arguments)[0] == 0
        assert (folder / "results.json").exists()


def write_results_on_all_ranks(path: Path) -> str:
    try:
        write_results(path, {"knn": 0.5} if dist.get_rank() == 0 else None)
    except ValueError as error:
        return str(error)
    return ""


def test_results_that_do_not_fit(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=64) as disk:
        ballast = fill(disk, free=0)
        first, second = run_ranks(2, write_results_on_all_ranks, disk / "results.json")
        assert first == second
        assert "No space left on device (17 bytes needed)" in first
        assert f"{disk}/results.json" in first
        assert [path.name for path in disk.iterdir()] == ["ballast"]
        ballast.unlink()
        assert run_ranks(2, write_results_on_all_ranks, disk / "results.json") == ["", ""]


@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_an_export_that_does_not_fit(site: Path, shared: Path, to: str) -> None:
    with small_disk(shared / "disk", kib=64) as disk:
        fill(disk, free=16_384)
        out = disk / f"out{SUFFIXES.get(to, '')}"
        code, errors = command("export", site / "run", "--format", to, "--out", out)
        assert code == 1
        assert "No space left on device" in errors
        assert str(out) in errors
        assert [path.name for path in disk.iterdir()] == ["ballast"]


# Starts


def test_a_first_start_that_fails_does_not_keep_its_folder(site: Path, shared: Path) -> None:
    run = shared / "run"
    for wrong in (["data.train=nowhere"], ["data.batch_size=25"], ["data.val=nowhere", "optim.lr=0.1"]):
        assert command("pretrain", site / "small.yaml", f"run.dir={run}", *wrong)[0] == 1
    code, errors = command("pretrain", site / "small.yaml", f"run.dir={run}", "run.epochs=1")
    assert code == 0, errors
    code, errors = command("pretrain", site / "small.yaml", f"run.dir={run}", "run.epochs=2")
    assert code == 1
    assert "holds another run" in errors


def test_a_configuration_that_a_user_wrote_is_not_replaced(site: Path, shared: Path) -> None:
    text = "# mine\n" + (site / "small.yaml").read_text()
    (shared / "config.yaml").write_text(text)
    code, errors = command("pretrain", shared / "config.yaml", f"run.dir={shared}", "optim.lr=0.1")
    assert code == 1
    assert "holds another run" in errors
    assert (shared / "config.yaml").read_text() == text


def test_an_index_that_python_3_13_wrote() -> None:
    """It has pathlib's classes in the module pathlib._local."""
    name = pickle.SHORT_BINUNICODE + b"\x0epathlib._local" + pickle.SHORT_BINUNICODE + b"\x09PosixPath"
    text = pickle.SHORT_BINUNICODE + b"\x05a/b/c" + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP
    path = IndexUnpickler(io.BytesIO(pickle.PROTO + b"\x04" + name + pickle.STACK_GLOBAL + text)).load()
    assert path == Path("a/b/c")
    other = pickle.SHORT_BINUNICODE + b"\x0epathlib._local" + pickle.SHORT_BINUNICODE + b"\x02os"
    with pytest.raises(pickle.UnpicklingError, match="not allowed"):
        IndexUnpickler(io.BytesIO(pickle.PROTO + b"\x04" + other + pickle.STACK_GLOBAL + pickle.STOP)).load()


def test_a_time_limit_of_an_earlier_job_is_ignored(site: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1700000000")
    code, errors = command("pretrain", site / "small.yaml", f"run.dir={shared}/run", "run.epochs=3")
    assert code == 0, errors
    assert errors.count("SLURM_JOB_END_TIME=1700000000 is in the past and is ignored") == 1
    assert json.loads((shared / "run" / "results.json").read_text())["epochs"] == 3


# The job script

FAKE_SLURM = {
    # Answers `config --get run.dir`; training does what the file `training` says.
    "srun": """
        case "$*" in *" config "*) echo run && exit ;; esac
        source ./training
    """,
    "squeue": "echo RUNNING 1",
    "scontrol": 'echo "$*" >> "${REQUEUED:-requeued}"',
}
# Ask the job's script for a stop and fail once it has passed that on, by the file that it makes.
ASK = "rm -f run/stop; kill -USR1 $(ps -o ppid= -p $PPID); until [ -e run/stop ]; do sleep 0.05; done; exit 1"


def run_job(
    tmp_path: Path, training: str, starts: int = 3, commands: dict[str, str] | None = None, **variables: str
) -> tuple[list[int], str]:
    """Run slurm/run.sh that many times, with further or other fake commands; returns the exit codes and the log."""
    (tmp_path / "bin").mkdir()
    for name, text in (FAKE_SLURM | (commands or {})).items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "training").write_text(training)
    job = tmp_path / "job"
    (job / "code" / "configs").mkdir(parents=True)
    shutil.copytree(Path(__file__).parents[2] / "slurm", job / "code" / "slurm")
    (job / "code" / "slurm" / "env.sh").write_text("srun_options=() container=() head_node=localhost\n")
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "CONFIG": "x.yaml",
        "NAME": "x",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "n1",
        "PREFLIGHT": "0",
        "STOP_SECONDS": "60",
        **variables,
    }
    codes = []
    with (tmp_path / "log").open("w") as log:
        for start in range(starts):
            environment["SLURM_RESTART_COUNT"] = str(start)
            line = ["bash", "job/code/slurm/run.sh", "job"]
            job_script = subprocess.Popen(
                line, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            codes.append(job_script.wait(timeout=300))
            with suppress(ProcessLookupError):
                os.killpg(job_script.pid, signal.SIGKILL)  # as SLURM ends what a batch script leaves behind
    return codes, (tmp_path / "log").read_text()


def test_a_job_that_cannot_save_is_not_requeued_for_ever(tmp_path: Path) -> None:
    """Training has begun, is asked to stop, and fails because it cannot save."""
    codes, log = run_job(tmp_path, f"rm run/stopped.json; {ASK}")
    assert codes == [0, 0, 1], log
    assert (tmp_path / "requeued").read_text().count("requeue 7") == 2
    assert "giving up: training failed with exit code 1 after USR1 asked it to stop; 3 starts in a row" in log


def test_a_stop_before_training_begins_is_no_failure(tmp_path: Path) -> None:
    codes, log = run_job(tmp_path, ASK, starts=4)
    assert codes == [0, 0, 0, 0], log
    assert log.count("requeued: training failed with exit code 1, after USR1 asked to stop") == 4
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "stop"]


def test_a_crash_before_training_begins_is_a_failure(tmp_path: Path) -> None:
    codes, log = run_job(tmp_path, "exit 3")
    assert codes == [0, 0, 1], log
    assert "giving up: training failed with exit code 3; 3 starts in a row without a new checkpoint" in log


@pytest.mark.parametrize("asked", [False, True])
def test_a_job_on_a_full_disk_is_requeued(tmp_path: Path, asked: bool) -> None:
    """Its log, the counter of failures and the file that asks for a stop are on that disk."""
    training = f"""
        rm -f run/stopped.json
        cat /dev/zero > ballast; tr '\\0' ' ' < /dev/zero  # tr fills the last block of the log
        {ASK if asked else "exit 1"}
    """
    with small_disk(tmp_path / "disk", kib=512) as disk:
        codes, log = run_job(disk, training, REQUEUED=f"{tmp_path}/requeued")
        assert shutil.disk_usage(disk).free == 0
    assert codes == [0, 0, 1], log
    assert (tmp_path / "requeued").read_text().count("requeue 7") == 2


def test_the_stop_of_a_job_on_a_full_disk_does_not_stop_its_next_start(tmp_path: Path) -> None:
    """The ranks fail before they have seen the file, so that it is still there."""
    training = f"""
        ls run > {tmp_path}/files
        [[ $SLURM_RESTART_COUNT != 0 ]] && exit
        cat /dev/zero > ballast 2>/dev/null; {ASK}
    """
    with small_disk(tmp_path / "disk", kib=512) as disk:
        run_job(disk, training, starts=2)
    assert (tmp_path / "files").read_text() == "stopped.json\n"


def test_failures_that_cannot_be_counted_end(tmp_path: Path) -> None:
    codes, log = run_job(tmp_path, "exit 3", commands={"ln": "exit 1"})
    assert codes == [0, 0, 1], log


def test_checkpoints_that_a_user_renamed_do_not_count(tmp_path: Path) -> None:
    names = ("step-00000090", "step-00000095.bak", "step-00000095-good", "step-best")
    training = f"cd run; mkdir -p checkpoints/{{{','.join(names)}}}; rm stopped.json; exit 1"
    codes, log = run_job(tmp_path, training, MAX_FAILURES="4")
    assert codes == [0, 0, 0], log
    assert "requeued: training failed with exit code 1, 3 of 4 without a new checkpoint (newest: step 90)" in log


def fails_at_first(times: int, name: str, text: str) -> str:
    """Return a command that SLURM does not answer at its first calls."""
    return f"""
        echo >> {name}-calls
        (($(wc -l < {name}-calls) > {times})) || {{ echo "Socket timed out on send/recv operation" >&2; exit 1; }}
        {text}
    """


def test_a_job_is_requeued_when_slurm_answers_again(tmp_path: Path) -> None:
    commands = {name: fails_at_first(2, name, FAKE_SLURM[name]) for name in ("squeue", "scontrol")}
    codes, log = run_job(tmp_path, "exit 3", starts=1, commands=commands | {"sleep": "exec /bin/sleep 0.1"})
    assert codes == [0], log
    assert "slurm: requeued: training failed with exit code 3" in log
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize("answer", ["COMPLETING 1", "RUNNING 0", ""])
def test_a_job_is_not_requeued_if_slurm_says_that_it_was_cancelled_or_may_not_be(tmp_path: Path, answer: str) -> None:
    codes, log = run_job(tmp_path, "exit 3", starts=1, commands={"squeue": f"echo {answer}"})
    assert codes == [1], log
    assert "slurm: not requeued: training failed with exit code 3" in log
    assert not (tmp_path / "requeued").exists()


def test_a_job_gives_up_if_slurm_never_answers(tmp_path: Path) -> None:
    commands = {"squeue": "exit 1", "sleep": "exec /bin/sleep 0.1"}
    codes, log = run_job(tmp_path, "exit 3", starts=1, commands=commands, ANSWER_SECONDS="1")
    assert codes == [1], log
    assert "slurm: not requeued: training failed with exit code 3" in log


def test_fine_tuning_makes_progress_in_the_directories_of_its_seeds(tmp_path: Path) -> None:
    """Each start fails after a checkpoint of the next seed, whose steps begin at 1 again."""
    training = """
        i=$(ls -d run/x/seed-* 2>/dev/null | wc -l)
        mkdir -p run/x/seed-$i/checkpoints/step-00000090
        rm run/x/stopped.json; exit 1
    """
    codes, log = run_job(tmp_path, training, starts=4, VERB="finetune")
    assert codes == [0, 0, 0, 0], log
    assert "1 of 3 without a new checkpoint (newest: step 360)" in log
