"""The demo on a tenth of its data: it learns, by kNN on real images. `make test` has fetched Fashion-MNIST."""

import gzip
import json
from pathlib import Path

import pytest

from data.sources.fashion_mnist import FILES
from trainer.config_file import load
from trainer.pretrain import pretrain

ROOT = Path(__file__).parent.parent
COUNTS = {"train": 6000, "t10k": 1000}


def copy_part(source: Path, dest: Path) -> None:
    """The first images and labels of each set, as IDX files of their own."""
    for name in FILES:
        count = COUNTS[name.split("-")[0]]
        content = gzip.decompress((source / name).read_bytes())
        header = 4 + 4 * content[3]
        size = len(content[header:]) // int.from_bytes(content[4:8], "big")
        part = content[:4] + count.to_bytes(4, "big") + content[8:header] + content[header : header + count * size]
        (dest / name.removesuffix(".gz")).write_bytes(part)


@pytest.mark.slow
def test_the_demo_learns(tmp_path: Path) -> None:
    source = ROOT / ".data/fashion-mnist"
    if not source.is_dir():
        pytest.fail("Fashion-MNIST is not there: make data fetches it")
    copy_part(source, tmp_path)
    overrides = [
        f"run.dir={tmp_path}/run",
        f"data.train={tmp_path}/train-images-idx3-ubyte",
        f"data.val={tmp_path}/t10k-images-idx3-ubyte",
        "run.epochs=3",
        "eval.k=20",
    ]
    pretrain(load(ROOT / "configs/demo.yaml", overrides))
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["knn"] >= results["knn_untrained"] + 0.06
    assert results["knn"] > 0.5
    assert results["knn_pixels"] > 0.8, "the pixels of aligned images classify them well"
