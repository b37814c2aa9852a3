"""Binding ranks to the cores next to their GPUs, on files like those of /sys."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.settings import DataSettings
from trainer.ops import numa

GPU = torch.device("cuda")


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two nodes of 8 cores each with their second threads; GPUs 0 and 1 at node 0, 2 and 3 at node 1, 4 unknown."""
    for node, cores in enumerate(("0-7,16-23\n", "8-15,24-31\n")):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cores)
    for gpu, node in enumerate((0, 0, 1, 1)):
        folder = tmp_path / f"bus/pci/devices/0000:{0xA0 + gpu:02x}:00.0"
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
    monkeypatch.setattr(numa, "_SYSFS", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(pci_domain_id=0, pci_bus_id=0xA0 + i, pci_device_id=0),
    )
    return tmp_path


@pytest.mark.parametrize(
    ("rank", "nodes", "allowed", "expected"),
    [
        (0, [0, 0, 1, 1], range(32), {*range(8), *range(16, 24)}),
        (3, [0, 0, 1, 1], range(32), {*range(8, 16), *range(24, 32)}),
        (1, [0, 1], range(4, 12), set(range(8, 12))),  # cores of the job only
        (0, [0], range(32), None),  # alone: its data workers need all cores
        (1, [0, 0, 0, 0], range(32), None),  # all ranks would share half of the cores
        (0, [0, 0], range(8), None),  # the job has cores of this node only
        (1, [0, 1], range(8), None),  # the job has no core of this node
        (0, [0, 1], range(10), {*range(8)}),
        (1, [0, 1], range(10), None),  # two cores are less than a share of five
        (1, [0, None], range(32), None),
        (0, [7, 7], range(32), None),  # a node that does not exist
    ],
)
@pytest.mark.usefixtures("sysfs")
def test_choice(rank: int, nodes: list[int | None], allowed: range, expected: set[int] | None) -> None:
    assert numa.choose(rank, nodes, set(allowed)) == expected


@pytest.fixture
def affinity(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """Replace the cores of this process by those of a larger machine."""
    state = {"cores": set(range(32))}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: state["cores"])
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: state.update(cores=cores))
    # Set, so that it is taken away again after the test.
    monkeypatch.setenv(numa.CORES_VARIABLE, "")
    return state


@pytest.mark.usefixtures("sysfs")
def test_a_bound_rank_keeps_its_data_workers(affinity: dict[str, set[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    before = DataSettings(train="none").workers_for(GPU)
    numa.bind(2, 4)
    assert affinity["cores"] == {*range(8, 16), *range(24, 32)}
    assert DataSettings(train="none").workers_for(GPU) == before == 7
    numa.bind(2, 4)  # a second group of the same process
    assert affinity["cores"] == {*range(8, 16), *range(24, 32)}
    assert DataSettings(train="none").workers_for(GPU) == 7


@pytest.mark.usefixtures("sysfs")
def test_a_machine_that_hides_its_nodes(affinity: dict[str, set[int]]) -> None:
    numa.bind(4, 5)
    numa.bind(0, 8)  # there are 5 GPUs
    assert affinity["cores"] == set(range(32))
    assert os.environ[numa.CORES_VARIABLE] == ""
