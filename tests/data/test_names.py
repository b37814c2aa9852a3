"""Names as text: every name has one line from which its bytes come back, in lists, tars, folders and shards."""

import os
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

from data import tools
from data.names import from_text, read_lines, to_text
from data.sources.base import Source
from data.sources.classes import read_classes
from data.sources.idx import IdxImages
from data.sources.open import open_source
from data.sources.subset import find_named, read_names
from data.sources.voc import read_split
from tests.data.images import photograph
from tests.data.test_sources import png, write_tar

# A file name and its form as text.
NAMES = {
    b"plain.png": "plain.png",
    "caf\u00e9 \u72ac.png".encode(): "caf\u00e9 \u72ac.png",
    b"latin \xe9.png": r"latin \xe9.png",
    b"two\nlines.png": r"two\nlines.png",
    b"return\rand\ttab.png": r"return\rand\ttab.png",
    rb"back\slash\n.png": r"back\\slash\\n.png",
    b"  two  spaces .png ": r"\x20 two  spaces .png\x20",
    b"\"quotes' <b>&amp;,.png": "\"quotes' <b>&amp;,.png",
    b"\x1b[31m\x7f.png": r"\x1b[31m\x7f.png",
    b"\xef\xbb\xbfmark.png": r"\xef\xbb\xbfmark.png",
    "line\u2028separator\u0085.png".encode(): r"line\xe2\x80\xa8separator\xc2\x85.png",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_form_of_a_name(name: bytes) -> None:
    assert to_text(name) == to_text(os.fsdecode(name)) == NAMES[name]
    assert from_text(NAMES[name]) == name


def test_every_name_comes_back_from_one_line_of_unicode() -> None:
    rng = np.random.default_rng(0)
    alphabet = np.frombuffer(b"\\xnrt0afAF \n\r\t\xff\xc3\xa9\xe2\x80\xa8\xef\xbb\xbf\xed\xa0\x80\x00", np.uint8)
    for size in rng.integers(0, 12, 5000).tolist():
        name = rng.choice(alphabet, size).tobytes()
        text = to_text(name)
        assert from_text(text) == name
        assert text.encode().decode() == text == text.strip()
        assert len(text.splitlines()) <= 1
    assert to_text("\ud83d") == r"\xed\xa0\xbd"  # half of an emoji, as JSON may have it


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", " \t\r\n"])
def test_lines_of_a_text_file(tmp_path: Path, mark: bytes | str, end: str) -> None:
    text = "".join(name + end for name in ("c\u00e9/1.png", "two words", "", "last")) + end * 2
    data = text.encode(mark) if isinstance(mark, str) else mark + text.encode()
    (tmp_path / "list.txt").write_bytes(data)
    assert read_lines(tmp_path / "list.txt") == ["c\u00e9/1.png", "two words", "", "last"]


# The text files that the product reads, as Windows writes them.


def windows(path: Path, *lines: str) -> Path:
    path.write_bytes("".join(f"{line} \r\n" for line in (*lines, "")).encode("utf-8-sig"))
    return path


def test_classes_from_windows(tmp_path: Path) -> None:
    classes = windows(tmp_path / "classes.txt", "cat", "dog")
    assert read_classes(classes) == ["cat", "dog"]
    assert open_source(write_tar(tmp_path / "x.tar", {"0.png": png(0), "0.cls": b"1"})).classes == ["cat", "dog"]
    assert open_source(write_tar(tmp_path / "x.tar", {"0.png": png(0), "0.cls": b"\xef\xbb\xbf1\r\n"})).labels == [1]
    json = b'\xef\xbb\xbf{"label": "1"}\r\n'
    assert open_source(write_tar(tmp_path / "x.tar", {"0.png": png(0), "0.json": json})).labels == [1]
    images, labels = (bytes([0, 0, 8, n]) + bytes([0, 0, 0, 1]) * n + b"\1" for n in (3, 1))
    (tmp_path / "t-images-idx3-ubyte").write_bytes(images)
    (tmp_path / "t-labels-idx1-ubyte").write_bytes(labels)
    assert IdxImages(tmp_path / "t-images-idx3-ubyte").classes == ["cat", "dog"]
    (tmp_path / "test_batch.bin").write_bytes(b"\1" + bytes(3072))
    windows(tmp_path / "batches.meta.txt", "cat", "dog")
    assert open_source(tmp_path / "test_batch.bin").classes == ["cat", "dog"]
    windows(classes, "cat", "", "dog")
    with pytest.raises(ValueError, match=r"classes\.txt: line 2 is empty"):
        read_classes(classes)


def test_equal_names_stay_two_classes(tmp_path: Path) -> None:
    windows(tmp_path / "classes.txt", "crane", "dog", "crane")
    members = {f"{k}{end}": data for k in range(3) for end, data in ((".png", png(k)), (".cls", str(k).encode()))}
    source = open_source(write_tar(tmp_path / "x.tar", members))
    assert source.classes == ["crane (0)", "dog", "crane (2)"]
    assert source.labels.tolist() == [0, 1, 2]


def test_a_subset_list_from_windows(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "x.tar", {f"c/{k}.png": png(k) for k in range(4)}))
    names = read_names(windows(tmp_path / "list.txt", "3.png", "x.tar/c/0.png"))
    assert find_named(source, names, tmp_path / "list.txt").tolist() == [0, 3]


def test_voc_lists_from_windows(tmp_path: Path) -> None:
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    windows(lists / "test.txt", "000001", "000002")
    windows(lists / "cat_test.txt", "000001  1", "000002 -1")
    images, classes, labels = read_split(tmp_path, "test")
    assert ([images.name(i) for i in range(2)], classes, labels.tolist()) == (
        ["000001.jpg", "000002.jpg"],
        ["cat"],
        [[1], [-1]],
    )


# Data sets with such names


def write_odd(root: Path) -> Path:
    """Write images with all NAMES into two class folders with odd names."""
    for folder in (b"two\nlines \xe9", rb"back\slash"):
        os.makedirs(os.path.join(os.fsencode(root), folder))
        for k, name in enumerate(NAMES):
            with open(os.path.join(os.fsencode(root), folder, name.strip()), "wb") as file:
                file.write(cv2.imencode(".png", photograph(12, 10 + k, k))[1].tobytes())
    return root


def names_of(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


@pytest.mark.parametrize("kind", ["folder", "gnu", "posix", "index", "shards"])
def test_a_list_of_odd_names_finds_all_images(tmp_path: Path, kind: str) -> None:
    path = write_odd(tmp_path / "odd")
    if kind in ("gnu", "posix"):
        path = tmp_path / "x.tar"
        subprocess.run(["tar", f"--format={kind}", "-cf", path, "-C", tmp_path / "odd", "."], check=True)
    elif kind == "index":
        tools.make_index(str(path), tmp_path / "x.npz")
        path = tmp_path / "x.npz"
    elif kind == "shards":
        tools.write_shards(str(path), tmp_path / "shards", 5, 1, 0)
        path = tmp_path / "shards"
    source = open_source(path)
    assert source.classes == [r"back\\slash", r"two\nlines \xe9"]
    assert np.bincount(source.labels).tolist() == [len(NAMES)] * 2
    for i in range(len(source)):
        source.image(i)
    (tmp_path / "list.txt").write_text("".join(name + "\n" for name in names_of(source)), encoding="utf-8")
    found = find_named(source, read_names(tmp_path / "list.txt"), tmp_path / "list.txt")
    assert found.tolist() == list(range(2 * len(NAMES)))
    assert tools.verify(str(path), None, 2) == ([], 2 * len(NAMES))


def test_a_list_with_names_as_they_are(tmp_path: Path) -> None:
    """As find or Python's os.listdir wrote it: backslashes and bytes that are not UTF-8 stand for themselves."""
    source = open_source(write_odd(tmp_path / "odd"))
    listed = [rb"back\slash/back\slash\n.png", b"back\\slash/latin \xe9.png"]
    (tmp_path / "list.txt").write_bytes(b"\n".join(listed))
    found = find_named(source, read_names(tmp_path / "list.txt"), tmp_path / "list.txt")
    assert sorted(from_text(source.name(i)) for i in found.tolist()) == sorted(listed)
    with pytest.raises(ValueError, match=r"1 of 1 names are not in the data, such as a\\xff\.png"):
        find_named(source, ["a\udcff.png"], tmp_path / "list.txt")


def test_shards_of_equal_names_in_different_folders(tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        write_tar(tmp_path / part / "x.tar", {"0.png": png(0), "0.cls": part.encode()})
    source = open_source(tmp_path / "*" / "x.tar")
    assert names_of(source) == ["a/x.tar/0.png", "b/x.tar/0.png"]
    assert find_named(source, names_of(source), tmp_path).tolist() == [0, 1]
