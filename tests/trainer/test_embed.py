"""Features as files: every image once and in order for any number of ranks; and the page in a browser."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data.cpu import render_center
from data.normalize import normalize
from data.sources.open import open_source
from tests.browser import chromium
from tests.ranks import run_ranks
from tests.trainer.small import RESNET, VIT_ARGS, small_config, write_images
from trainer.__main__ import main
from trainer.distributed import RankInfo
from trainer.evaluate import embed
from trainer.interop.import_ import import_weights
from trainer.interop.weights import NEWEST, load_encoder
from trainer.pretrain import pretrain
from trainer.report.embed_page import MAX_CLASSES, map_2d, nearest, render_embeddings
from trainer.run.directory import read_config

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ResNet that was trained for two steps."""
    folder = tmp_path_factory.mktemp("trained")
    images = write_images(folder / "images", each=8)
    sections: dict[str, dict[str, Any]] = {
        "run": {"epochs": 1},
        "model": RESNET,
        "eval": {"knn_every": 0, "batch_size": 5},
    }
    pretrain(small_config(folder / "run", images, **sections))
    return folder / "run"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images in 3 classes, one of which cannot be read."""
    folder = write_images(tmp_path_factory.mktemp("pictures") / "set", each=8)
    (folder / "class-1" / "003.png").write_bytes(b"not a picture")
    return folder


def expected(run: Path, pictures: Path) -> tuple[list[str], NDArray[np.float32]]:
    """Return names and features, computed one image at a time."""
    source = open_source(pictures)
    encoder, _ = load_encoder(run, read_config(run))
    names, rows = [], []
    for i in range(len(source)):
        if (name := source.name(i)) != "class-1/003.png":
            x_BCHW = normalize(torch.from_numpy(render_center(source.image(i), 16)[None]), torch.device("cpu"))
            with torch.no_grad():
                rows.append(encoder.backbone.eval()(x_BCHW)[0].numpy())
            names.append(name)
    return names, np.stack(rows)


def embed_on_ranks(run: Path, src: Path, out: Path, points: int = 0) -> str:
    rank_info = RankInfo(torch.device("cpu"), dist.get_rank(), dist.get_world_size(), dist.get_world_size())
    embed.CHUNK = 5  # the rows of a rank are joined in several chunks
    return embed.embed_source(run, read_config(run), rank_info, str(src), out, NEWEST, points)


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_image_once_and_in_order(run: Path, pictures: Path, tmp_path: Path, world_size: int) -> None:
    names, rows = run_ranks(1, expected, run, pictures)[0]
    assert len(names) == 23
    summary = run_ranks(world_size, embed_on_ranks, run, pictures, tmp_path / "a.parquet")
    assert summary == [f"23 of 24 images, 16 features each: {tmp_path}/a.parquet"] + [""] * (world_size - 1)
    run_ranks(world_size, embed_on_ranks, run, pictures, tmp_path / "b.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.csv", "b.npy"]

    table = pq.read_table(tmp_path / "a.parquet")
    assert str(table.schema.field("feature").type) == "fixed_size_list<element: float>[16]"
    assert table["name"].to_pylist() == names
    assert table["label"].to_pylist() == [name.split("/")[0] for name in names]
    features = np.array(table["feature"].to_pylist(), np.float32)
    np.testing.assert_allclose(features, rows, rtol=1e-5, atol=1e-5)
    assert np.array_equal(np.load(tmp_path / "b.npy"), features)
    with (tmp_path / "b.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["name", "label"], *([name, name.split("/")[0]] for name in names)]


def test_shards_and_a_rank_without_images(run: Path, pictures: Path, tmp_path: Path) -> None:
    from data.tools import write_shards

    few = tmp_path / "few"
    shutil.copytree(pictures / "class-0", few)
    for path in sorted(few.iterdir())[2:]:
        path.unlink()
    write_shards(str(few), tmp_path / "shards", 2, 1, None)
    summary = run_ranks(3, embed_on_ranks, run, tmp_path / "shards", tmp_path / "a.npy")
    assert summary[0].startswith("2 of 2 images, 16 features each")
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert re.fullmatch(r"shard-000000\.tar/000-0\.png,few", lines[1])
    assert np.load(tmp_path / "a.npy").shape == (2, 16)


def test_names_of_any_bytes(run: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", classes=1, each=2)
    (folder / "class-0" / "000.png").rename(folder / "class-0" / "a,\n\udcff.png")
    run_ranks(1, embed_on_ranks, run, folder, tmp_path / "a.parquet")
    run_ranks(1, embed_on_ranks, run, folder, tmp_path / "a.npy")
    assert pq.read_table(tmp_path / "a.parquet")["name"].to_pylist() == ["class-0/001.png", "class-0/a,\\n\\xff.png"]
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file))[2] == ["class-0/a,\\n\\xff.png", "class-0"]


def mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.delenv("TRAINER_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["trainer", "embed", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_mistakes(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src = str(pictures)
    said = mistake(monkeypatch, capsys, str(run), src, "--out", str(tmp_path / "a.csv"))
    assert said == f"error: {tmp_path}/a.csv: the name must end in .parquet or .npy"
    said = mistake(monkeypatch, capsys, str(run), str(tmp_path / "nowhere"), "--out", str(tmp_path / "a.npy"))
    assert "nowhere does not exist" in said
    (tmp_path / "a.html").write_text("precious")
    said = mistake(monkeypatch, capsys, str(run), src, "--out", str(tmp_path / "a.npy"))
    assert said == f"error: {tmp_path}/a.html exists: choose another name, nothing is overwritten"
    assert (tmp_path / "a.html").read_text() == "precious"
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "1.png").write_bytes(b"not a picture")
    said = mistake(monkeypatch, capsys, str(run), str(bad), "--out", str(tmp_path / "b.npy"))
    assert said == f"error: {bad}: none of the images can be read"
    said = mistake(monkeypatch, capsys, str(tmp_path), src, "--out", str(tmp_path / "b.npy"))
    assert "is not a run" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "bad"]


def test_neighbours_and_maps_of_few_points() -> None:
    angles = np.radians([0, 10, 30, 90])
    unit_PD = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    order_PK, similarity_PK = nearest(unit_PD, 2)
    assert order_PK.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert similarity_PK[0] == pytest.approx(np.cos(angles[1:3]), abs=1e-6)
    assert nearest(unit_PD[:1], 2)[0].shape == (1, 0)
    for count in (1, 2, 4):
        position_P2 = map_2d(np.random.default_rng(0).normal(size=(count, 7)).astype(np.float32))
        assert position_P2.shape == (count, 2)
        assert np.isfinite(position_P2).all()
    # two tight groups far apart stay apart
    groups_PD = np.repeat(np.eye(2, 8, dtype=np.float32), 20, axis=0)
    groups_PD += 0.01 * np.random.default_rng(0).normal(size=groups_PD.shape).astype(np.float32)
    a_P2, b_P2 = np.split(map_2d(groups_PD), 2)
    assert np.linalg.norm(a_P2.mean(0) - b_P2.mean(0)) > 2 * max(a_P2.std(), b_P2.std())


def test_many_classes_share_one_trace(tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path / "set", classes=MAX_CLASSES + 1, each=1))
    features = np.random.default_rng(0).normal(size=(len(source), 4)).astype(np.float32)
    html = render_embeddings("t", features, np.arange(len(source)), source, 10**6)
    assert '"separate": false' in html
    assert "21 of 1,000,000 images, evenly spaced" in html


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not on PATH")
def test_the_page_in_a_browser(run: Path, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(pictures, folder)
    (folder / "class-2").rename(folder / HOSTILE)
    shutil.rmtree(tmp_path / "chromium", ignore_errors=True)
    run_ranks(1, embed_on_ranks, run, folder, tmp_path / "a.parquet", 20)
    assert HOSTILE not in (tmp_path / "a.html").read_text(encoding="utf-8")
    (tmp_path / "chromium").mkdir()
    with chromium(tmp_path / "chromium") as page:
        page.open(tmp_path / "a.html")
        page.wait("document.querySelectorAll('#map .point').length === 20")
        legend = page.run("[...document.querySelectorAll('#map .legendtext')].map(x => x.textContent)")
        assert legend[:3] == [HOSTILE, "class-0", "class-1"]
        assert page.run("document.getElementById('hover').hidden")
        assert page.run("points.thumbnails.every(x => x.startsWith('data:image/png'))"), "small: not JPEG"
        # The first point of the first trace: of the first picture of the first class.
        box = page.run("JSON.stringify(document.querySelector('#map .point').getBoundingClientRect())")
        x, y = (json.loads(box)[name] + json.loads(box)[side] / 2 for name, side in (("x", "width"), ("y", "height")))
        page.mouse("mouseMoved", x - 2, y - 2)
        page.mouse("mouseMoved", x, y)
        page.wait("!document.getElementById('hover').hidden", 20)
        assert page.run("document.querySelector('#hover .caption').textContent") == f"{HOSTILE}/000.png ({HOSTILE})"
        assert page.run("document.querySelector('#hover img').naturalWidth") == 20, "the picture is there"
        page.click(x, y)
        page.wait("document.querySelectorAll('#neighbours img').length === 12", 20)
        points = page.run("points")
        names = page.run("[...document.querySelectorAll('#neighbours button')].map(x => x.title)")
        first = points["labels"].index(0)
        assert names[0] == page.run(f"describe({points['neighbours'][first][0]})")
        assert page.run("[...document.querySelectorAll('#neighbours img')].every(x => x.complete && x.naturalWidth)")
        page.mouse("mouseMoved", 5, 5)
        page.wait("document.getElementById('hover').hidden", 20)
        page.run("document.getElementById('search').focus()")
        page.type("ONERROR")
        found = sum(label == 0 for label in points["labels"])
        page.wait(f"document.getElementById('status').textContent.startsWith('{found} found')", 20)
        page.press_enter()  # the first is the one selected
        page.wait(f"document.querySelector('#query .caption').textContent.startsWith('{HOSTILE}/001.png')", 20)
        assert page.problems == []


def test_a_network_of_another_program(tmp_path: Path, pictures: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT_ARGS)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    overrides = [f"model.backbone_args={VIT_ARGS}", "eval.size=16", "run.device=cpu", "data.workers=0"]
    import_weights(tmp_path / "a.pth", tmp_path / "run", "vit_tiny_patch16_224", overrides)
    summary = embed.embed(tmp_path / "run", str(pictures), tmp_path / "a.npy", NEWEST, 0, [])
    assert summary == f"23 of 24 images, 32 features each: {tmp_path}/a.npy, {tmp_path}/a.csv"
