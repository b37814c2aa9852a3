"""A cluster for each file of tests, so that two run at the same time, and a user's copy of the project on it."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, check_out, lacking
from tests.slurm.jobs import Job, weights
from tests.trainer.small import small_config, write_images
from trainer.config_file import dump


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if lacking():
        pytest.skip(lacking())
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        try:
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def make_site(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a user's copy of the project, with a configuration for two ranks and some seconds."""
    images = write_images(tmp_path_factory.mktemp("pictures") / "images")
    run = {"dir": "runs/small", "epochs": 30, "device": "cpu", "log_every": 10, "save_every": 10, "keep": 2}
    config = small_config(Path("runs"), images, run=run, data={"val": None}, eval={"knn_every": 0})
    # A user's file has a path relative to the site, which the configuration has made absolute.
    text = dump(config).replace(f"dir: {config.run.dir}\n", "dir: runs/small\n")
    assert "dir: runs/small\n" in text
    return lambda: check_out(tmp_path_factory.mktemp("site"), text)


@pytest.fixture(scope="module")
def site(make_site: Callable[[], Path]) -> Path:
    return make_site()


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, site: Path) -> dict[str, str]:
    """The weights of a job that nothing happens to, with its preflight."""
    job = Job(cluster, site, "run.dir=runs/undisturbed", PREFLIGHT="1")
    job.ends()
    assert "2 nodes, 2 ranks; GPUs none" in job.log
    assert "preflight: all nodes are fit" in job.log
    assert f"slurm: finished: {site}/runs/undisturbed" in job.log
    assert "requeue" not in job.log
    return weights(site / "runs" / "undisturbed")
