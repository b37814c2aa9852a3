"""Parts that need images, which they generate: stop, resume and replay, and DALI's views against the CPU's."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch

from data.extras import is_installed
from data.loader import train_batches
from data.sources.open import open_source
from trainer.bench.gpu.record import Line, Setting, at_most, holds, skipped
from trainer.bench.gpu.trajectory import difference, make_config
from trainer.config import Config
from trainer.ops.ending import Stopped
from trainer.ops.replay import replay
from trainer.pretrain import pretrain
from trainer.run.results import read_rows

_GREY_LEVELS = 1.0  # mean difference of the backends over all operations (docs/data-backends.md: blur .38, colours .9)


def check_resume(setting: Setting) -> Iterator[Line]:
    """Stop a run, resume it and compare it with an uninterrupted one; let a run diverge and replay its last step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder / "images", setting.pick(256, 24), side=40)
        whole, parts = (_run_config(setting, folder / run, images) for run in ("whole", "parts"))
        pretrain(whole)
        Path(parts.run.dir).mkdir()
        (Path(parts.run.dir) / "stop").touch()
        try:
            pretrain(parts)
            stopped = False
        except Stopped:
            stopped = True
        steps = len(_losses(parts))
        yield holds("stop", stopped and steps > 0, f"after step {steps}, by the file `stop`")
        pretrain(parts)
        expected, found = _losses(whole), _losses(parts)
        yield holds("resumed", len(found) == len(expected), f"{len(found)} of {len(expected)} steps are logged")
        # The first step after the checkpoint depends on all that it holds. On a GPU two runs round differently.
        bound, after = 0.0 if setting.small else 1e-2, slice(0, steps + 1)
        note = "of the uninterrupted run's losses" + (", which a CPU repeats exactly" if setting.small else "")
        yield at_most("first loss after", difference(found[after], expected[after]), bound, note)

        broken = _run_config(setting, folder / "broken", images, lr=1e30)
        try:
            pretrain(broken)
            message = "a learning rate of 1e30 trains to the end"
        except ValueError as error:
            message = str(error)
        yield holds("divergence", "not finite" in message, message[:100])
        text = replay(Path(broken.run.dir))
        yield holds("replay", "now: not finite" in text, text.splitlines()[1])


def _run_config(setting: Setting, folder: Path, images: Path, lr: float = 0.05) -> Config:
    run = {"dir": str(folder), "epochs": 1, "log_every": 1, "save_every": 1000}
    data = {"train": str(images), "backend": "cpu"}  # DALI need not be installed
    sections = {"run": run, "data": data, "optim": {"lr": lr}}
    return make_config("resnet", setting.device.type, sections, batch_size=setting.pick(16, 8))


def _losses(config: Config) -> list[float]:
    return [row["loss"] for row in read_rows(Path(config.run.dir) / "metrics.jsonl") if "loss" in row]


def write_images(folder: Path, count: int, side: int) -> Path:
    """Write JPEG images of smooth colours and return their folder."""
    generator = np.random.default_rng(0)
    (folder / "class").mkdir(parents=True)
    for i in range(count):
        fields = generator.integers(0, 256, (4, 4, 3), np.uint8)
        image = cv2.resize(fields, (side + i % 7, side), interpolation=cv2.INTER_CUBIC)
        assert cv2.imwrite(str(folder / f"class/{i:04d}.jpg"), image)
    return folder


def check_dali(setting: Setting) -> Iterator[Line]:
    """Compare DALI's views with those of the CPU backend."""
    if not is_installed("nvidia.dali"):
        yield skipped("views", "DALI is not installed (requirements/dali.txt)")
        return
    with tempfile.TemporaryDirectory() as name:
        batch_size, batches = setting.pick(64, 8), 2
        images = write_images(Path(name) / "images", batch_size * batches, side=256)
        source = open_source(images)
        view = {"size": setting.pick(224, 32)}
        config = make_config("resnet", setting.device.type, {"data": {"views": [view, view]}}, batch_size=batch_size)
        made = {}
        for backend, device in (("dali", setting.device), ("cpu", torch.device("cpu"))):
            data = config.data.model_copy(update={"backend": backend, "workers": setting.pick(2, 0)})
            made[backend] = list(train_batches(source, data, 0, 0, 1, 0, batches, device))
        for number, (ours, theirs) in enumerate(zip(made["dali"], made["cpu"], strict=True)):
            same = bool((ours.samples.cpu() == theirs.samples).all())
            yield holds(f"batch {number}, images", same, "the same images in the same order")
            for v, (a, b) in enumerate(zip(ours.views, theirs.views, strict=True)):
                off = float((a.cpu().float() - b.float()).abs().mean())
                yield at_most(f"batch {number}, view {v}", off, _GREY_LEVELS, "mean over the pixels", "grey levels")
