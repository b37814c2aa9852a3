"""Checkpoints: loading on other numbers of ranks, damaged and unfinished checkpoints, and the full weights."""

import io
import json
import logging
import os
import pickle
import resource
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.metadata as metadata
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from models.negatives.bank import Bank
from models.negatives.base import BankSettings, make_mesh
from tests.ranks import run_ranks
from tests.trainer.engines import build_train_step, make_config, make_rank_info, train
from trainer.engines.base import unshard
from trainer.run import checkpoint
from trainer.run.checkpoint_files import IndexUnpickler

ROWS, DIM = 7, 3  # no number of ranks here divides ROWS


def make_bank(rows: int = ROWS, dim: int = DIM) -> Bank:
    mesh = make_mesh("sharded", torch.device("cpu"), ranks_per_node=1)
    return Bank(BankSettings(size=rows, weight_decay=0.0), dim, mesh)


def state_of(bank: Bank, step: int) -> dict[str, Any]:
    weight = torch.full((2, 5), float(step))
    return {"student": {"weight": weight}, "bank": bank.state_dict(), "step": torch.tensor(step)}


def save_bank(folder: Path, step: int) -> bool:
    bank = make_bank()
    whole = torch.arange(ROWS * DIM, dtype=torch.float32).view(ROWS, DIM)
    shard = slice(bank.first, bank.first + len(bank.w_KD))
    bank.fill(whole[shard])
    assert bank.v_KD is not None
    bank.v_KD.copy_(-whole[shard])
    return checkpoint.save(folder, step, state_of(bank, step), keep=2)


def load_bank(folder: Path) -> tuple[Tensor, Tensor, Tensor, int]:
    bank = make_bank()
    state = state_of(bank, 0)
    path = checkpoint.newest(folder)
    assert path is not None
    checkpoint.load(path, state)
    assert int(state["step"]) == checkpoint.step_of(path)
    assert bank.v_KD is not None
    return bank.w_KD, bank.v_KD, state["student"]["weight"], int(state["step"])


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (3, 2), (4, 1), (4, 2), (4, 3)])
def test_loads_on_any_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    assert run_ranks(before, save_bank, tmp_path, 30) == [True] * before
    loaded = run_ranks(after, load_bank, tmp_path)
    whole = torch.arange(ROWS * DIM, dtype=torch.float32).view(ROWS, DIM)
    assert torch.equal(torch.cat([w for w, _, _, _ in loaded]), whole)
    assert torch.equal(torch.cat([v for _, v, _, _ in loaded]), -whole)
    for _, _, weight, step in loaded:
        assert step == 30
        assert torch.equal(weight, torch.full((2, 5), 30.0))


def save(folder: Path, step: int, keep: int = 2) -> bool:
    return checkpoint.save(folder, step, {"weight": torch.full((64,), float(step))}, keep)


def load(folder: Path) -> float | None:
    """Return the value in the newest intact checkpoint."""
    path = checkpoint.newest(folder)
    if path is None:
        return None
    state = {"weight": torch.zeros(64)}
    checkpoint.load(path, state)
    return float(state["weight"].mean())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept(tmp_path: Path, group: None) -> None:
    assert load(tmp_path / "none yet") is None
    for step in (5, 10, 15, 20):
        assert save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-00000010", "step-00000015", "step-00000020"]
    assert load(tmp_path) == 20
    assert save(tmp_path, 25, keep=1)
    assert names(tmp_path) == ["step-00000025"]


def test_a_part_of_what_was_saved_can_be_loaded(tmp_path: Path, group: None) -> None:
    checkpoint.save(tmp_path, 1, {"a": torch.ones(3), "b": {"c": torch.ones(4)}}, keep=1)
    state = {"b": {"c": torch.zeros(4)}}
    checkpoint.load(tmp_path / "step-00000001", state)
    assert state["b"]["c"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("state", [{"other": torch.zeros(64)}, {"weight": torch.zeros(63)}], ids=["name", "shape"])
def test_tensors_that_are_not_in_it(tmp_path: Path, group: None, state: dict[str, Any]) -> None:
    save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"checkpoint .*step-00000001: .*(other|weight|size)"):
        checkpoint.load(tmp_path / "step-00000001", state)


def cut(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def lose_file(path: Path) -> None:
    next(path.glob("*.distcp")).unlink()


def garble_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("{")


@pytest.mark.parametrize("damage", [cut, flip, lose_manifest, lose_file, garble_manifest])
def test_a_damaged_one_is_skipped(
    tmp_path: Path, group: None, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    damage(tmp_path / "step-00000020")
    assert load(tmp_path) == 10
    assert "step-00000020 is damaged" in caplog.text
    damage(tmp_path / "step-00000010")
    with pytest.raises(ValueError, match=f"all of them are damaged .* delete {tmp_path} to start over"):
        load(tmp_path)
    assert save(tmp_path, 20)
    assert load(tmp_path) == 20


def test_damaged_ones_do_not_push_out_good_ones(tmp_path: Path, group: None) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    flip(tmp_path / "step-00000020")
    save(tmp_path, 15, keep=1)
    assert load(tmp_path) == 15
    assert names(tmp_path) == ["step-00000015", "step-00000020"]


def test_leftovers_of_a_killed_save(tmp_path: Path, group: None) -> None:
    save(tmp_path, 10)
    for step in ("00000010.replaced", "00000020", "00000030"):
        (tmp_path / f".step-{step}").mkdir()
        (tmp_path / f".step-{step}" / "__0_0.distcp").write_bytes(b"half")
    assert load(tmp_path) == 10
    assert save(tmp_path, 20)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


def fail_while_saving(folder: Path) -> list[str]:
    """Return the checkpoints after an error that follows the start of a save."""
    big = {"student": {"weight": torch.zeros(2**24)}, "step": torch.tensor(1)}
    with suppress(KeyError), checkpoint.Saver(folder, keep=1) as saver:
        saver.start(1, big)
        raise KeyError
    return names(folder)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_error_waits_for_the_checkpoint(tmp_path: Path, world_size: int) -> None:
    assert run_ranks(world_size, fail_while_saving, tmp_path)[0] == ["step-00000001"]


def test_one_that_is_deleted_while_it_is_verified(
    tmp_path: Path, group: None, caplog: pytest.LogCaptureFixture
) -> None:
    """By a run that goes on training: the newer one is taken. The manifest is a pipe, so that the reader waits."""
    save(tmp_path / "folder", 10)
    save(tmp_path / "newer", 20)
    manifest = tmp_path / "folder" / "step-00000010" / "manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)

    def prune() -> None:
        with manifest.open("w") as pipe:
            (tmp_path / "newer" / "step-00000020").rename(tmp_path / "folder" / "step-00000020")
            shutil.rmtree(manifest.parent)
            pipe.write('{"__0_0.distcp": {"bytes": 1, "sha256": "0"}}')

    thread = threading.Thread(target=prune)
    thread.start()
    found = checkpoint.newest(tmp_path / "folder")
    thread.join()
    assert found == tmp_path / "folder" / "step-00000020"
    assert "damaged" not in caplog.text


def fill_disk_of_last_rank(folder: Path) -> tuple[list[bool], list[str], Tensor, list[str]]:
    """Save, save while the disk of the last rank is full, and save again; returns results, files and log messages."""
    messages = []

    def note(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return False

    logging.getLogger("trainer.run.checkpoint").addFilter(note)
    bank = make_bank(1024, 16)  # each rank writes 64 KiB
    first = checkpoint.save(folder, 1, state_of(bank, 1), keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    second = checkpoint.save(folder, 2, state_of(bank, 2), keep=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()  # rank 0 cleans up
    left = names(folder)
    state = state_of(bank, 0)
    path = checkpoint.newest(folder)
    assert path is not None
    checkpoint.load(path, state)
    third = checkpoint.save(folder, 3, state_of(bank, 3), keep=2)
    return [first, second, third], left, state["step"], messages


def test_a_full_disk_on_one_rank(tmp_path: Path) -> None:
    ranks = run_ranks(2, fill_disk_of_last_rank, tmp_path)
    for saved, left, step, _ in ranks:
        assert saved == [True, False, True]
        assert left == ["step-00000001"]
        assert step == 1
    assert names(tmp_path) == ["step-00000001", "step-00000003"]
    (message,), none = ranks[0][3], ranks[1][3]
    assert message.startswith(
        f"checkpoint of step 2 not saved in {tmp_path}: [Errno 27] File too large; it takes about 0.131 MB"
    )
    assert not none


def test_a_folder_that_cannot_be_made(tmp_path: Path, group: None, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert not save(tmp_path / "file", 1)
    assert "checkpoint of step 1 not saved" in caplog.text


def call(module: str, name: str, argument: str) -> bytes:
    """Return a pickle that calls module.name(argument) when it is loaded."""

    def text(value: str) -> bytes:
        return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()

    function = text(module) + text(name) + pickle.STACK_GLOBAL
    return pickle.PROTO + b"\x04" + function + text(argument) + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP


@pytest.mark.parametrize(
    ("module", "name"), [("os", "system"), ("torch.distributed.checkpoint.filesystem", "os.system")]
)
def test_a_forged_index_does_not_run(tmp_path: Path, group: None, module: str, name: str) -> None:
    ran = tmp_path / "ran"
    forged = call(module, name, f"touch '{ran}'")
    pickle.loads(forged)
    assert ran.exists()  # unpickling runs the code
    ran.unlink()
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / ".metadata").write_bytes(forged)
    with pytest.raises(ValueError, match="is not allowed in the index of a checkpoint"):
        checkpoint.load(tmp_path / "step-00000001", {"weight": torch.zeros(64)})
    assert not ran.exists()


def test_an_index_may_look_up_memory_formats_and_nothing_else() -> None:
    """Python 3.11.2, Debian's, pickles the member of an enum as getattr(enum, name); later versions do not."""

    class Attribute:
        def __init__(self, owner: object, name: str) -> None:
            self.arguments = owner, name

        def __reduce__(self) -> tuple[Any, tuple[object, str]]:
            return getattr, self.arguments

    def read(owner: object, name: str) -> object:
        return IndexUnpickler(io.BytesIO(pickle.dumps(Attribute(owner, name)))).load()

    formats = metadata._MEM_FORMAT_ENCODING
    assert read(formats, "TORCH_CHANNELS_LAST") is formats.TORCH_CHANNELS_LAST
    for owner in (metadata.Metadata, torch.Size):
        with pytest.raises(pickle.UnpicklingError, match="is not allowed in the index of a checkpoint"):
            read(owner, "__init__")


def test_folders_of_other_names_are_left_alone(tmp_path: Path, group: None) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000009-good").mkdir()
    save(tmp_path, 100_000_000)
    save(tmp_path, 99_999_999)
    assert checkpoint.newest(tmp_path) == tmp_path / "step-100000000"
    assert (tmp_path / "step-00000009-good").is_dir()


def save_in_background(folder: Path) -> tuple[list[str], list[float], bool]:
    """Start a save, change the state at once, and start the next; returns files and values of the first checkpoint."""
    bank = make_bank()
    bank.fill(torch.ones_like(bank.w_KD))
    state = state_of(bank, 1)
    saver = checkpoint.Saver(folder, keep=2)
    saver.start(1, state)
    state["student"]["weight"].fill_(7)
    bank.fill(torch.full_like(bank.w_KD, 7))
    dist.all_reduce(torch.zeros(1))  # collectives of training continue
    saver.start(2, state)
    done = saver.wait()
    assert saver.wait(), "nothing to wait for"
    loaded = state_of(make_bank(), 0)
    checkpoint.load(folder / "step-00000001", loaded)
    return (
        names(folder),
        [float(loaded["student"]["weight"].mean()), float(loaded["bank"]["w"].to_local().mean())],
        done,
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_holds_the_state_at_the_start_of_the_save(tmp_path: Path, world_size: int) -> None:
    for found, values, done in run_ranks(world_size, save_in_background, tmp_path):
        assert found == ["step-00000001", "step-00000002"]
        assert values == [1, 1]
        assert done


FILTER = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)


def save_weights(folder: Path) -> None:
    mesh = make_mesh("sharded", torch.device("cpu"), ranks_per_node=1)["shard"]
    rows = torch.arange(12.0).view(6, 2)
    state = {
        "student": {"cut": distribute_tensor(rows, mesh, [Shard(0)]), "filter": FILTER},
        "teacher": {"cut": distribute_tensor(-rows, mesh, [Shard(0)])},
        "step": torch.tensor(3),
    }  # fmt: skip
    assert checkpoint.save(folder, 3, state, keep=1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_full_weights(tmp_path: Path, world_size: int) -> None:
    run_ranks(world_size, save_weights, tmp_path)
    weights = load_file(tmp_path / "step-00000003" / checkpoint.WEIGHTS)
    assert weights.keys() == {"student.cut", "student.filter", "teacher.cut"}
    assert torch.equal(weights["student.cut"], torch.arange(12.0).view(6, 2))
    assert torch.equal(weights["teacher.cut"], -weights["student.cut"])
    manifest = json.loads((tmp_path / "step-00000003/manifest.json").read_text())
    assert sorted(manifest) == sorted(
        p.name for p in (tmp_path / "step-00000003").iterdir() if p.name != "manifest.json"
    )


def save_engine(folder: Path, engine: dict[str, Any]) -> dict[str, Tensor]:
    """Train a step, start a save, and train another step; returns the weights at the start of the save."""
    config = make_config("resnet", engine=engine)
    train_step = build_train_step(config, make_rank_info(ranks_per_node=2))
    train(train_step, config, 1)
    weights = {
        f"{network}.{name}": x.clone()
        for network, tensors in train_step.engine.weights().items()
        for name, x in unshard(tensors).items()
    }
    state = train_step.state(1)
    saver = checkpoint.Saver(folder, keep=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", None)  # the training thread must not gather the weights
        saver.start(1, state)
    train(train_step, config, 1, first=1)
    assert saver.wait()
    return weights


@pytest.mark.parametrize(
    ("world_size", "engine"),
    [
        (2, {"kind": "ddp"}),
        pytest.param(4, {"kind": "fsdp", "placement": "node"}, marks=pytest.mark.slow),
        pytest.param(2, {"kind": "deepspeed", "stage": 1}, marks=pytest.mark.slow),
        pytest.param(2, {"kind": "deepspeed", "stage": 3}, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_full_weights_of_every_engine(tmp_path: Path, world_size: int, engine: dict[str, Any]) -> None:
    expected, *_ = run_ranks(world_size, save_engine, tmp_path, engine)
    saved = load_file(tmp_path / "step-00000001" / checkpoint.WEIGHTS)
    assert saved.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(saved[name], x), name


def every_damage(folder: Path) -> list[str]:
    """Truncate, empty and change each file of the newest checkpoint in turn; returns the checkpoint that is chosen."""
    bank = make_bank()
    for step in (1, 2):
        checkpoint.save(folder, step, state_of(bank, step), keep=2)
    found = []
    files = sorted((folder / "step-00000002").iterdir())
    for file in files:
        content = file.read_bytes()
        for bad in (content[:-1], b"", bytes([content[0] ^ 1]) + content[1:]):
            dist.barrier()
            if dist.get_rank() == 0:
                file.write_bytes(bad)
            dist.barrier()
            path = checkpoint.newest(folder)
            found.append("nothing" if path is None else path.name)
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(content)
        dist.barrier()
    path = checkpoint.newest(folder)
    return [*found, "nothing" if path is None else path.name, str(len(files))]


def test_damage_to_any_file_is_found(tmp_path: Path) -> None:
    for *found, undamaged, files in run_ranks(2, every_damage, tmp_path):
        assert int(files) == 5  # two ranks' tensors, the index, the weights, the manifest
        assert found == ["step-00000001"] * 15
        assert undamaged == "step-00000002"


def test_the_copy_of_a_gpu_s_state_is_complete_before_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        waits = 0

        def synchronize(self) -> None:
            self.waits += 1

    stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    with FakeTensorMode():
        on_gpu = torch.empty(8, 3, 4, 4, device="cuda").contiguous(memory_format=torch.channels_last)
        staged = checkpoint.copy_to_host({"student": {"filter": on_gpu}, "step": torch.tensor(3)})
    assert stream.waits == 1
    assert staged["student"]["filter"].device == torch.device("cpu")
    assert staged["student"]["filter"].is_contiguous()
    x = torch.arange(4.0)
    copy = checkpoint.copy_to_host({"x": x})["x"]
    x += 1
    assert copy.tolist() == [0, 1, 2, 3]
    assert stream.waits == 1
