"""The choices behind `auto`."""

import os

import pytest
import torch

from data.settings import DataSettings


def test_backend_and_workers_suit_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    auto = DataSettings(train="none")
    assert (auto.backend_for(cpu), auto.backend_for(gpu)) == ("cpu", "dali")
    assert DataSettings(train="none", backend="dali").backend_for(cpu) == "dali"
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))
    assert (auto.workers_for(cpu), auto.workers_for(gpu)) == (1, 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert auto.workers_for(gpu) == 7
    assert DataSettings(train="none", workers=0).workers_for(gpu) == 0
