"""The record of a run's images, images.json: a later start on other images is refused, wherever the images are.

{"train": {"images": 240, "classes": 3, "labels": HASH, "names": HASH, …}, "val": …, "more_val.NAME": …,
 "accepted": [{"when": …, …}]}

The hashes are of the lists of the images, which are in memory, so nothing is read: 14 million names take a second.
"""

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from data.settings import DataSettings
from data.sources.base import LabelledSource, Source
from trainer.run.files import exists, read_json, write_json

RECORD = "images.json"
STARTED = (
    "checkpoints",
    "metrics.jsonl",
    "results.json",
)  # a run that has trained has one of them

Fingerprint = dict[str, Any]  # numbers of images and classes, and a hash of each array of `LabelledSource.identity`


def fingerprint(source: Source) -> Fingerprint:
    """Return what tells a data set from others, independently of the folder that it is in."""
    arrays = source.identity() if isinstance(source, LabelledSource) else {"labels": source.labels}
    if len(source.classes) > 1:  # a single class is named after the folder
        joined = "\0".join(source.classes).encode(errors="surrogateescape")
        arrays["names of classes"] = np.frombuffer(joined, np.uint8)
    hashes = {name: hashlib.sha256(np.ascontiguousarray(x).data).hexdigest()[:16] for name, x in arrays.items()}
    return {"images": len(source), "classes": len(source.classes), **hashes}


def describe(found: Fingerprint) -> str:
    """Return the numbers of images and classes in words."""
    return f"{found['images']:,} images in {found['classes']:,} classes"


def difference(before: Fingerprint, now: Fingerprint) -> str:
    """Describe how two data sets differ; '' if they do not."""
    if describe(before) != describe(now):
        return f"{describe(before)}, now {describe(now)}"
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    return f"{describe(before)} as now, but other {', '.join(changed)}" if changed else ""


def has_started(folder: Path) -> bool:
    """Return whether a run directory belongs to a run that has trained."""
    return any(exists(folder / name) for name in STARTED)


def check_images(folder: Path, data: DataSettings, name: str, found: Fingerprint) -> None:
    """Compare images with those of the run in `folder`, if it has started.

    Args:
        folder: The run directory; one without a record accepts any images.
        data: The section `data` of the configuration.
        name: The setting of the images, a key of `data.paths`.
        found: The images that it names now.

    Raises:
        ValueError: They are other images, and data.accept_changed is not set.
    """
    before = read_json(folder / RECORD).get(name)
    if before and has_started(folder) and not data.accept_changed and (changed := difference(before, found)):
        raise ValueError(
            f"data.{name}: {data.paths[name]} has changed since {folder} was started: it had {changed}. Restore the "
            f"images, or accept these with data.accept_changed=true"
        )


def record_images(folder: Path, data: DataSettings, found: dict[str, Fingerprint]) -> None:
    """Write the record of a run's images, with those that were accepted in place of others."""
    record = read_json(folder / RECORD) if has_started(folder) else {}
    accepted = [
        {"when": time.strftime("%Y-%m-%d %H:%M:%S"), "set": name, "before": record[name], "folder": data.paths[name]}
        for name, now in found.items()
        if name in record and record[name] != now
    ]
    updated = {**record, **found, "accepted": [*record.get("accepted", []), *accepted]}
    if updated != record:
        write_json(folder / RECORD, updated)
