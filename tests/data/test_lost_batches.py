"""Batches that a worker cannot deliver: the run ends with the reason instead of waiting for them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data.loader import iterate
from tests.data.images import write_folder


class Fails:
    """Item 3 is what the worker does instead."""

    def __init__(self, action: str) -> None:
        self.action = action

    def __getitem__(self, i: int) -> Any:
        if i < 3:
            return i
        if self.action == "an error that cannot be pickled":

            class LocalError(Exception):
                pass

            raise LocalError
        if self.action == "an item that cannot be pickled":
            return lambda: i
        if self.action == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.Signals[self.action])
        return i


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("SIGKILL", r"\Aa data worker died: SIGKILL: .* out of memory[^\n]*\Z"),
        pytest.param(
            "SIGBUS",
            r"\Aa data worker died: a bus error: /dev/shm is full; .*--shm-size[^\n]*\Z",
            marks=pytest.mark.slow,
        ),
        pytest.param("exit", r"\Aa data worker died: exit code 3; its own message is above\Z", marks=pytest.mark.slow),
        ("an error that cannot be pickled", r"\Aa data worker died: exit code 1; its own message is above\Z"),
    ],
)
def test_a_worker_that_dies(action: str, message: str) -> None:
    items = iterate(Fails(action), range(10), 1, 2, False)  # type: ignore[arg-type]
    received: list[int] = []
    with pytest.raises(ValueError, match=message):
        received.extend(items)  # items that the worker has not sent are lost as well
    assert received == [0, 1, 2][: len(received)]


def test_an_item_that_cannot_be_pickled() -> None:
    items = iterate(Fails("an item that cannot be pickled"), range(10), 1, 2, False)  # type: ignore[arg-type]
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises((AttributeError, TypeError), match="local object"):
        next(items)


FULL = """
import json, sys
from pathlib import Path

import numpy as np
import torch

from data import shared_memory
from data.loader import eval_batches, train_batches
from data.sources.open import open_source
from data.views import View
from tests.data.settings import CPU, data_settings
from tests.trainer.test_doctor import make_config, needs

def outcome(batches):
    try:
        return sum(1 for _ in batches())
    except ValueError as error:
        return str(error)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    source = open_source(folder)
    settings = data_settings(views=(View(size=224),) * 2, batch_size=24, workers=1)
    def training(backend):
        update = {"backend": backend}
        return train_batches(source, settings.model_copy(update=update), 0, 0, 1, 0, 4, CPU)
    def evaluation():
        return eval_batches(source, np.arange(24), 224, 24, workers=1)
    actions = {"cpu": lambda: training("cpu"), "dali": lambda: training("dali"), "evaluation": evaluation}
    found = {"before": {name: outcome(action) for name, action in actions.items()}}
    needed = {"batch_size": 24, "workers": 1, "views": [{"size": 224}, {"size": 224}]}
    found["doctor"] = needs(make_config(folder, folder, data=needed))["/dev/shm"]._asdict()
    shared_memory.check = lambda needed: None
    found["while loading"] = {name: outcome(action) for name, action in actions.items()}
    json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.mark.slow
def test_full_shared_memory(tmp_path: Path) -> None:
    """A file system of 0.3 MB at /dev/shm, in a mount namespace of its own, has no room for a batch."""
    namespace = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount in a namespace")
    images = write_folder(tmp_path / "images", size=100)
    (tmp_path / "full.py").write_text(FULL)
    script = 'mount -t tmpfs -o size=300k none /dev/shm; exec "$@"'
    done = subprocess.run(
        [*namespace, "sh", "-ec", script, "", sys.executable, tmp_path / "full.py", images, tmp_path / "out.json"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    batch = 24 * 2 * 3 * 224 * 224 / 1e6
    for name, megabytes in (("cpu", 4 * batch), ("evaluation", 3 * batch / 2)):
        message = found["before"][name]
        assert "/dev/shm has 0.3 MB" in message
        assert f"take {megabytes:,.1f} MB (one rank); " in message
        assert "--shm-size" in message
    assert "/dev/shm has 0.3 MB" in found["before"]["dali"]
    assert found["doctor"]["state"] == "missing"
    assert "--ipc=host" in found["doctor"]["detail"]
    for name, message in found["while loading"].items():
        assert "a worker cannot send its batch" in message, name
        assert "No space left on device" in message
        assert "--shm-size" in message
        assert "\n" not in message


def test_a_worker_ends_with_a_trainer_that_nobody_waits_for(tmp_path: Path) -> None:
    """In a container without an init process, a killed trainer keeps its entry in the process table."""
    script = tmp_path / "work.py"
    script.write_text(
        "import pickle, sys, time\n"
        "from multiprocessing import get_context\n"
        "from data.sources.folder import ImageFolder\n"
        "from data.watch import WatchedSource\n"
        "def work(source):\n"
        "    time.sleep(100)\n"
        "if __name__ == '__main__':\n"
        "    source = WatchedSource(ImageFolder.scan(__import__('pathlib').Path(sys.argv[1])))\n"
        "    worker = get_context('spawn').Process(target=work, args=(source,))\n"
        "    worker.start()\n"
        "    print(worker.pid, flush=True)\n"
        "    time.sleep(100)\n"
    )
    root = write_folder(tmp_path / "data", classes=1, per_class=1)
    trainer = subprocess.Popen(
        [sys.executable, script, root],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())
    trainer.kill()
    assert trainer.stdout.read() == "", "it is open as long as the worker lives"
    assert Path(f"/proc/{trainer.pid}").exists(), "nobody has waited for it"
    for _ in range(600):
        if not Path(f"/proc/{worker}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()
    trainer.wait()
