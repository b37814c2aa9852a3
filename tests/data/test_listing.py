"""Listings lose no image and no label: keys, links and odd members of tars, and folders that are no classes."""

import io
import json
import logging
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.sources.base import Source
from data.sources.index import Listing
from data.sources.open import open_source
from tests.data.images import write_folder
from tests.data.test_sources import WRITERS, png, write_tar


def labels_of(source: Source) -> dict[str, str]:
    """Return the class of each image by its name."""
    assert isinstance(source, Listing)
    names = [source.stored_name(i).decode() for i in range(len(source))]
    return {name: source.classes[k] for name, k in zip(names, source.labels.tolist(), strict=True)}


def left_out(caplog: pytest.LogCaptureFixture) -> str:
    """Return the counts in the log line of the last listing."""
    return caplog.messages[-1].partition("; left out: ")[2]


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


# Keys of tar members

KEYS: dict[str, tuple[dict[str, bytes], dict[str, str]]] = {
    "exact names with dots": (
        {"shot.000.jpg": b"", "shot.000.cls": b"a", "shot.001.cls": b"b", "shot.001.jpg": b""},
        {"shot.000.jpg": "a", "shot.001.jpg": "b"},
    ),
    "dots in folders": (
        {"v1.0/0.jpg": b"", "v1.0/0.cls": b"a", "v1.1/0.jpg": b"", "v1.1/0.cls": b"b"},
        {"v1.0/0.jpg": "a", "v1.1/0.jpg": "b"},
    ),
    "several images of a sample": (
        {"0.left.jpg": b"", "0.right.png": b"", "0.cls": b"a", "1.left.jpg": b"", "1.cls": b"b"},
        {"0.left.jpg": "a", "0.right.png": "a", "1.left.jpg": "b"},
    ),
    "a label with a longer ending": ({"0.jpg": b"", "0.class.cls": b"a"}, {"0.jpg": "a"}),
    "an own label before the sample's": (
        {"0.jpg": b"", "0.crop.jpg": b"", "0.json": b'{"label": "a"}', "0.crop.json": b'{"label": "b"}'},
        {"0.jpg": "a", "0.crop.jpg": "b"},
    ),
    "upper case": (
        {"0.JPG": b"", "0.CLS": b"a", "1.Png": b"", "1.Json": b'{"label": "b"}'},
        {"0.JPG": "a", "1.Png": "b"},
    ),
    "dates with dots": (
        {f"2024.01.{day}.jpg": b"" for day in ("01", "02")} | {"2024.01.01.cls": b"a", "2024.01.02.cls": b"b"},
        {"2024.01.01.jpg": "a", "2024.01.02.jpg": "b"},
    ),
    "a label that is a whole number with a fraction": (
        {"0.jpg": b"", "0.json": b'{"label": 7.0}', "1.jpg": b"", "1.cls": b"7"}, {"0.jpg": "7", "1.jpg": "7"}),
}  # fmt: skip


@pytest.mark.parametrize("case", KEYS)
def test_labels_and_images_join_by_their_exact_names_first(tmp_path: Path, case: str) -> None:
    members, expected = KEYS[case]
    assert labels_of(open_source(write_tar(tmp_path / "x.tar", members))) == expected


def test_another_images_label_is_not_borrowed(tmp_path: Path) -> None:
    members = {"shot.000.jpg": b"", "shot.000.cls": b"a", "shot.001.jpg": b""}
    with pytest.raises(ValueError, match="1 of 2 images have no label"):
        open_source(write_tar(tmp_path / "x.tar", members))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0.jpg", "0.a.cls", "0.b.cls"], r"0\.jpg has several labels: 'l1' \(0\.a\.cls\) and 'l2' \(0\.b\.cls\)"),
        (["0.l.jpg", "0.cls", "0.b.cls"], r"0\.l\.jpg has several labels: 'l1' \(0\.cls\) and 'l2' \(0\.b\.cls\)"),
        (["0.jpg", "0.cls", "0.cls"], r"0\.cls has several labels: 'l2' \(0\.cls\) and 'l1' \(an earlier 0\.cls\)"),
    ],
)
def test_two_labels_of_an_image_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for k, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(f"l{k}".encode()))
    with pytest.raises(ValueError, match=rf"x\.tar: {message}"):
        open_source(tmp_path / "x.tar")


def test_equal_keys_in_several_shards(tmp_path: Path) -> None:
    for k in range(3):
        write_tar(tmp_path / f"{k}.tar", {"0.jpg": b"", "0.cls": b"abc"[k : k + 1]})
    source = open_source(tmp_path)
    assert [source.classes[k] for k in source.labels] == ["a", "b", "c"]


# Links and other members of tars


def pack(root: Path, *options: str) -> Path:
    subprocess.run(["tar", *options, "-cf", root / "x.tar", "-C", root, "d"], check=True)
    return root / "x.tar"


@pytest.mark.parametrize("form", ["--format=gnu", "--format=posix", "--format=ustar"])
def test_links_in_a_tar_are_read(tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    """Tar stores a file once, and its other names as hard links; a class may consist of them."""
    folder = write_folder(tmp_path / "d", classes=1, per_class=3)
    (folder / "c1").mkdir()
    (folder / ".store").mkdir()
    for k in range(3):
        os.link(folder / f"c0/{k}.png", folder / f"c1/{k}.png")
        (folder / "c0" / f"{k}.cls").write_text("zero")
        os.link(folder / f"c0/{k}.cls", folder / f".store/{k}")
    (folder / "c1/0.cls").write_text("one")
    os.link(folder / "c1/0.cls", folder / "c1/1.cls")
    (folder / "c1/2.cls").symlink_to("../c1/1.cls")
    (folder / "c2").mkdir()
    (folder / "c2/s.png").symlink_to("../c1/2.png")  # a link to a link
    (folder / "c2/t.png").symlink_to("s.png")
    (folder / "c2/README").symlink_to("../c0/0.cls")
    source = open_source(pack(tmp_path, form))
    expected = {f"d/c{c}/{k}.png": ("zero", "one")[c] for c in range(2) for k in range(3)}
    assert labels_of(source) == expected | {"d/c2/s.png": "c2", "d/c2/t.png": "c2"}
    images = {source.name(i).removeprefix("x.tar/d/"): source.read(i) for i in range(len(source))}
    for name, data in images.items():
        assert data == (folder / name).read_bytes()
    counts = dict(part.split(": ", 1) for part in left_out(caplog).split("; "))
    assert counts.keys() == {"hidden or of the system", "other files"}
    assert counts["other files"] == "1 (such as d/c2/README)"


@pytest.mark.parametrize(
    ("name", "target"),
    [("c/s.png", "/etc/passwd"), ("c/l.png", "../../up.png"), ("0.cls", "gone"), ("b", "c"), ("o.png", "o.png")],
)
def test_links_that_lead_to_no_file_of_the_tar_are_refused(tmp_path: Path, name: str, target: str) -> None:
    with tarfile.open(write_tar(tmp_path / "x.tar", {"c/0.png": png(0)}), "a") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.SYMTYPE, target
        tar.addfile(member)
    with pytest.raises(ValueError, match=rf"x\.tar: {name} is a link to \S+, which is not a file in .*--dereference"):
        open_source(tmp_path / "x.tar")


def test_other_members_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Among them what a Mac puts into archives, and folders of thumbnails and checkpoints."""
    hidden = ["__MACOSX/c/._0.png", "c/._0.png", "c/.thumbnails/0.jpg", ".ipynb_checkpoints/0.png", "c/@eaDir/0.jpg"]
    members = {"./c//0.png": png(0), "c/notes.txt": b"", "c/x.gif": b"", **dict.fromkeys(hidden, b"x")}
    with tarfile.open(write_tar(tmp_path / "x.tar", members), "a") as tar:
        for kind, name in ((tarfile.FIFOTYPE, "c/f.png"), (tarfile.DIRTYPE, "c/d.png")):
            member = tarfile.TarInfo(name)
            member.type = kind
            tar.addfile(member)
    assert labels_of(open_source(tmp_path / "x.tar")) == {"c/0.png": "c"}
    assert left_out(caplog) == (
        "other files: 2 (such as c/notes.txt); hidden or of the system: 5 (such as __MACOSX/c/._0.png); "
        "neither files nor folders: 1 (such as c/f.png)"
    )


@pytest.mark.parametrize("form", ["gnu", "posix", "oldgnu"])
def test_sparse_images_are_refused(tmp_path: Path, form: str) -> None:
    (tmp_path / "d").mkdir()
    with (tmp_path / "d/0.bmp").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x")
    with pytest.raises(ValueError, match=r"d/0\.bmp is stored as a sparse file: pack it without tar --sparse"):
        open_source(pack(tmp_path, "--sparse", f"--format={form}"))


def test_joined_tars_are_refused(tmp_path: Path) -> None:
    """After the end of the first archive, tar and tarfile read nothing."""
    a, b = (write_tar(tmp_path / f"{name}.tar", {f"{name}/0.png": png(0)}) for name in "ab")
    (tmp_path / "joined.tar").write_bytes(a.read_bytes() + b.read_bytes())
    with pytest.raises(ValueError, match=r"joined\.tar is damaged.*more data after the end of the archive"):
        open_source(tmp_path / "joined.tar")
    (tmp_path / "padded.tar").write_bytes(a.read_bytes() + bytes(100_000))
    assert len(open_source(tmp_path / "padded.tar")) == 1


def test_upper_case_names_of_files(tmp_path: Path) -> None:
    write_tar(tmp_path / "TRAIN.TAR", {"c/0.PNG": png(0)})
    assert labels_of(open_source(tmp_path / "TRAIN.TAR")) == labels_of(open_source(tmp_path)) == {"c/0.PNG": "c"}
    pq.write_table(pa.table({"image": [png(1)]}), tmp_path / "x.PARQUET")
    assert open_source(tmp_path / "x.PARQUET").read(0) == png(1)


def test_patterns_in_a_folder_with_brackets(tmp_path: Path) -> None:
    (tmp_path / "set[1]").mkdir()
    for k in range(2):
        write_tar(tmp_path / "set[1]" / f"x-{k}.tar", {"c/0.png": png(k)})
    for pattern in ("x-*.tar", "x-{0..1}.tar", "x-[01].tar"):
        assert len(open_source(tmp_path / "set[1]" / pattern)) == 2
    with pytest.raises(ValueError, match=r"set\[1\]/y-\*\.tar does not exist"):
        open_source(tmp_path / "set[1]" / "y-*.tar")


# Folders

NO_CLASSES = ["empty", "lost+found", "__MACOSX", ".thumbnails", ".ipynb_checkpoints", "@eaDir", "texts"]


def add_no_classes(root: Path) -> None:
    for name in NO_CLASSES:
        (root / name).mkdir()
    for name in NO_CLASSES[1:-1]:
        (root / name / "0.png").write_bytes(png(0))
    (root / "texts" / "a.txt").write_text("")
    (root / "c0" / ".DS_Store").write_text("")
    (root / "c0" / "._0.png").write_text("")


def test_folders_that_are_no_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_no_classes(write_folder(tmp_path, classes=2, per_class=2))
    source = open_source(tmp_path)
    assert source.classes == ["c0", "c1"]
    assert set(labels_of(source)) == {f"c{c}/{k}.png" for c in range(2) for k in range(2)}
    counts = dict(part.split(": ", 1) for part in left_out(caplog).split("; "))
    assert {reason: text.split()[0] for reason, text in counts.items()} == {
        "hidden or of the system": "7",
        "other files": "1",
        "folders without images": "2",
    }
    assert counts["folders without images"] == "2 (such as empty)"
    shutil.copytree(tmp_path / "c0", tmp_path / "c0" / "deep" / ".thumbnails")
    assert len(open_source(tmp_path)) == 4


def test_shards_beside_folders_of_the_system(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"c/0.png": png(0)})
    for name in ("lost+found", "__MACOSX"):
        (tmp_path / name).mkdir()
    assert len(open_source(tmp_path)) == 1


@pytest.mark.parametrize("target", [".", "..", "../c1"])
def test_links_to_folders_end(tmp_path: Path, target: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(tmp_path / "d", classes=2, per_class=2)
    (folder / "c0" / "link").symlink_to(target)
    (folder / "c1" / "back").symlink_to("../c0")
    source = open_source(folder)
    # c0 has what c1 links to, and c1 what c0 does; nothing is listed twice for one class.
    assert len(set(labels_of(source))) == len(source) <= 8
    assert {f"c{c}/{k}.png" for c in range(2) for k in range(2)} <= set(labels_of(source))
    assert "links to a folder above them: " in left_out(caplog)


def test_what_is_no_file_is_no_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Reading a FIFO would wait forever; a link to itself is no folder."""
    write_folder(tmp_path, classes=1, per_class=1)
    os.mkfifo(tmp_path / "c0" / "pipe.png")
    (tmp_path / "c0" / "self").symlink_to("self")
    assert list(labels_of(open_source(tmp_path))) == ["c0/0.png"]
    assert "neither files nor folders: 1 (such as c0/pipe.png)" in left_out(caplog)


# Arrow and Parquet


@pytest.mark.parametrize("kind", WRITERS)
def test_files_that_name_their_classes_differently_are_refused(tmp_path: Path, kind: str) -> None:
    def table(*names: str) -> pa.Table:
        described = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
        columns = {"image": [png(0), png(1)], "label": [0, 1]}
        return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(described)})

    for k in range(2):
        WRITERS[kind](tmp_path / f"data-{k}.{kind}", table("cat", "dog"))
    assert open_source(tmp_path).classes == ["cat", "dog"]
    WRITERS[kind](tmp_path / f"data-1.{kind}", table("dog", "cat"))
    with pytest.raises(ValueError, match=rf"data-1\.{kind}: label 0 is 'dog', but 'cat' in the files before it"):
        open_source(tmp_path)
    WRITERS[kind](tmp_path / f"data-1.{kind}", table("cat", "dog", "cow"))
    with pytest.raises(ValueError, match=rf"data-1\.{kind}: label 2 is 'cow', but no class in the files"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (pa.array([1.0, 0.0, 10.0]), ["0", "1", "10"]),  # as pandas makes of integers with gaps
        (pa.array([b"dog", b"caf\xc3\xa9", b"\xff"]), ["café", "dog", r"\xff"]),
        (pa.array([0.5, 1.5, 0.5]), ["0.5", "1.5"]),
        (pa.array([float("nan"), None, -1.0]), ["x"]),
        (pa.array(["", "-1", None]), ["x"]),
    ],
)
def test_labels_of_other_types(tmp_path: Path, kind: str, labels: pa.Array, classes: list[str]) -> None:
    path = WRITERS[kind](tmp_path / f"x.{kind}", pa.table({"image": [png(k) for k in range(3)], "label": labels}))
    assert [name.removesuffix(f".{kind}") for name in open_source(path).classes] == classes


def test_parquet_files_with_different_columns_of_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(0)]}), tmp_path / "x-0.parquet")
    pq.write_table(pa.table({"jpg": [png(1)]}), tmp_path / "x-1.parquet")
    source = open_source(tmp_path)
    assert [source.read(i) for i in range(2)] == [png(0), png(1)]
    assert np.array_equal(source.labels, [0, 0])
