"""Stopping early: every kind of request, that all ranks stop after the same step, and the file for scripts."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.ranks import run_ranks
from trainer.ops import stop
from trainer.ops.stop import StopHandler, Stopped, deadline


def train(folder: Path, ask: str, steps: int = 50) -> tuple[int, str]:
    """Return the steps of this rank and its error message; the last rank requests the stop in step 5."""
    done = 0
    limit = time.time() + 1 if ask == "clock" else None
    with StopHandler(folder, limit, margin=0.5) as end:
        for step in range(1, steps + 1):
            done = step
            if dist.get_rank() == dist.get_world_size() - 1 and step == 5:
                if ask.startswith("SIG"):
                    os.kill(os.getpid(), getattr(signal, ask))
                if ask == "file":
                    (folder / "stop").touch()
            if ask in ("clock", "file"):
                time.sleep(0.02)
            if end.should_stop():
                break
        try:
            if done < steps:
                end.raise_stopped(done)
        except Stopped as error:
            return done, str(error)
    return done, ""


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("ask", ["SIGTERM", "SIGUSR1", "SIGINT", "file", "clock"])
def test_all_ranks_stop_after_the_same_step(tmp_path: Path, ask: str, world_size: int) -> None:
    ranks = run_ranks(world_size, train, tmp_path, ask)
    assert len(set(ranks)) == 1
    done, words = ranks[0]
    reason = {"file": "asked by file", "clock": "out of time"}.get(ask, ask)
    assert words == f"stopped after step {done} ({reason}): the same command resumes the run"
    assert done < 50
    if ask.startswith("SIG"):
        assert done == 6
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"step": done, "reason": reason}
    assert not (tmp_path / "stop").exists(), "or the next start would stop at once"


def test_training_to_the_end_leaves_no_mark(tmp_path: Path) -> None:
    (tmp_path / "stopped.json").write_text("{}")
    assert run_ranks(2, train, tmp_path, "nobody") == [(50, "")] * 2
    assert not (tmp_path / "stopped.json").exists()


def second_signal(folder: Path) -> str:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    with StopHandler(folder):
        os.kill(os.getpid(), signal.SIGINT)
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            return "interrupted"
    return "went on"


def test_a_second_interrupt_is_not_swallowed(tmp_path: Path) -> None:
    assert run_ranks(1, second_signal, tmp_path) == ["interrupted"]


def several_signals(folder: Path) -> str:
    with StopHandler(folder) as end:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        end.should_stop()
        return "stops" if end.should_stop() else "goes on"


def test_one_request_may_come_as_several_signals(tmp_path: Path) -> None:
    """SLURM signals the rank, and torchrun forwards the signal that it receives itself."""
    assert run_ranks(1, several_signals, tmp_path) == ["stops"]


def test_the_earlier_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert deadline(None, 1000.0) is None
    assert deadline(2.0, 1000.0) == 1120
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1060")
    assert deadline(2.0, 1000.0) == 1060
    assert deadline(None, 1000.0) == 1060


def test_torchrun_would_restart_what_does_not_exit_with_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert stop.exit_code() == 75
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert stop.exit_code() == 0
