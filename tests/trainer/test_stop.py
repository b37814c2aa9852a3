"""Stopping early: every kind of request, that all ranks stop after the same step, and the file for scripts."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.processes import Program, trainer
from tests.ranks import run_ranks
from tests.trainer.evaluations import NARROW, write_run
from tests.trainer.small import write_images
from trainer.__main__ import main
from trainer.distributed import process_group
from trainer.ops import stop
from trainer.ops.stop import StopHandler, Stopped, deadline, interruptible
from trainer.run import checkpoint


def train(folder: Path, ask: str, steps: int = 50) -> tuple[int, str]:
    """Return the steps of this rank and its error message; the last rank requests the stop in step 5."""
    done = 0
    limit = time.time() + 1 if ask == "clock" else None
    with StopHandler(folder, limit, margin=0.5, vote_seconds=0) as end:
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


def train_fast(folder: Path) -> tuple[int, int]:
    """Return the step at which this rank stops and the steps between votes; rank 1 requests the stop in step 50."""
    with StopHandler(folder) as end:
        for step in range(1, 200):
            if step == 50 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            if end.should_stop():
                return step, end.steps_between_votes
    return 200, 0


def test_fast_steps_do_not_vote_each_and_stop_together(tmp_path: Path) -> None:
    ranks = run_ranks(3, train_fast, tmp_path)
    assert ranks == [ranks[0]] * 3
    stopped, steps_between_votes = ranks[0]
    assert steps_between_votes == stop._MAX_STEPS_BETWEEN_VOTES
    assert 50 < stopped <= 50 + 2 * steps_between_votes


@pytest.mark.parametrize(("seconds", "steps"), [(3.0, 1), (0.4, 1), (0.1, 5), (1e-6, 16), (0.0, 16)])
def test_about_two_votes_a_second(seconds: float, steps: int, tmp_path: Path) -> None:
    assert run_ranks(2, plan, tmp_path, seconds) == [steps] * 2


def plan(folder: Path, seconds: float) -> int:
    return StopHandler(folder)._plan(seconds)


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
    with StopHandler(folder) as end:  # one rank votes after every step
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        end.should_stop()
        return "stops" if end.should_stop() else "goes on"


def test_one_request_may_come_as_several_signals(tmp_path: Path) -> None:
    """SLURM signals the rank, and torchrun forwards the signal that it receives itself."""
    assert run_ranks(1, several_signals, tmp_path) == ["stops"]


def work_without_steps(folder: Path, ask: str) -> None:
    with interruptible(folder, time.time() + 1 if ask == "clock" else None, margin=0.5):
        if ask.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, ask))
            os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing
        if ask == "file":
            (folder / "stop").touch()
        time.sleep(60)
    raise AssertionError("not stopped")


@pytest.mark.parametrize("ask", ["SIGTERM", "SIGUSR1", "file", "clock"])
def test_work_without_steps_stops_at_once(tmp_path: Path, group: None, ask: str) -> None:
    """Also if the request comes while it runs: the sleep is interrupted."""
    with pytest.raises(Stopped):
        work_without_steps(tmp_path, ask)
    reason = {"file": "asked by file", "clock": "out of time"}.get(ask, ask)
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"reason": reason}
    assert not (tmp_path / "stop").exists()
    with interruptible(tmp_path, None):
        pass
    assert list(tmp_path.iterdir()) == [], "the next start removes the mark"


def test_a_signal_while_a_checkpoint_is_loaded(tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """DCP takes the interruption for a failure to read."""
    assert checkpoint.save(tmp_path / "checkpoints", 1, {"x": torch.ones(3)}, keep=1)

    def read_data(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint.Reader, "read_data", read_data)
    with pytest.raises(Stopped, match="SIGTERM"), interruptible(tmp_path):
        checkpoint.load(tmp_path / "checkpoints/step-00000001", {"x": torch.zeros(3)})
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"reason": "SIGTERM"}


def test_a_file_is_left_to_the_training_that_follows(tmp_path: Path, group: None) -> None:
    """It saves a checkpoint before it stops."""
    (tmp_path / "stop").touch()
    with interruptible(tmp_path, by_file=False):
        time.sleep(0.5)
    assert (tmp_path / "stop").exists()


@pytest.mark.parametrize("verb", ["pretrain", "knn"])
def test_a_signal_before_training(tmp_path: Path, verb: str) -> None:
    """The process waits for its configuration, which is a pipe."""
    pipe = tmp_path / "config.yaml"
    os.mkfifo(pipe)
    program = Program(trainer, verb, pipe if verb == "pretrain" else tmp_path)
    with pipe.open("w"):  # waits until the process reads
        program.send_signal(signal.SIGTERM)
        code = program.wait(60)
    errors = program.errors
    assert (code, errors.startswith("stopped (SIGTERM)"), errors.count("\n")) == (75, True, 1), errors


IMAGES_THAT_STOP = """
import os, signal
import numpy as np

class Images(list):
    def __getitem__(self, i):
        if i == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(i)

images = Images(np.zeros((9, 20, 20, 3), np.uint8))
"""
BACKBONE_THAT_STOPS = """
import os, signal
from torch import nn

class Backbone(nn.Conv2d):
    num_features = 16

    def __init__(self):
        super().__init__(3, 16, 3)

    def forward(self, x_BCHW):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(x_BCHW).mean((2, 3))
"""


@pytest.mark.parametrize("verb", ["embed", "export"])
def test_a_signal_while_a_file_is_written(
    tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process signals itself: at the eighth image, or in the network that the ONNX exporter traces."""
    (tmp_path / "stops.py").write_text(IMAGES_THAT_STOP if verb == "embed" else BACKBONE_THAT_STOPS)
    images, out = write_images(tmp_path / "images", each=1), tmp_path / "out"
    run = {"epochs": 1, "device": "cpu"}
    own = {"backbone": f"{tmp_path}/stops.py:Backbone", "backbone_args": {}}
    with process_group("cpu"):
        write_run(tmp_path / "run", images, run=run, model=NARROW if verb == "embed" else own, eval={"batch_size": 2})
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    words = {
        "embed": [str(tmp_path / "run"), f"{tmp_path}/stops.py:images", "--out", f"{out}/a.parquet"],
        "export": [str(tmp_path / "run"), "--format", "onnx", "--out", f"{out}/a.onnx"],
    }
    monkeypatch.setattr(sys, "argv", ["trainer", verb, *words[verb]])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 75
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped (SIGTERM)")
    assert not any(out.iterdir()), "neither the file nor a part of it"


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
