"""Starts worker processes, with sockets whose paths are short enough, and counts cores for them."""

import multiprocessing
import os
import tempfile
from multiprocessing.context import ForkServerContext
from multiprocessing.util import get_temp_dir

CORES_VARIABLE = "TRAINER_CORES"  # set by `trainer.ops.numa`
MAX_TMPDIR = 75  # bytes: multiprocessing appends 32, and the kernel limits the path of a socket to 107


def fork_server(preload: list[str]) -> ForkServerContext:
    """Return the context of a fork server that imports the modules `preload`, unless it is running already.

    Fork would copy the locks of running threads (NCCL, gloo, checkpoint writer, CUDA) in any state, and is not safe
    with some network drivers. Spawn would import torch in each process, for seconds. The fork server imports once, in a
    clean process, and forks from there.

    Raises:
        ValueError: TMPDIR is too long for the sockets of processes, and no other folder is writable.
    """
    _use_short_socket_names()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    return context


def _use_short_socket_names() -> None:
    chosen = tempfile.gettempdir()
    if len(chosen.encode()) <= MAX_TMPDIR or "tempdir" in multiprocessing.process.current_process()._config:  # type: ignore[attr-defined]
        return
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        tempfile.tempdir = folder
        try:
            get_temp_dir()  # multiprocessing keeps the folder that it creates here, and deletes it in the end
            return
        except OSError:
            continue
        finally:
            tempfile.tempdir = chosen
    raise ValueError(f"TMPDIR={chosen} is too long for the names of sockets: set one of at most {MAX_TMPDIR} bytes")


def available_cores() -> int:
    """Return the cores that all ranks of this machine share, also after this rank was bound to some of them."""
    return int(os.environ.get(CORES_VARIABLE) or len(os.sched_getaffinity(0)))
