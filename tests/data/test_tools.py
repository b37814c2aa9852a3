"""The commands python -m trainer data index | verify | shard | views."""

import tarfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from data import tools
from data.cpu import render_center
from data.loader import train_batches
from data.sources.base import Source
from data.sources.folder import ImageFolder
from data.sources.open import open_source
from data.views import View
from tests.data.images import write_folder
from tests.data.settings import CPU
from tests.trainer.small import small_config
from trainer.__main__ import app
from trainer.config_file import dump


def run(*words: object) -> tuple[int, list[str]]:
    """Return exit code and lines of `python -m trainer data WORDS`."""
    result = CliRunner().invoke(app, ["data", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout.splitlines()


def content(source: Source) -> Counter[tuple[str, bytes | str]]:
    """Count the images with their classes, regardless of the order."""
    return Counter((source.classes[source.labels[i]], bytes(source.read(i))) for i in range(len(source)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 images in 3 classes."""
    return write_folder(tmp_path / "data")


def test_index(folder: Path, tmp_path: Path) -> None:
    code, (line,) = run("index", folder, tmp_path / "x.npz")
    assert code == 0
    assert line.startswith("24 images in 3 classes, ")
    assert content(open_source(tmp_path / "x.npz")) == content(open_source(folder))
    before = (tmp_path / "x.npz").read_bytes()
    with pytest.raises(ValueError, match=r"x\.npz exists: choose another name"):
        run("index", folder, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == before
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        run("index", folder, tmp_path / "x.idx")


def test_verify(folder: Path, tmp_path: Path) -> None:
    assert run("verify", folder) == (0, ["0 of 24 images cannot be read"])
    (folder / "c2/7.png").write_bytes(b"")
    (folder / "c0/1.png").write_bytes((folder / "c0/1.png").read_bytes()[:-60])
    (folder / "c1/two\nlines.png").write_bytes(b"hello")
    code, lines = run("verify", folder, "--threads", 3, "--out", tmp_path / "good.npz")
    assert code == 1
    assert lines == [
        "c0/1.png: damaged, cut short, or not a PNG",
        "c1/two\\nlines.png: not an image, or of a format that is not supported",
        "c2/7.png: the file is empty",
        "3 of 25 images cannot be read",
    ]
    good = open_source(tmp_path / "good.npz")
    assert len(good) == 22
    assert run("verify", tmp_path / "good.npz") == (0, ["0 of 22 images cannot be read"])
    with pytest.raises(ValueError, match="exists"):
        run("verify", folder, "--out", tmp_path / "good.npz")


def test_verify_needs_more_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "CHUNK", 5)
    folder = write_folder(tmp_path / "data", classes=2, per_class=9)
    (folder / "c1/8.png").write_bytes(b"")
    assert run("verify", folder)[1] == ["c1/8.png: the file is empty", "1 of 18 images cannot be read"]


@pytest.mark.parametrize("samples", [1, 7, 24, 1000])
def test_shards_have_the_same_images(folder: Path, tmp_path: Path, samples: int) -> None:
    (folder / "empty").mkdir()
    (folder / "c0/a.b.png").write_bytes(b"copied without decoding")
    (folder / "c0/0.jpg").write_bytes(b"of the same stem as 0.png")
    code, lines = run("shard", folder, tmp_path / "out", "--samples", samples)
    count = -(-26 // samples)
    assert (code, lines) == (0, [f"26 images in {count} shards: {tmp_path}/out"])
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert [path.name for path in shards] == [f"shard-{k:06d}.tar" for k in range(count)]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in shards} | {"classes.txt"}
    sizes = [len(open_source(shard)) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= samples
    source = open_source(tmp_path / "out")
    assert source.classes == open_source(folder).classes == ["c0", "c1", "c2"]
    assert content(source) == content(open_source(folder))
    if samples == 24:
        labels = source.labels[:13].tolist()
        assert labels != sorted(labels)  # shuffled, so that an order in blocks mixes classes


def test_members_have_webdatasets_layout(folder: Path, tmp_path: Path) -> None:
    (folder / "c0/a.b.png").write_bytes(b"x")
    run("shard", folder, tmp_path / "out")
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        names = tar.getnames()
    keys = [name.rpartition(".")[0] for name in names]
    assert keys[::2] == keys[1::2]
    assert len(set(keys)) == 25
    assert not any("." in key for key in keys)
    assert {name.rpartition(".")[2] for name in names[::2]} == {"png"}
    assert {name.rpartition(".")[2] for name in names[1::2]} == {"cls"}


def test_an_unreadable_first_image_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "c0" / "0.png").unlink()
    (folder / "c0" / "0.png").symlink_to(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=r"0\.png: .*good\.npz"):
        run("shard", folder, tmp_path / "out", "--no-shuffle")


def test_shards_are_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("shard", folder, tmp_path / name, "--samples", 10, "--seed", seed, "--threads", 3)
    a, b, c = ([path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in "abc")
    assert a == b
    assert a != c


def test_shards_of_shards_and_of_an_index(folder: Path, tmp_path: Path) -> None:
    run("shard", folder, tmp_path / "a", "--samples", 10)
    run("index", tmp_path / "a", tmp_path / "a.npz")
    run("shard", tmp_path / "a.npz", tmp_path / "b", "--samples", 5)
    assert content(open_source(tmp_path / "b")) == content(open_source(folder))
    assert len(list((tmp_path / "b").glob("*.tar"))) == 5


def test_shards_in_the_order_of_the_source(tmp_path: Path) -> None:
    rows = [cv2.imencode(".png", np.full((4, 4, 3), i, np.uint8))[1].tobytes() for i in range(9)]
    pq.write_table(pa.table({"image": rows, "label": ["b", "a", "b"] * 3}), tmp_path / "x.parquet", row_group_size=2)
    with pytest.raises(ValueError, match=r"is read in groups of rows.*give --no-shuffle"):
        run("shard", tmp_path / "x.parquet", tmp_path / "out")
    assert run("shard", tmp_path / "x.parquet", tmp_path / "out", "--no-shuffle", "--samples", 4)[0] == 0
    source = open_source(tmp_path / "out")
    assert [source.read(i) for i in range(9)] == rows
    assert [source.classes[k] for k in source.labels] == ["b", "a", "b"] * 3
    assert source.name(3) == "shard-000001.tar/x_parquet/1/1-3.png"


def test_interrupted_work_continues(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = tools._write_shard, []

    def until_the_third(source: Source, samples: NDArray[np.int64], target: Path) -> None:
        written.append(target.name)
        if len(written) == 3:
            target.with_name("." + target.name).write_bytes(b"half")
            raise KeyboardInterrupt
        write(source, samples, target)

    monkeypatch.setattr(tools, "_write_shard", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        tools.write_shards(str(folder), tmp_path / "out", 5, 1, 0)
    assert not (tmp_path / "out").exists()
    finished = {path.name for path in (tmp_path / "out.partial").glob("shard-*.tar")}
    assert finished >= {"shard-000000.tar", "shard-000001.tar"}
    assert "shard-000002.tar" not in finished

    for changed in ({"samples": 6}, {"seed": 1}):
        with pytest.raises(ValueError, match=r"out\.partial belongs to other work, .*Delete or rename it"):
            tools.write_shards(str(folder), tmp_path / "out", **{"samples": 5, "threads": 1, "seed": 0} | changed)

    first = min(path for path in folder.rglob("*") if path.is_file())
    moved = first.rename(first.with_name(f"z-{first.name}"))  # the same number of images, in another order
    with pytest.raises(ValueError, match=r"out\.partial belongs to other work, .*Delete or rename it"):
        tools.write_shards(str(folder), tmp_path / "out", 5, 1, 0)
    moved.rename(first)

    again: list[str] = []

    def noted(source: Source, samples: NDArray[np.int64], target: Path) -> None:
        again.append(target.name)
        write(source, samples, target)

    monkeypatch.setattr(tools, "_write_shard", noted)
    tools.write_shards(str(folder), tmp_path / "out", 5, 2, 0)
    assert finished.isdisjoint(again)
    assert len(finished) + len(again) == 5
    assert not (tmp_path / "out.partial").exists()
    run("shard", folder, tmp_path / "straight", "--samples", 5)
    names = sorted(path.name for path in (tmp_path / "straight").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "straight" / n).read_bytes() for n in names)


def test_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists: choose another name"):
        run("shard", folder, tmp_path / "out")
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"mine\.partial belongs to other work"):
        run("shard", folder, tmp_path / "mine")
    assert (tmp_path / "mine.partial" / "notes.txt").read_text() == "mine"
    with (
        tools._claimed(tmp_path / "used.partial", {}),
        pytest.raises(ValueError, match="another process is writing there"),
        tools._claimed(tmp_path / "used.partial", {}),
    ):
        pass


def test_data_that_cannot_be_sharded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073))
    with pytest.raises(ValueError, match="stores pixels, not encoded images"):
        run("shard", tmp_path / "test_batch.bin", tmp_path / "out")
    with pytest.raises(ValueError, match="only folders of images, tar shards and Arrow files have an index"):
        run("index", tmp_path / "test_batch.bin", tmp_path / "x.npz")
    run("index", folder, tmp_path / "x.npz")
    (folder / "c1/3.png").unlink()
    with pytest.raises(ValueError, match=r"c1/3\.png: No such file.*data verify SRC --out"):
        run("shard", tmp_path / "x.npz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_thousand_images_in_shards(tmp_path: Path) -> None:
    """A folder, its shards and an index of them are the same data set."""
    folder, noise = tmp_path / "data", np.random.default_rng(0)
    for c in range(20):
        (folder / f"c{c:02d}").mkdir(parents=True)
        for i in range(100):
            assert cv2.imwrite(str(folder / f"c{c:02d}" / f"{i}.jpg"), noise.integers(0, 256, (9, 8, 3), np.uint8))
    run("shard", folder, tmp_path / "out", "--samples", 128)
    assert run("verify", tmp_path / "out") == (0, ["0 of 2,000 images cannot be read"])
    source = open_source(tmp_path / "out")
    assert content(source) == content(ImageFolder.scan(folder))
    for shard in range(15):  # any consecutive block has most classes
        assert len(set(source.labels[128 * shard : 128 * shard + 128].tolist())) > 15


def test_views(folder: Path, tmp_path: Path) -> None:
    """Each row shows the image, then its views as in a batch of the loader."""
    views = [View(size=24, scale=(0.5, 1)), View(size=16, scale=(0.2, 0.5))]
    config = small_config(tmp_path, folder, data={"views": [view.model_dump() for view in views]})
    (tmp_path / "config.yaml").write_text(dump(config))
    out = tmp_path / "views.png"
    assert run("views", tmp_path / "config.yaml", out, "--samples", 5) == (0, [str(out)])
    drawn = cv2.imread(str(out), cv2.IMREAD_COLOR_RGB)
    assert drawn is not None
    assert drawn.shape == (5 * 26, 3 * 26, 3)
    source = open_source(str(folder))
    settings = config.data.model_copy(update={"batch_size": 5})
    batch = next(train_batches(source, settings, 0, 0, 1, 0, 1, CPU))
    for i, sample in enumerate(batch.samples.tolist()):
        row = drawn[26 * i :]
        assert np.array_equal(row[:24, :24], render_center(source.image(sample), 24))
        assert np.array_equal(row[:24, 26:50], batch.views[0][i])
        assert np.array_equal(row[:16, 52:68], batch.views[1][i])
    with pytest.raises(ValueError, match="exists: choose another name"):
        run("views", tmp_path / "config.yaml", out)
