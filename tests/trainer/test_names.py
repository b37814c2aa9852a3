"""Images and classes with names of any bytes, in a folder and in a tar, through knn, finetune, embed and report."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from data.names import from_text
from data.sources.open import open_source
from tests.trainer.evaluations import NARROW, evaluate_here
from tests.trainer.small import small_config
from trainer.__main__ import main
from trainer.evaluate import embed, finetune, knn
from trainer.interop.weights import NEWEST
from trainer.pretrain import pretrain
from trainer.report.run import write_report
from trainer.run.directory import read_config

CLASSES = [b"latin \xe9", b"two\nlines\t<b>", rb"back\slash\n"]
IMAGES = [b"\xff.png", b"a\nb.png", rb"c\n.png", b" 'q\" , .png", b"e\r\t.png", "\u2028\ufeff.png".encode()]
FINETUNE = ["finetune.batch_size=6", "finetune.epochs=1", "finetune.seeds=[0]"]


def write_odd(root: Path) -> Path:
    for c, folder in enumerate(CLASSES):
        os.makedirs(os.path.join(os.fsencode(root), folder))
        for k, name in enumerate(IMAGES):
            image = np.full((20, 20, 3), 40 * c + k, np.uint8)
            with open(os.path.join(os.fsencode(root), folder, name), "wb") as file:
                file.write(cv2.imencode(".png", image)[1].tobytes() if (c, k) != (0, 0) else b"no image")
    return root


@pytest.fixture(scope="module", params=["folder", "tar"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on 18 images, one of which cannot be read."""
    root = tmp_path_factory.mktemp("odd")
    images = write_odd(root / "images \udcff")
    if request.param == "tar":
        subprocess.run(["tar", "-cf", root / "x.tar", "-C", images, "."], check=True)
        images = root / "x.tar"
    changes = {"run": {"epochs": 1}, "model": NARROW, "data": {"batch_size": 9}, "eval": {"k": 3}, "bank": {"size": 9}}
    pretrain(small_config(root / "run", images, **changes))
    return root / "run"


ALL = {folder + b"/" + name for folder in CLASSES for name in IMAGES}


def stored(name: str) -> bytes:
    return from_text(name.removeprefix("x.tar/"))


def test_the_list_of_unreadable_images(trained: Path) -> None:
    (line,) = (trained / "unreadable-0.txt").read_text(encoding="utf-8").splitlines()
    name, _, reason = line.partition("\t")[2].partition(": ")
    assert stored(name) == CLASSES[0] + b"/" + IMAGES[0]
    assert reason == "not an image, or of a format that is not supported"


@pytest.mark.usefixtures("small_group")
def test_finetune_and_knn(trained: Path) -> None:
    results = evaluate_here(finetune.EVALUATOR, trained, [*FINETUNE, "finetune.labels=1"], "all")
    subset = trained / "all" / "subset.txt"
    assert {stored(line) for line in subset.read_text(encoding="utf-8").splitlines()} == ALL
    for edited in (subset.read_bytes(), b"\xef\xbb\xbf" + subset.read_bytes().replace(b"\n", b" \r\n") + b"\r\n"):
        (trained / "list.txt").write_bytes(edited)
        again = evaluate_here(
            finetune.EVALUATOR, trained, [*FINETUNE, f"finetune.subset_list={trained / 'list.txt'}"], f"n{len(edited)}"
        )
        assert (again["labels"], again["top1"]) == (18, results["top1"])
    assert evaluate_here(knn.EVALUATOR, trained, [])["knn"] >= 0


def test_embed(trained: Path) -> None:
    src = read_config(trained).data.train
    embed.embed(trained, src, trained.parent / "a.parquet", NEWEST, 0, [])
    embed.embed(trained, src, trained.parent / "b.npy", NEWEST, 30, [])
    table = pq.read_table(trained.parent / "a.parquet")
    rows = list(zip(table["name"].to_pylist(), table["label"].to_pylist(), strict=True))
    assert {stored(name) for name, _ in rows} == ALL - {CLASSES[0] + b"/" + IMAGES[0]}
    assert {from_text(label) for _, label in rows} == set(CLASSES)
    with (trained.parent / "b.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["name", "label"], *map(list, rows)]
    page = (trained.parent / "b.html").read_text(encoding="utf-8")
    assert r"two\\nlines\\t\u003cb\u003e" in page


def test_report(trained: Path) -> None:
    page = write_report(trained).read_text(encoding="utf-8")
    assert r"two\nlines\t&lt;b&gt;" in page
    assert r"latin \xe9" in page


def test_verify_prints_such_names_and_paths(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = open_source(trained / "index-train.npz")
    monkeypatch.setattr(sys, "argv", ["trainer", "data", "verify", str(trained / "index-train.npz")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    lines = capfd.readouterr().out.splitlines()
    bad = next(i for i in range(len(source)) if stored(source.name(i)) == CLASSES[0] + b"/" + IMAGES[0])
    assert lines == [
        f"{source.name(bad)}: not an image, or of a format that is not supported",
        "1 of 18 images cannot be read",
    ]
