"""The run directory: its lock and configuration, the images of a run, and the list of unreadable ones."""

import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data.sources.folder import ImageFolder
from tests.data.images import write_folder
from tests.ranks import run_ranks
from trainer.config import Config
from trainer.config_file import load
from trainer.distributed import RankInfo, process_group
from trainer.run.directory import claim, read_config
from trainer.run.files import read_json, write_json
from trainer.run.results import read_rows
from trainer.run.sources import open_sources, open_training
from trainer.run.unreadable import UnreadableImages


@pytest.fixture
def rank_info() -> Iterator[RankInfo]:
    with process_group("cpu") as rank_info:
        yield rank_info


def make_config(
    folder: Path, train: Path | str = "images", val: Path | None = None, seed: int = 0, **data: Any
) -> Config:
    sets = {"train": str(train), "val": str(val) if val else None, "batch_size": 4}
    return Config.model_validate({"run": {"dir": str(folder), "epochs": 2, "seed": seed}, "data": sets | data})


def refusal(config: Config, rank_info: RankInfo) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught, claim(config, rank_info):
        pass
    return str(caught.value)


def test_a_new_folder_and_the_same_run_again(tmp_path: Path, rank_info: RankInfo) -> None:
    config = make_config(tmp_path / "runs" / "x")
    for _ in range(2):
        with claim(config, rank_info) as folder:
            assert folder == tmp_path / "runs" / "x"
            assert load(folder / "config.yaml") == config == read_config(folder)
            (folder / "checkpoints").mkdir(exist_ok=True)


def test_another_configuration_is_refused(tmp_path: Path, rank_info: RankInfo) -> None:
    with claim(make_config(tmp_path), rank_info):
        (tmp_path / "metrics.jsonl").touch()
    other = make_config(tmp_path, seed=3, batch_size=8)
    message = refusal(other, rank_info)
    assert message == (
        f"run.dir: {tmp_path} holds another run: run.seed was 0, now 3; data.batch_size was 4, now 8. "
        "Choose another run.dir"
    )
    assert read_config(tmp_path) == make_config(tmp_path)


def test_keys_that_do_not_affect_learning_may_change(tmp_path: Path, rank_info: RankInfo) -> None:
    with claim(make_config(tmp_path / "a"), rank_info):
        pass
    shutil.move(tmp_path / "a", tmp_path / "b")
    values = make_config(tmp_path / "b", workers=0).model_dump()
    values["run"] |= {"log_every": 1, "save_every": 7, "keep": 9, "device": "cpu"}
    values["eval"] |= {"k": 20, "temperature": 0.07, "knn_every": 0}
    config = Config.model_validate(values)
    with claim(config, rank_info) as folder:
        assert read_config(folder) == config


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_files_of_a_run_without_its_configuration(tmp_path: Path, rank_info: RankInfo, name: str) -> None:
    (tmp_path / name).mkdir()
    assert "has files of a run, but no config.yaml" in refusal(make_config(tmp_path), rank_info)
    assert not (tmp_path / "config.yaml").exists()


def test_a_configuration_of_something_else(tmp_path: Path, rank_info: RankInfo) -> None:
    (tmp_path / "config.yaml").write_text("port: 8080\n")
    assert f"{tmp_path}/config.yaml: " in refusal(make_config(tmp_path), rank_info)
    assert (tmp_path / "config.yaml").read_text() == "port: 8080\n"


def test_a_path_that_cannot_be_a_folder(tmp_path: Path, rank_info: RankInfo) -> None:
    (tmp_path / "file").touch()
    assert "cannot be used: Not a directory" in refusal(make_config(tmp_path / "file" / "x"), rank_info)
    assert "cannot be used: File exists" in refusal(make_config(tmp_path / "file"), rank_info)


def test_a_folder_in_use(tmp_path: Path, rank_info: RankInfo) -> None:
    config = make_config(tmp_path)
    with (tmp_path / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert refusal(config, rank_info) == f"another process is using {tmp_path}"
    with claim(config, rank_info):
        assert "another process" in refusal(config, rank_info)
    with claim(config, rank_info):
        pass


def claim_on_all_ranks(config: Config) -> str:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        with claim(config, RankInfo(torch.device("cpu"), rank, world_size, world_size)):
            return ""
    except ValueError as error:
        return str(error)


def test_all_ranks_are_refused(tmp_path: Path) -> None:
    assert run_ranks(2, claim_on_all_ranks, make_config(tmp_path)) == ["", ""]
    (tmp_path / "metrics.jsonl").touch()
    first, second = run_ranks(2, claim_on_all_ranks, make_config(tmp_path, seed=1))
    assert first == second
    assert first.startswith(f"rank 0: run.dir: {tmp_path} holds another run: run.seed")


def claim_a_full_disk(config: Config) -> str:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if dist.get_rank() == 0:
        pytest.MonkeyPatch().setattr("trainer.run.directory.write_atomically", refuse)
    return claim_on_all_ranks(config)


def test_a_full_disk_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(2, claim_a_full_disk, make_config(tmp_path)) == ["rank 0: [Errno 28] No space left on device"] * 2


def test_open_sources(tmp_path: Path, rank_info: RankInfo) -> None:
    images, run = write_folder(tmp_path / "images"), tmp_path / "run"
    some = write_folder(tmp_path / "some", classes=2, per_class=1)
    train, val, more_val = open_sources(make_config(run, images, some).data, run)
    assert (len(train), train.classes) == (24, ["c0", "c1", "c2"])
    assert val is not None
    assert (len(val), val.classes, more_val) == (2, ["c0", "c1"], {})
    assert {path.name for path in run.iterdir()} == {"index-train.npz", "index-val.npz"}
    assert open_sources(make_config(run, images).data, run)[1] is None


def test_images_that_cannot_be_used(tmp_path: Path, rank_info: RankInfo) -> None:
    images, run = write_folder(tmp_path / "images"), tmp_path / "run"
    (tmp_path / "empty").mkdir()
    more = write_folder(tmp_path / "more", classes=4, per_class=1)
    (tmp_path / "file").touch()
    for config, index, words in (
        (make_config(run, tmp_path / "nowhere"), run, r"data: .*nowhere does not exist"),
        (make_config(run, tmp_path / "empty"), run, r"data: .*empty has no images"),
        (make_config(run, images, tmp_path / "empty"), run, r"data: .*empty has no images"),
        (make_config(run, images, more), run, r"data\.val: .*more has classes that .*images does not have: c3"),
        (
            make_config(run, images, images, more_val={"a": str(more)}),
            run,
            r"data\.more_val\.a: .*more has classes that .*images does not have: c3",
        ),
        (make_config(run, images), tmp_path / "file", "data: .*(Not a directory|File exists)"),
    ):
        with pytest.raises(ValueError, match=words):
            open_sources(config.data, index)
    with pytest.raises(ValueError, match=r"data\.batch_size: a batch of 25 images is larger than .*, which has 24"):
        open_training(make_config(run, images, tmp_path / "nowhere", batch_size=25), run)


def open_own_folder(folder: Path) -> str:
    rank = dist.get_rank()
    config = make_config(folder, folder / f"images{rank}")
    try:
        open_sources(config.data, folder / f"run{rank}")
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_must_find_the_same_images(tmp_path: Path) -> None:
    for rank in range(2):
        write_folder(tmp_path / f"images{rank}", per_class=2)
    assert run_ranks(2, open_own_folder, tmp_path) == ["", ""]

    (tmp_path / "images1" / "c2" / "1.png").rename(tmp_path / "images1" / "c0" / "9.png")
    (tmp_path / "run1" / "index-train.npz").unlink()
    first, second = run_ranks(2, open_own_folder, tmp_path)
    assert first == second
    assert first.startswith("rank 1: data.train: this rank finds 6 images in 3 classes")

    shutil.rmtree(tmp_path / "images1")
    first, second = run_ranks(2, open_own_folder, tmp_path)
    assert first == second
    assert "rank 1: data: " in first
    assert "does not exist" in first


def test_unreadable_samples_are_listed_once(
    tmp_path: Path, rank_info: RankInfo, caplog: pytest.LogCaptureFixture
) -> None:
    unreadable = UnreadableImages(tmp_path, rank=3)
    unreadable.add([(7, "a.jpg: the file is empty"), (9, "b.jpg: damaged")])
    unreadable.add([(7, "a.jpg: the file is empty")])
    assert unreadable.total() == 2
    assert caplog.text.count("image 7 cannot be read") == 1

    again = UnreadableImages(tmp_path, rank=3)
    again.add([(9, "b.jpg: damaged"), (11, "c.jpg: damaged")])
    assert again.total() == 3
    lines = (tmp_path / "unreadable-3.txt").read_text().splitlines()
    assert lines == ["7\ta.jpg: the file is empty", "9\tb.jpg: damaged", "11\tc.jpg: damaged"]
    assert UnreadableImages(tmp_path, rank=0).total() == 0


def test_too_many_unreadable_samples(tmp_path: Path, rank_info: RankInfo) -> None:
    unreadable = UnreadableImages(tmp_path, rank=0)
    unreadable.add([(i, "x.jpg: damaged") for i in range(10)])
    unreadable.check_limit(12, 0.01)  # 10 of 1000
    unreadable.add([(3, "x.jpg: damaged"), (10, "x.jpg: damaged")])
    unreadable.check_limit(1200, 0.01)
    for seen in (1099, 12):
        with pytest.raises(ValueError, match=r"\A11 of [^\n]*\Z") as caught:
            unreadable.check_limit(seen, 0.01)
        assert str(caught.value) == (
            f"11 of {seen:,} images cannot be read, more than data.max_unreadable=0.01 allows; "
            f"they are listed in {tmp_path}/unreadable-*.txt"
        )
    # Images that were unreadable in an earlier start may have been repaired.
    again = UnreadableImages(tmp_path, rank=0)
    again.check_limit(12, 0)
    again.add([(3, "x.jpg: damaged")])
    again.check_limit(12, 0.001)
    with pytest.raises(ValueError, match="1 of 12 images"):
        again.check_limit(12, 0)


def count_together(folder: Path) -> list[str]:
    """Return the result of each check: each rank has 4 unreadable images, 2 of them in common, then one rank 7 more."""
    rank = dist.get_rank()
    unreadable = UnreadableImages(folder, rank)
    said = []
    for bad in (range(2 * rank, 2 * rank + 4), range(10, 17) if rank == 1 else range(0), range(0)):
        unreadable.add([(i, "x.jpg: damaged") for i in bad])
        for share in (0.0059, 0.0125):
            try:
                unreadable.check_limit(500, share)
            except ValueError as error:
                said.append(str(error).partition(" images")[0])
            else:
                said.append("")
    return said


def test_unreadable_images_of_all_ranks_count_together(tmp_path: Path) -> None:
    for said in run_ranks(2, count_together, tmp_path):
        assert said == ["6 of 500", "", "13 of 500", "13 of 500", "13 of 500", "13 of 500"]


def scans(folder: Path) -> int:
    """Return how often this rank lists the images."""
    scan, count = ImageFolder.scan, []
    pytest.MonkeyPatch().setattr(ImageFolder, "scan", lambda root: (count.append(1), scan(root))[1])  # type: ignore[func-returns-value]
    open_sources(make_config(folder / "run", folder / "images").data, folder / "run")
    return len(count)


def test_rank_0_lists_the_images_for_all(tmp_path: Path) -> None:
    write_folder(tmp_path / "images")
    assert run_ranks(2, scans, tmp_path) == [1, 0]
    assert run_ranks(2, scans, tmp_path) == [0, 0]


@pytest.mark.parametrize("name", ["two\nlines.jpg", "two\u2028lines.jpg", "latin1-\udce9.jpg", "tab\t.jpg"])
def test_unreadable_samples_with_odd_names(tmp_path: Path, rank_info: RankInfo, name: str) -> None:
    UnreadableImages(tmp_path, rank=0).add([(7, f"{name}: damaged")])
    assert UnreadableImages(tmp_path, rank=0).listed == {7}


def test_small_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run: it has no config\.yaml"):
        read_config(tmp_path)
    assert read_json(tmp_path / "results.json") == {}
    write_json(tmp_path / "results.json", {"knn": 0.5})
    assert read_json(tmp_path / "results.json") == {"knn": 0.5}
    assert read_rows(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": \xff\n{"step": 2}\n')
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert not list(tmp_path.glob(".*"))
