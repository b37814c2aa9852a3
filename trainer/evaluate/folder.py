"""The folder of an evaluation in a run's directory, RUN/NAME: like a run, it continues what was stopped.

settings.json       what the result depends on: the weights' checksum, data, settings; another evaluation is refused
metrics.jsonl       and tensorboard/, checkpoints/, stop, stopped.json, index-*.npz, unreadable-*.txt: as in a run
subset.txt          names of the labelled images (finetune)
results.json        what came out
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.config import flatten
from trainer.distributed import Place
from trainer.run_dir import claimed, read_json, write_json

RESULTS = "results.json"


@contextmanager
def opened(run: Path, name: str, settings: dict[str, Any], place: Place) -> Iterator[Path]:
    """RUN/NAME, new or taken up from an earlier start of the same evaluation, and kept from other processes.

    Raises ValueError, on all ranks, if it is that of another evaluation or of something else, or in use.
    """
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise ValueError(f"--name: got {name!r}, need letters, digits and - only: it names a folder in {run}")
    with claimed(run / name, place, lambda folder: _take(folder, json.loads(json.dumps(settings)))) as folder:
        yield folder


def _take(folder: Path, settings: dict[str, Any]) -> None:
    stored = folder / "settings.json"
    if stored.exists():
        before, now = flatten(read_json(stored)), flatten(settings)
        changed = [key for key in before | now if before.get(key) != now.get(key)]
        if changed:
            listed = "; ".join(f"{key} was {before.get(key)}, now {now.get(key)}" for key in changed)
            raise ValueError(f"{folder} holds another evaluation: {listed}. Choose another --name")
    elif any(path.name != "lock" for path in folder.iterdir()):
        raise ValueError(f"{folder} is not the folder of an evaluation. Choose another --name")
    write_json(stored, settings)


def evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """The results of the evaluations in a run's directory, by name."""
    return {path.parent.name: read_json(path) for path in sorted(run.glob(f"*/{RESULTS}"))}


def machine(place: Place) -> dict[str, Any]:
    """What a result was made on."""
    device = torch.cuda.get_device_name() if place.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"ranks": place.world, "device": device, "torch": torch.__version__}


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: one bit more or less gives another."""
    digest = hashlib.sha256()
    for name, x in sorted(network.state_dict().items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
