"""The end of one rank ends all others, whatever they wait for, and no process stays behind.

On a GPU a rank that waits in a kernel of NCCL notices nothing of the others; here one sleeps instead.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.processes import start_ranks
from trainer.distributed import process_group
from trainer.ops import peers
from trainer.ops.ending import Stopped, end_process
from trainer.ops.stop import interruptible
from trainer.run import checkpoint


def run(fails: str, waits: str, folder: Path) -> None:
    try:
        run_rank(fails, waits, folder)
    except BaseException as error:
        end_process(error)
        raise


def run_rank(fails: str, waits: str, folder: Path) -> None:
    with process_group("cpu") as rank_info:
        saver = checkpoint.Saver(folder, keep=1)
        dist.barrier()
        if waits == "interruptible":
            peers._NOTICE_SECONDS = 4
            if fails == "killed" and rank_info.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            with interruptible(folder):
                if rank_info.rank == 0:
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(600)
        if rank_info.rank == 1:
            pending = dist.all_reduce(torch.ones(1), async_op=True)  # destroying the group would wait for it  # noqa: F841
            if fails == "checkpoint":  # of which the other rank does not write its part
                checkpoint._END_SECONDS = 1
                with saver:
                    saver.start(1, {"weight": torch.ones(9)})
                    raise ValueError("no images")
            if fails == "thread":
                threading.Thread(target=time.sleep, args=(600,)).start()  # keeps an interpreter alive
            raise Stopped("asked to stop") if fails == "stop" else ValueError("no images")
        if waits == "sleep":
            time.sleep(600)
        dist.all_gather_object([None] * 2, None)


def run_ranks(folder: Path, fails: str, waits: str) -> tuple[list[int], list[str]]:
    """Return the exit code and the standard error of two ranks, without torchrun."""
    ranks = start_ranks(2, run, fails, waits, folder)
    return [rank.wait(120) for rank in ranks], [rank.errors for rank in ranks]


@pytest.mark.parametrize(
    ("fails", "waits", "codes", "reason"),
    [
        ("error", "sleep", [1, 1], "no images"),
        pytest.param("thread", "collective", [1, 1], "no images", marks=pytest.mark.slow),
        ("stop", "sleep", [75, 1], "asked to stop"),
        pytest.param("checkpoint", "sleep", [1, 1], "no images", marks=pytest.mark.slow),
    ],
)
def test_all_ranks_end_with_the_one_that_fails(
    tmp_path: Path, fails: str, waits: str, codes: list[int], reason: str
) -> None:
    found, errors = run_ranks(tmp_path, fails, waits)
    assert found == codes, errors
    assert errors[0].splitlines()[-1] == f"rank 0: rank 1 has ended, so this one ends as well: {reason}"
    assert "Traceback" not in errors[0], "the error of the other rank is the cause"
    assert reason in errors[1].splitlines()[-1]
    assert list(tmp_path.glob("step-*")) == [], "no part of a checkpoint has its name"


def test_one_rank_that_is_asked_to_stop_stops_all(tmp_path: Path) -> None:
    codes, errors = run_ranks(tmp_path, "none", "interruptible")
    assert codes[1] == 75, errors
    reason = "stopped (SIGTERM): the same command starts again"
    assert errors[1] == f"rank 1: rank 0 has ended, so this one ends as well: {reason}\n"
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"reason": "SIGTERM"}


def test_a_stop_because_another_rank_was_killed_is_a_failure(tmp_path: Path) -> None:
    """torchrun then sends SIGTERM to the others."""
    codes, errors = run_ranks(tmp_path, "killed", "interruptible")
    assert codes == [1, -signal.SIGKILL], errors
    assert errors[0].splitlines()[-1] == (
        "ValueError: stopped (SIGTERM), but other ranks do not answer: one has failed"
    )
    assert not (tmp_path / "stopped.json").exists()
