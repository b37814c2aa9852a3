"""The process group: one process, or many under torchrun. There is always a group, so all code paths are the same."""

import ctypes
import faulthandler
import logging
import os
import resource
import signal
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from trainer.ops.ending import Stopped, exit_code, exit_without_cleanup
from trainer.ops.numa import bind
from trainer.ops.peers import PeerMonitor

log = logging.getLogger(__name__)

# All CUDA graphs: NCCL ends a communicator only after every graph that has captured its collectives.
graphs: "weakref.WeakSet[Any]" = weakref.WeakSet()

_LEAVE_SECONDS = 60  # for leaving the process group
_MAX_OPEN_FILES = 2**20
# Groups that connect each rank to every other one: the default group, and those of checkpoints and of SyncBatchNorm.
_GLOO_GROUPS = 3


class RankInfo(NamedTuple):
    """This process among all processes.

    Attributes:
        device: The device that it computes on.
        rank: Its rank among all processes.
        world_size: Number of processes.
        local_world_size: Number of processes on this machine.
        local_rank: Its rank among the processes on this machine.
    """

    device: torch.device
    rank: int
    world_size: int
    local_world_size: int
    local_rank: int = 0


class LaunchVariables(NamedTuple):
    """The environment variables of torchrun; see `RankInfo`."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def read_launch_variables() -> LaunchVariables:
    """Read the variables that torchrun sets. Variables that are not set, or empty, mean a single process.

    Raises:
        ValueError: They contradict each other, for example because a shell still has some of another program.
    """
    values = {}
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
        text = os.environ.get(name, "").strip()
        if text and not text.isdecimal():
            raise ValueError(f"{name}={text} is not a number. {_ADVICE}")
        values[name] = int(text or default)
    found = LaunchVariables(*values.values())
    if found.world_size < 1 or found.local_world_size < 1:
        raise ValueError(f"WORLD_SIZE={found.world_size} and LOCAL_WORLD_SIZE={found.local_world_size}: need 1 or more")
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if values[rank] >= values[size]:
            given = f"{size}={values[size]}" if os.environ.get(size, "").strip() else f"no {size}"
            raise ValueError(f"{rank}={values[rank]} with {given}: {rank} must be less than {size}. {_ADVICE}")
    if found.local_world_size > found.world_size:
        raise ValueError(
            f"LOCAL_WORLD_SIZE={found.local_world_size} is more than WORLD_SIZE={found.world_size}. {_ADVICE}"
        )
    if found.world_size > 1:
        needed = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name, "").strip()]
        if needed:
            raise ValueError(f"WORLD_SIZE={found.world_size}, but {' and '.join(needed)} not set. {_ADVICE}")
        if not (port := os.environ["MASTER_PORT"].strip()).isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"MASTER_PORT={port} is not the number of a port, 1 to 65535")
    return found


_ADVICE = (
    "Start several ranks with torchrun, which sets all of these variables; for a single process `unset RANK WORLD_SIZE "
    "LOCAL_RANK LOCAL_WORLD_SIZE`"
)


@contextmanager
def process_group(device: str) -> Iterator[RankInfo]:
    """Join the process group that torchrun's environment describes, or create a group of one process.

    A rank that leaves it with an error makes the others exit, and its own process must end; see `trainer.ops.ending`.

    Args:
        device: Auto (a GPU if there is one), cpu or cuda.

    Raises:
        ValueError: The environment does not describe a group, the other ranks cannot be reached, this rank has no GPU
            although one is needed, or the machine's driver is too old.
    """
    _stop_with_torchrun()
    launch = read_launch_variables()
    for name in (*LaunchVariables._fields, "master_addr", "master_port"):
        if not os.environ.get(name.upper(), "").strip():
            os.environ.pop(name.upper(), None)  # libraries would read an empty one as a number
    rank, world_size = launch.rank, launch.world_size
    own, backend = _choose_device(device, launch)
    raise_file_limit()
    _warn_of_separate_tasks(world_size)
    try:
        store = _make_store(rank, world_size)
        # The timeout ends a job that lost a rank within the hour and is long enough to index millions of files.
        dist.init_process_group(
            backend, timeout=timedelta(minutes=30), store=dist.PrefixStore("trainer", store), rank=rank,
            world_size=world_size,
        )  # fmt: skip
    except RuntimeError as error:
        where = f"rank {rank} of {world_size} at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        hint = ": another program uses this port, choose another MASTER_PORT" if "EADDRINUSE" in str(error) else ""
        raise ValueError(f"{where} cannot join the other ranks{hint}: {str(error).splitlines()[0]}") from error
    monitor = PeerMonitor(store, rank) if world_size > 1 else None
    try:
        yield RankInfo(own, rank, world_size, launch.local_world_size, launch.local_rank)
    except BaseException as error:
        if monitor is None:
            _destroy_group()
        else:
            _abandon_group(monitor, error, own)
        raise
    if monitor is None:
        _destroy_group()
        return
    monitor.close()
    with _ends_in_time():
        _destroy_group()


def _choose_device(device: str, launch: LaunchVariables) -> tuple[torch.device, str]:
    """Return this rank's device and the backends of the group. Raises ValueError if there is no such device."""
    if device == "auto":
        if torch.cuda.device_count() > 0 and not torch.cuda.is_available():
            raise ValueError(
                f"run.device: this machine has GPUs, but its driver is too old for torch {torch.__version__}; "
                "run.device=cpu trains without them"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu"), "gloo"
    if launch.local_rank >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise ValueError(f"run.device: cuda, but this machine has {gpus} GPUs for {launch.local_world_size} ranks")
    torch.cuda.set_device(launch.local_rank)
    bind(launch.local_rank, launch.local_world_size)
    torch.backends.cudnn.benchmark = True  # batches keep their shapes, so one search finds the fastest convolutions
    return torch.device("cuda", launch.local_rank), "cpu:gloo,cuda:nccl"


def _make_store(rank: int, world_size: int) -> dist.Store:
    if world_size == 1:
        return dist.HashStore()
    store: dist.Store = next(iter(dist.rendezvous("env://", rank, world_size)))[0]
    return store


def _abandon_group(monitor: PeerMonitor, error: BaseException, device: torch.device) -> None:
    """End the other ranks after an error of this one, which leaves its group as it is.

    Destroying it would wait for the other ranks, which wait for this one in a collective.
    """
    exit_without_cleanup()
    with _ends_in_time():
        if isinstance(error, RuntimeError):
            monitor.follow()
        reason = " ".join(str(error).split()) or type(error).__name__
        monitor.announce(exit_code() if isinstance(error, Stopped) else 1, reason[:500])
        if device.type == "cuda":
            _forget_graphs()
            dist.distributed_c10d._abort_process_group()  # ends the kernels of collectives that this rank is in


def _destroy_group() -> None:
    _forget_graphs()
    dist.destroy_process_group()


def _forget_graphs() -> None:
    for graph in graphs:
        graph.reset()


@contextmanager
def _ends_in_time() -> Iterator[None]:
    """End the process, with the stacks of its threads on stderr, if the `with` block hangs.

    The block may hold Python's lock while it hangs, so a thread of Python could not end it.
    """
    faulthandler.dump_traceback_later(_LEAVE_SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard limit, and return it: gloo connects each rank to every other."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return _MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft


def files_needed(world_size: int) -> int:
    """Return an upper bound of the files and sockets that rank 0 has open, without those of the data loader's workers.

    Without torchrun, rank 0 also has the store, to which each rank has two connections.
    """
    return (_GLOO_GROUPS + 2) * world_size + 256


def _warn_of_separate_tasks(world_size: int) -> None:
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    if world_size == 1 and "WORLD_SIZE" not in os.environ and tasks.isdecimal() and int(tasks) > 1:
        log.warning("srun has started %s tasks, and each is a run of its own. For one run start torchrun", tasks)


def _stop_with_torchrun() -> None:
    """Ask the kernel for a SIGTERM when torchrun ends: nobody else stops the ranks of a torchrun that was killed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def raise_on_all_ranks(error: str | None) -> None:
    """Raise ValueError on all ranks if any rank has an error, with the text and number of the first such rank."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank, text in enumerate(errors):
        if text is not None:
            raise ValueError(text if len(errors) == 1 else f"rank {rank}: {text}")
