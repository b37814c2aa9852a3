"""The Python interface: load, features, datasets from Python, and the bank in another training loop."""

import importlib.util
import json
import pickle
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from data.sources.base import UnreadableImage
from data.sources.dataset import DatasetSource, to_pixels
from data.sources.open import open_source
from models.encoder import Encoder
from models.negatives.bank import Bank
from tests.ranks import run_ranks
from tests.trainer.engines import build_train_step, make_config, make_rank_info
from tests.trainer.small import small_config, write_images
from trainer import api
from trainer.build import build_encoder
from trainer.evaluate.embed import embed
from trainer.interop.weights import CheckpointChoice
from trainer.pretrain import pretrain
from trainer.train_step import Rates

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = DOCS / "examples/adco.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    images = write_images(folder / "images")
    pretrain(small_config(folder / "run", images, run={"dir": str(folder / "run"), "epochs": 1, "device": "cpu"}))
    return folder / "run"


def test_features_equal_those_of_the_verb_embed(run: Path, tmp_path: Path) -> None:
    model = api.load(run)
    assert model.step == 6
    assert not model.backbone.training
    files = sorted((run.parent / "images").rglob("*.png"))
    pixels = [cv2.imread(str(file), cv2.IMREAD_COLOR_RGB) for file in files]
    assert all(image is not None for image in pixels)
    embed(run, str(run.parent / "images"), tmp_path / "x.npy", CheckpointChoice(), 0, ["run.device=cpu"])
    expected = np.load(tmp_path / "x.npy")
    found = api.features(model, pixels, batch_size=7)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    teacher = api.features(api.load(run, "teacher", step=4), [Image.open(file) for file in files[:2]])
    assert teacher.shape == (2, expected.shape[1])
    assert not np.allclose(teacher, expected[:2])
    assert not dist.is_initialized()


def test_what_cannot_be_loaded_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run"):
        api.load(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint of step 5"):
        api.load(run, step=5)
    with pytest.raises(ValueError, match="got no images"):
        api.features(api.load(run), [])


def test_the_examples_of_the_page_work(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(run)
    (tmp_path / "images").symlink_to(run.parent / "images")
    Image.fromarray(IMAGE).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(encoding="utf-8"), re.DOTALL):
        exec(code, names)
    assert names["y_BD"].shape == (1, 16)
    assert names["z_BD"].norm().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(torch.from_numpy(names["x_ND"][:1]), names["y_BD"].detach())
    assert (tmp_path / "runs/small/results.json").exists()


IMAGE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


@pytest.mark.parametrize(
    "image",
    [IMAGE, Image.fromarray(IMAGE), torch.from_numpy(IMAGE).permute(2, 0, 1)],
    ids=["array", "pillow", "tensor"],
)
def test_pixels_of_every_form(image: Any) -> None:
    assert np.array_equal(to_pixels(image), IMAGE)


def test_grey_images_have_three_channels() -> None:
    grey = IMAGE[:, :, 0]
    for image in (grey, grey[:, :, None], Image.fromarray(grey), torch.from_numpy(grey)[None]):
        assert np.array_equal(to_pixels(image), np.repeat(grey[:, :, None], 3, 2))


@pytest.mark.parametrize("image", [IMAGE / 255, torch.rand(3, 5, 7), IMAGE[:, :, :2], np.zeros((0, 3, 3), np.uint8)])
def test_what_is_not_pixels_is_refused(image: Any) -> None:
    with pytest.raises(ValueError, match="need a Pillow image"):
        to_pixels(image)


class Squares(torch.utils.data.Dataset[Any]):
    """Six images of two classes; the last one cannot be read."""

    classes = ("dark", "light")
    targets = (0, 0, 0, 1, 1, 1)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> tuple[Any, int]:
        if i == 5:
            raise OSError("no such image")
        return Image.fromarray(np.full((4, 4, 3), 40 * i, np.uint8)), self.targets[i]


def test_a_dataset_is_a_source() -> None:
    source = pickle.loads(pickle.dumps(DatasetSource(Squares(), "squares")))
    assert (len(source), source.classes, source.labels.tolist()) == (6, ["dark", "light"], [0, 0, 0, 1, 1, 1])
    assert (source.image(3) == 120).all()
    with pytest.raises(UnreadableImage, match=r"squares\[5\]: no such image"):
        source.image(5)
    unlabelled = DatasetSource([IMAGE, IMAGE], "list")
    assert (unlabelled.classes, unlabelled.labels.tolist()) == (["0"], [0, 0])


DATASET = """
import numpy as np
from PIL import Image

class Squares:
    classes = ["dark", "light"]
    targets = [0] * 12 + [1] * 12

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return Image.fromarray(np.full((20, 20, 3), 10 * i, np.uint8)), self.targets[i]

squares = Squares()
"""


@pytest.mark.parametrize("name", ["Squares", "squares"])
def test_a_dataset_in_a_python_file_trains(tmp_path: Path, name: str) -> None:
    (tmp_path / "my_data.py").write_text(DATASET)
    images = tmp_path / f"my_data.py:{name}"
    config = small_config(
        tmp_path / "run", images, run={"dir": str(tmp_path / "run"), "epochs": 1, "device": "cpu"}, data={"workers": 1}
    )
    pretrain(config)
    assert json.loads((tmp_path / "run/images.json").read_text())["train"]["images"] == 24
    embed(tmp_path / "run", str(images), tmp_path / "x.npy", CheckpointChoice(), 0, ["run.device=cpu"])
    assert len(np.load(tmp_path / "x.npy")) == 24


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_data.py:Circles", "has no Circles; it has Squares"),
        ("no.py:Squares", "no.py cannot be imported"),
        ("my_data.py:np", "need a map-style dataset"),
    ],
)
def test_what_is_no_dataset_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "my_data.py").write_text(DATASET)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": (0, 1)}, "need 6 class indices"),
        ({"targets": (0.5,) * 6}, "need 6 class indices"),
        ({"targets": (0, 0, 0, 0, 0, 7)}, "2 class names, but there is a label 7"),
    ],
)
def test_labels_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    dataset = Squares()
    for name, value in changes.items():
        setattr(dataset, name, value)
    with pytest.raises(ValueError, match=message):
        DatasetSource(dataset, "squares")


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("adco_example", EXAMPLE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses_of_both(steps: int) -> tuple[list[float], list[float]]:
    """Train by the trainer and by the example, from the same weights on the same images."""
    config = make_config(
        "resnet",
        data={"views": [{"size": 16}] * 2},
        method={"bn": "local", "teacher_momentum": 0.999},
        bank={"temperature": 0.02},
        optim={"lr": 0.05, "clip": None, "weight_decay": 1e-4},
    )
    train_step = build_train_step(config, make_rank_info())
    bank = train_step.method.negatives
    assert isinstance(bank, Bank)
    copy = Bank(config.bank, bank.dim, bank.mesh)
    copy.fill(bank.w_KD)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    images = torch.randn(steps, 2, 16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images = images[:, :, rank * 16 // world_size : (rank + 1) * 16 // world_size]
    rates = Rates(0.05, 3.0, 0.999)
    ours = [float(train_step.step(list(views), step, rates).metrics["loss"]) for step, views in enumerate(images)]

    module = example()

    class Unlisted(Encoder):
        """The encoder for one tensor instead of a list of views."""

        def forward(self, x: Any) -> torch.Tensor:
            return super().forward([x])

    student = build_encoder(config)
    student.__class__ = Unlisted
    theirs = list(module.train(student, [(views[0], views[1]) for views in images], copy, lr=0.05))
    return ours, theirs


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_example_has_the_losses_of_the_trainer(world_size: int) -> None:
    for ours, theirs in run_ranks(world_size, losses_of_both, 5):
        assert theirs == pytest.approx(ours, rel=1e-5)
        assert len(set(json.dumps(ours).split())) == 5
