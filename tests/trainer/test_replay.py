"""A step that is not finite: the message, the saved files, and that a replay finds the same."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.processes import start_ranks, trainer
from tests.ranks import run_ranks
from tests.trainer.engines import SIDE, build_train_step, make_config, make_rank_info, train
from tests.trainer.small import small_config, write_images
from trainer.config_file import dump
from trainer.engines.finite import NotFinite
from trainer.ops import replay
from trainer.pretrain import pretrain
from trainer.train_step import Rates


def test_a_run_that_diverges(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", write_images(tmp_path / "images"), optim={"lr": 1e30})
    with pytest.raises(ValueError, match=r"^step 2: not finite: the loss on rank 0, gradient norm nan; ") as refusal:
        pretrain(config)
    facts = json.loads((tmp_path / "run/replay/step-00000002.json").read_text())
    first = ", ".join(map(str, facts["samples"][0][:8]))
    assert f"rank 0 had images {first}, …; python -m trainer replay {tmp_path}/run " in str(refusal.value)
    assert len(facts["samples"][0]) == 12
    text = replay.replay(tmp_path / "run")
    assert "step 2 now: not finite: the loss on rank 0, gradient norm nan; nothing was updated" in text
    assert "not finite: student's output of backbone." in text
    assert not (tmp_path / "run/results.json").exists()


def spoil(folder: Path) -> str:
    """Train a step, then dump one in which rank 1 has a non-finite image."""
    config = make_config("resnet", run={"dir": str(folder)})
    train_step = build_train_step(config, make_rank_info())
    train(train_step, config, steps=1)
    views = [torch.rand(8, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last) for _ in range(3)]
    if dist.get_rank() == 1:
        views[2][3, 0, 5] = torch.inf
    else:
        # A replay does not compile, since it looks between the layers.
        compiled = config.engine.model_copy(update={"compile": "encoder"})
        (folder / "config.yaml").write_text(dump(config.model_copy(update={"engine": compiled})))
    rates, samples = Rates(0.05, 3.0, 0.9), torch.arange(8) + 100 * dist.get_rank()
    with pytest.raises(NotFinite) as refusal:
        train_step.step(views, 7, rates).check()
    return replay.dump(folder, 2, train_step, replay.StepInputs(views, samples, 7, rates), refusal.value)


def test_on_two_ranks(tmp_path: Path) -> None:
    told = run_ranks(2, spoil, tmp_path)
    # Synchronised BatchNorm spreads the value to all ranks.
    assert told[0] == told[1]
    assert "rank 1 had images 100, 101, 102, 103, 104, 105, 106, 107" in told[0]
    again = start_ranks(2, trainer, "replay", tmp_path)
    assert [rank.wait() for rank in again] == [0, 0], again[0].errors
    assert "rank 1, images 100, 101" in again[0].output
    assert f"not finite: {SIDE} values of view 2" in again[0].output
    assert again[1].output == ""
    with pytest.raises(ValueError, match=r"step 2 ran on 2 ranks, got 1"):
        replay.replay(tmp_path)


def test_a_run_without_such_a_step(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(make_config("vit", run={"dir": str(tmp_path)})))
    with pytest.raises(ValueError, match="no step to replay"):
        replay.replay(tmp_path)
