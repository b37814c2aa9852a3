"""A run belongs to its images: a start on others is refused, a moved folder is not."""

import io
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from data.sources.open import open_source
from tests.data.images import write_folder
from tests.ranks import run_ranks
from tests.trainer.evaluations import evaluate_here, write_run
from tests.trainer.small import small_config, write_images
from tests.trainer.test_run_dir import make_config
from trainer.evaluate import finetune, knn, linear
from trainer.ops.stop import Stopped
from trainer.pretrain import pretrain
from trainer.run.directory import read_config
from trainer.run.files import read_json
from trainer.run.images import describe, difference, fingerprint
from trainer.run.sources import open_sources

pytestmark = pytest.mark.usefixtures("small_group")


def start(run: Path, images: Path, val: Path | None = None, **data: Any) -> None:
    """Open the images as a start of the run does, and leave the run as one that has trained."""
    open_sources(make_config(run, images, val, **data).data, run, record=True)
    (run / "metrics.jsonl").touch()


def refusal(run: Path, images: Path, val: Path | None = None) -> str:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        start(run, images, val)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before, "a refused start changes nothing"
    return str(caught.value)


def add_image(images: Path) -> None:
    shutil.copy(images / "c0" / "0.png", images / "c0" / "more.png")


def remove_image(images: Path) -> None:
    (images / "c0" / "0.png").unlink()


def test_images_behind_a_link(tmp_path: Path) -> None:
    small, large = write_folder(tmp_path / "small", per_class=2), write_folder(tmp_path / "large", per_class=4)
    link, run = tmp_path / "images", tmp_path / "run"
    link.symlink_to(small)
    start(run, link)
    link.unlink()
    link.symlink_to(large)
    message = refusal(run, link)
    assert f"data.train: {link} has changed since {run} was started" in message
    assert "it had 6 images in 3 classes, now 12 images in 3 classes" in message
    assert "data.accept_changed=true" in message
    link.unlink()
    link.symlink_to(small)
    start(run, link)


@pytest.mark.parametrize("change", [add_image, remove_image])
def test_images_added_or_removed(tmp_path: Path, change: object) -> None:
    images, run = write_folder(tmp_path / "images", per_class=2), tmp_path / "run"
    start(run, images)
    change(images)  # type: ignore[operator]
    assert f"it had 6 images in 3 classes, now {7 if change is add_image else 5} images" in refusal(run, images)
    # The list that the run has may be kept instead.
    start(run, run / "index-train.npz")


def test_as_many_images_with_other_names_or_classes(tmp_path: Path) -> None:
    images, run = write_folder(tmp_path / "images", per_class=2), tmp_path / "run"
    start(run, images)
    (images / "c0" / "0.png").rename(images / "c0" / "x.png")
    assert "it had 6 images in 3 classes as now, but other names. Restore" in refusal(run, images)
    (images / "c0" / "x.png").rename(images / "c0" / "0.png")
    start(run, images)
    (images / "c0" / "1.png").rename(images / "c1" / "2.png")
    assert "but other labels, names" in refusal(run, images)


def test_validation_images(tmp_path: Path) -> None:
    images, val, run = write_folder(tmp_path / "images"), write_folder(tmp_path / "val", per_class=1), tmp_path / "run"
    start(run, images)
    start(run, images, val)  # a run may get validation images later
    start(run, images)  # and go without them
    remove_image(val)
    assert "data.val: " in refusal(run, images, val)


def test_further_validation_images(tmp_path: Path) -> None:
    images, val, run = write_folder(tmp_path / "images"), write_folder(tmp_path / "val", per_class=1), tmp_path / "run"
    more: dict[str, Any] = {"more_val": {"a": str(val)}}
    start(run, images, images)
    start(run, images, images, **more)  # a run may get them later
    start(run, images, images)
    remove_image(val)
    with pytest.raises(
        ValueError, match=r"\Adata\.more_val\.a: .*val has changed since .*; accept|\Adata\.more_val\.a: .*"
    ):
        open_sources(make_config(run, images, images, **more).data, run)


def test_a_moved_folder_is_accepted(tmp_path: Path) -> None:
    images, run = write_folder(tmp_path / "images", per_class=2), tmp_path / "run"
    start(run, images)
    shutil.copytree(images, tmp_path / "elsewhere" / "copy")
    start(run, tmp_path / "elsewhere" / "copy")
    images.rename(tmp_path / "renamed")
    start(run, tmp_path / "renamed")
    loose = tmp_path / "renamed" / "c0"  # its class has the name of the folder
    start(tmp_path / "loose", loose)
    start(tmp_path / "loose", loose.rename(tmp_path / "other name"))
    assert read_json(run / "images.json")["accepted"] == []


def test_changed_images_that_the_user_accepts(tmp_path: Path) -> None:
    images, run = write_folder(tmp_path / "images", per_class=2), tmp_path / "run"
    start(run, images)
    before = read_json(run / "images.json")["train"]
    add_image(images)
    start(run, images, accept_changed=True)
    record = read_json(run / "images.json")
    assert record["train"]["images"] == 7
    assert [(entry["set"], entry["before"]) for entry in record["accepted"]] == [("train", before)]
    start(run, images)  # once is enough
    remove_image(images)
    assert "it had 7 images" in refusal(run, images)


def test_a_start_that_failed_does_not_bind_the_run(tmp_path: Path) -> None:
    images, run = write_folder(tmp_path / "images", per_class=2), tmp_path / "run"
    open_sources(make_config(run, images).data, run, record=True)
    add_image(images)
    start(run, images)
    assert read_json(run / "images.json")["train"]["images"] == 7


def test_an_index_follows_its_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, index = write_folder(tmp_path / "images", per_class=2), tmp_path / "index.npz"
    assert len(open_source(images, index)) == 6
    stored = index.read_bytes()
    assert len(open_source(images, index)) == 6
    assert index.read_bytes() == stored
    assert "has changed" not in caplog.text
    add_image(images)
    assert len(open_source(images, index)) == 7
    caplog.set_level("WARNING")
    (images / "c9").mkdir()
    assert len(open_source(index)) == 7
    assert f"{images} may have changed since {index} was written" in caplog.text


def write_tar(path: Path, **members: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_shards_added_and_replaced(tmp_path: Path) -> None:
    shards, run = tmp_path / "shards", tmp_path / "run"
    write_tar(shards / "a-0.tar", x=b"1", y=b"22", z=b"3", w=b"4")
    start(run, shards)
    shards.rename(tmp_path / "moved")
    start(run, tmp_path / "moved")
    write_tar(tmp_path / "moved" / "a-1.tar", v=b"5")
    assert "it had 4 images in 1 classes, now 5" in refusal(run, tmp_path / "moved")
    (tmp_path / "moved" / "a-1.tar").unlink()
    shutil.copytree(tmp_path / "moved", shards)
    write_tar(shards / "a-0.tar", x=b"22", y=b"1", z=b"3", w=b"4")  # another image for each name
    assert "as now, but other sizes" in refusal(run, shards)
    write_tar(shards / "a-0.tar", x=b"x" * 20_000)  # in place, and of another size
    assert "it had 4 images in 1 classes, now 1" in refusal(run, shards)


def test_formats_without_names(tmp_path: Path) -> None:
    """CIFAR, IDX and Parquet: other pixels, labels or files are other images."""
    records = bytearray(np.random.default_rng(0).integers(0, 9, 4 * 3073, np.uint8))
    cifar = tmp_path / "data_batch_1.bin"
    cifar.write_bytes(records)
    idx = tmp_path / "t-images-idx3-ubyte"
    idx.write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0, 0, 2, *range(16)]))
    (tmp_path / "t-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 4, 0, 1, 0, 1]))
    parquet = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [b"1", b"22", b"3", b"4"], "label": [0, 1, 0, 1]}), parquet)
    first = {path: fingerprint(open_source(path)) for path in (cifar, idx, parquet)}
    assert all(describe(found).startswith("4 images") for found in first.values())
    assert first == {path: fingerprint(open_source(path)) for path in first}
    records[-1] ^= 1
    cifar.write_bytes(records)
    idx.write_bytes(idx.read_bytes()[:-1] + b"x")
    pq.write_table(pa.table({"image": [b"1", b"22", b"3", b"456"], "label": [0, 1, 0, 1]}), parquet)
    changed = {path: difference(before, fingerprint(open_source(path))) for path, before in first.items()}
    assert list(changed.values()) == [
        f"{describe(first[path])} as now, but other {what}"
        for path, what in ((cifar, "pixels"), (idx, "pixels"), (parquet, "sizes"))
    ]


def test_a_run_that_trained_on_other_images(tmp_path: Path) -> None:
    """The start of a real run, with its checkpoint, and the setting that accepts is not stored."""
    dist.destroy_process_group()
    try:
        images, folder = write_images(tmp_path / "images", each=8), tmp_path / "run"
        folder.mkdir()
        (folder / "stop").touch()
        with pytest.raises(Stopped):
            pretrain(small_config(folder, images))
        shutil.copy(images / "class-0" / "000.png", images / "class-0" / "more.png")
        with pytest.raises(ValueError, match=r"it had 24 images in 3 classes, now 25 images in 3 classes"):
            pretrain(small_config(folder, images))
        data = {"train": str(images), "val": str(images), "accept_changed": True}
        pretrain(small_config(folder, images, data=data, run={"save_every": 99}))
        assert (folder / "results.json").exists()
        assert not read_config(folder).data.accept_changed
        assert len(read_json(folder / "images.json")["accepted"]) == 2
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_evaluations_belong_to_their_images(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", each=8)
    run = write_run(tmp_path / "run", images, finetune={"epochs": 1, "seeds": [0], "labels": 1.0})
    quick = ["linear.epochs=1", "linear.batch_size=8", "finetune.batch_size=8"]
    evaluators = {"knn": knn.EVALUATOR, "linear": linear.EVALUATOR, "fine": finetune.EVALUATOR}
    first = {name: evaluate_here(evaluator, run, quick, name) for name, evaluator in evaluators.items()}
    moved = images.rename(tmp_path / "moved")
    there = [*quick, f"data.train={moved}", f"data.val={moved}"]
    for name, evaluator in evaluators.items():
        assert evaluate_here(evaluator, run, there, name) == first[name]
    shutil.copy(moved / "class-0" / "000.png", moved / "class-0" / "more.png")
    for name, evaluator in evaluators.items():
        with pytest.raises(ValueError, match=r"holds another evaluation: train.images was 24, now 25;.*another --name"):
            evaluate_here(evaluator, run, there, name)
    assert evaluate_here(knn.EVALUATOR, run, there, "again")["k"] == 5


def test_an_evaluation_of_a_run_whose_images_have_changed(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", each=8)
    run = write_run(tmp_path / "run", images)
    open_sources(read_config(run).data, run, record=True)
    (run / "metrics.jsonl").touch()
    shutil.copy(images / "class-0" / "000.png", images / "class-0" / "more.png")
    with pytest.raises(ValueError, match=r"has changed since .* was started: it had 24 images"):
        evaluate_here(knn.EVALUATOR, run, [])
    assert evaluate_here(knn.EVALUATOR, run, ["data.accept_changed=true"])["k"] == 5


def open_own(folder: Path) -> str:
    rank = dist.get_rank()
    try:
        open_sources(make_config(folder, folder / f"images{rank}").data, folder / f"run{rank}")
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_with_other_names(tmp_path: Path) -> None:
    for rank in range(2):
        write_folder(tmp_path / f"images{rank}", per_class=2)
    assert run_ranks(2, open_own, tmp_path) == ["", ""]
    (tmp_path / "images1" / "c0" / "0.png").rename(tmp_path / "images1" / "c0" / "x.png")
    first, second = run_ranks(2, open_own, tmp_path)
    assert first == second
    assert "rank 1: data.train: this rank finds 6 images in 3 classes, rank 0 6 images" in first
    assert "but other names" in first


def test_a_node_without_the_files_that_were_listed(tmp_path: Path) -> None:
    """A rank of another node reads the stored list; its copy of the folder has the same path and other files."""
    images, run = write_folder(tmp_path / "images", per_class=12), tmp_path / "run"
    start(run, images)
    times = os.stat(images / "c1")
    for i in range(12):
        (images / "c1" / f"{i}.png").unlink()
        os.utime(images / "c1", ns=(times.st_atime_ns, times.st_mtime_ns - 10**9))
        if i == 9:
            start(run, images)  # data.max_unreadable allows ten
    with pytest.raises(ValueError, match=r"data\.train: .*images on .* lacks 12 of 36 images .* such as c1/0"):
        start(run, images)
