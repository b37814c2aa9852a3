"""The run directory: claimed by one process group at a time, tied to one configuration. A new start continues the run.

config.yaml         the resolved configuration
code/               copies of the files of a method or backbone from outside, see `trainer.run.code`
metrics.jsonl       one row for each logging step and each kNN evaluation
tensorboard/        the same rows for TensorBoard
wandb/              the same rows for Weights & Biases, if monitor.wandb is set
checkpoints/        see `trainer.run.checkpoint`
images.json         numbers and hashes of the images, see `trainer.run.images`
index-*.npz         index of the images of a folder or of archives
unreadable-*.txt    images that could not be read, one file for each rank
results.json        results of the finished run
stop                created by a user: the run saves a checkpoint and stops
stopped.json        step and reason, if the run stopped before its last step
stacks-rank-*.txt   stack traces of a process that hung
replay/             inputs and state of a step with a non-finite loss or gradient, see `trainer.ops.replay`
trace.json.gz       trace of run.profile steps, for chrome://tracing or ui.perfetto.dev
report.html         see `trainer.report.run`
NAME/               an evaluation, see `trainer.evaluate.run`

The directory of an imported model has config.yaml, weights.safetensors and imported.json (`trainer.interop.import_`).
"""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from trainer.config import Config
from trainer.config_file import changed_keys, dump, load
from trainer.distributed import RankInfo, raise_on_all_ranks
from trainer.run.code import changed_code, store_code
from trainer.run.files import exists, write_atomically
from trainer.run.images import has_started

IMPORTED = "imported.json"  # in the directory of an imported model: where it is from


def read_config(folder: Path, overrides: list[str] | None = None) -> Config:
    """Read the configuration of the run in `folder`, with overrides. Raises ValueError if there is no run."""
    if not exists(folder / "config.yaml"):
        raise ValueError(f"{folder.absolute()} is not a run: it has no config.yaml")
    return load(folder / "config.yaml", overrides)


@contextmanager
def claim(config: Config, rank_info: RankInfo) -> Iterator[Path]:
    """Lock the run directory, creating it if necessary, and store the configuration in it. Called by all ranks.

    Raises ValueError, on all ranks, if the directory belongs to a run with another configuration, contains something
    else, or is in use.
    """
    with lock_directory(Path(config.run.dir), rank_info, lambda folder: _store_config(folder, config)) as folder:
        raise_on_all_ranks(changed_code(config, folder))  # a rank of another node may have another file
        yield folder


@contextmanager
def lock_directory(folder: Path, rank_info: RankInfo, prepare: Callable[[Path], None]) -> Iterator[Path]:
    """Create and lock a directory for this process group. Called by all ranks.

    Args:
        folder: The directory.
        rank_info: This process.
        prepare: Called on rank 0 once the directory is locked; raises ValueError if the directory must not be used.

    Raises:
        ValueError: On all ranks, if another process holds the lock or `prepare` raises.
    """
    error = None
    with ExitStack() as stack:
        if rank_info.rank == 0:
            try:
                stack.enter_context(_lock(folder))
                prepare(folder)
            except (ValueError, OSError) as cause:
                error = str(cause)
        raise_on_all_ranks(error)
        yield folder


def _lock(folder: Path) -> IO[str]:
    """Return an open file that holds an exclusive lock on the directory until it is closed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process is using {folder}") from error
    except OSError as error:
        problem = "cannot be locked (flock)" if folder.is_dir() else "cannot be used"
        raise ValueError(f"{folder} {problem}: {error.strerror}") from error
    return lock


def _store_config(folder: Path, config: Config) -> None:
    """Write config.yaml. Raises ValueError if the directory belongs to another run.

    A start that failed before its first row of metrics, such as for a wrong data.train, does not keep the directory.
    """
    stored = folder / "config.yaml"
    started = has_started(folder)
    if exists(folder / IMPORTED):
        raise ValueError(f"run.dir: {folder} holds an imported model. Choose another run.dir")
    if exists(stored):
        earlier = load(stored)
        by_user = stored.read_text(encoding="utf-8") != dump(earlier)
        if (changed := changed_keys(earlier, config)) and (started or by_user):
            raise ValueError(f"run.dir: {folder} holds another run: {'; '.join(changed)}. Choose another run.dir")
    elif started:
        raise ValueError(f"run.dir: {folder} has files of a run, but no config.yaml. Choose another run.dir")
    if started and (error := changed_code(config, folder)):
        raise ValueError(error)
    store_code(config, folder)
    # The images are accepted for this start only.
    once = config.data.model_copy(update={"accept_changed": False})
    write_atomically(stored, dump(config.model_copy(update={"data": once})))
