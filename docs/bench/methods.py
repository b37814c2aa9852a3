"""Compares the methods on CIFAR-10 at equal compute: the same tuning for each, then three seeds of its best settings.

    python docs/bench/methods.py CIFAR10 RUNS [--only METHOD …] [--tune-only]

CIFAR10 is a folder with train/ and test/; RUNS receives the run directories. Each finished run is a line of
docs/bench/methods.jsonl, and a run that has a line is not repeated: the comparison can be stopped at any time and go on
on another machine. Delete the lines to repeat it.

The network is a narrow ResNet-18, which CPU cores can train. The budget is that of SimCLR: a method whose step takes
more FLOPs (`trainer.plan.flops`) trains for fewer epochs. Tuning searches one group of settings after the other
(`SEARCH`) by the kNN accuracy after a short run on half of the training images, measured on others of them; no test
image is used. Every run also has a linear evaluation. Every method has the same number of runs. As many runs as cores
go on at once, each on one thread: with networks this small that does twice the work of one run on all cores.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainer.config_file import load
from trainer.plan.flops import step_flops

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_suffix(".jsonl")
TUNE_EPOCHS, FINAL_EPOCHS, SEEDS = 4, 8, (0, 1, 2)  # the epochs are those of SimCLR
TUNE_TRAIN, TUNE_VAL = 2500, 500  # training images of each class for tuning
Values = dict[str, str]

# The same for all methods; everything else is as in the recipes.
COMMON: Values = {
    "model.stem_stride": "2",
    "model.backbone_args": "{channels: [16, 64, 128, 256], layers: [1, 1, 1, 1]}",
    "model.head_layers": "2",
    "model.head_norm": "true",
    "data.batch_size": "256",
    "data.views": "[{size: 32}, {size: 32}]",
    "data.workers": "0",
    "method.bn": "local",
    "method.bn_group": "null",
}


def values(text: str) -> Values:
    """Return the settings of a text such as "optim.lr=0.24 method.temperature=0.2"."""
    return dict(item.split("=", 1) for item in text.split())


CROPS = 'data.views=[{"size":32,"scale":[0.4,1]},{"size":32,"scale":[0.4,1]}]'
# Tried for every method: the learning rate, the decay, the optimizer, larger crops.
SHARED = ["optim.weight_decay=0.0001", "optim.name=adamw optim.lr=0.002 optim.weight_decay=0.01", CROPS]
# The settings that each method starts with, and then groups of alternatives, of which the best stays if it is better.
START = {
    "simclr": "optim.lr=0.24 method.temperature=0.2",
    "adco": "optim.lr=0.24 bank.temperature=0.1 bank.lr=0.3 bank.size=4096",
    "moco": "optim.lr=0.12 method.temperature=0.2",
    "byol": "optim.lr=0.48 method.teacher_momentum=0.99",
    "acssl": "optim.lr=0.48 method.hardest=64",
}
SEARCH = {
    "simclr": [
        ["optim.lr=0.12", "optim.lr=0.48"],
        ["method.temperature=0.1", "method.temperature=0.4"],
        ["model.head_layers=3"],
        ["model.dim=64"],
        ["optim.warmup=0.5"],
        SHARED[:1],
        SHARED[1:2],
        SHARED[2:],
    ],
    "adco": [
        ["method.teacher_momentum=0.9", "method.teacher=false"],
        ["method.temperature=0.2", "method.temperature=0.07"],
        ["optim.lr=0.48"],
        ["bank.size=256 bank.lr=3", "bank.lr=0"],
        SHARED[:1],
        SHARED[1:2],
        SHARED[2:],
    ],
    "moco": [
        ["method.teacher_momentum=0.9", "method.teacher_momentum=0.97"],
        ["method.temperature=0.1", "method.symmetric=false"],
        ["model.predictor=512"],
        ["bank.size=1024"],
        ["optim.lr=0.24"],
        SHARED[:1],
        SHARED[1:2],
        SHARED[2:],
    ],
    "byol": [
        ["method.teacher_momentum=0.9", "method.teacher_momentum=0.97"],
        ["optim.lr=0.24", "optim.lr=0.96"],
        ["model.predictor=512"],
        ["method.teacher_momentum_final=null"],
        ["optim.warmup=0.5"],
        SHARED[:1],
        SHARED[1:2],
        SHARED[2:],
    ],
    "acssl": [
        ["method.teacher_momentum=0.9", "method.hardest=16"],
        ["method.form=margin method.margin=0.2", "method.temperature=0.1"],
        ["method.negatives_from=bank bank.size=256 method.hardest=32 bank.temperature=0.1 bank.lr=0.3"],
        ["method.negatives_from=queue bank.size=512 method.hardest=32"],
        ["optim.lr=0.24"],
        SHARED[:1],
        SHARED[1:2],
        SHARED[2:],
    ],
}


class Comparison:
    """Runs trainings and evaluations, and keeps the record of the finished ones."""

    def __init__(self, cifar10: Path, runs: Path) -> None:
        self.cifar10, self.runs = cifar10, runs
        self.tuning = link_tuning_images(cifar10 / "train", runs / "tuning_images")
        self.cores = threading.Semaphore(len(os.sched_getaffinity(0)))
        self.writing = threading.Lock()
        lines = RECORD.read_text(encoding="utf-8").splitlines() if RECORD.exists() else []
        self.record = [json.loads(line) for line in lines]

    def train(self, method: str, settings: Values, budget: int, seed: int = 0, final: bool = False) -> dict[str, Any]:
        """Return the record of a training, which takes place if there is none yet."""
        epochs = max(1, round(budget * self.flops("simclr", {}) / self.flops(method, settings)))
        wanted = {"method": method, "settings": settings, "epochs": epochs, "seed": seed, "final": final}
        for line in self.record:
            if wanted.items() <= line.items():
                return line
        name = "-".join(
            [
                "final" if final else "tune",
                method,
                f"{epochs}ep",
                f"seed{seed}",
                *(f"{k}={v}" for k, v in settings.items()),
            ]
        )
        folder = self.runs / name.replace("/", "_")
        images = self.cifar10 if final else self.tuning
        changes = {
            **COMMON,
            **settings,
            "run.dir": str(folder),
            "run.epochs": str(epochs),
            "run.seed": str(seed),
            "run.keep": "1",
            "data.train": str(images / "train"),
            "data.val": str(images / "test"),
            "eval.knn_every": str(max(1, epochs // 3) if final else epochs),
        }
        with self.cores:
            config = f"configs/{method}_cifar10.yaml"
            self.command("pretrain", config, *(f"{key}={value}" for key, value in changes.items()))
            self.command("linear", str(folder), "--fast")
            if final:
                self.command("finetune", str(folder), "finetune.labels=0.01", "finetune.batch_size=32")
        return self.add({**wanted, **measured(folder)})

    def flops(self, method: str, settings: Values) -> float:
        """Return the FLOPs of a step."""
        changes = {**COMMON, **settings, "data.train": "none", "run.dir": "none"}
        return step_flops(load(ROOT / f"configs/{method}_cifar10.yaml", [f"{k}={v}" for k, v in changes.items()]))

    def command(self, *arguments: str) -> None:
        """Run a command of the trainer on one thread."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "trainer", *arguments], cwd=ROOT, env=environment, check=True)

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        """Append a line to the record."""
        with self.writing, RECORD.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            self.record.append(line)
        return line

    def tune(self, method: str) -> Values:
        """Return the best settings of a method."""
        best = self.train(method, values(START[method]), TUNE_EPOCHS)
        with ThreadPoolExecutor() as threads:
            for alternatives in SEARCH[method]:
                tries = [{**best["settings"], **values(text)} for text in alternatives]
                found = threads.map(lambda settings: self.train(method, settings, TUNE_EPOCHS), tries)
                best = max([best, *found], key=lambda line: line["knn"])
        return best["settings"]

    def compare(self, method: str) -> None:
        """Tune a method, and train it with each seed."""
        settings = self.tune(method)
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda seed: self.train(method, settings, FINAL_EPOCHS, seed, final=True), SEEDS))


def link_tuning_images(train: Path, folder: Path) -> Path:
    """Make a folder with train/ and test/ of different training images, and return it."""
    for source in sorted(path for path in train.iterdir() if path.is_dir()):
        files = sorted(source.iterdir())
        for part, chosen in (("train", files[:TUNE_TRAIN]), ("test", files[-TUNE_VAL:])):
            (folder / part / source.name).mkdir(parents=True, exist_ok=True)
            for file in chosen:
                link = folder / part / source.name / file.name
                if not link.exists():
                    link.symlink_to(file)
    return folder


def measured(folder: Path) -> dict[str, Any]:
    """Return what a run directory says: accuracies, seconds, and the last values of its log."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [[round(row["epoch"], 3), row["knn"]] for row in rows if "knn" in row]
    last = {key: x for row in rows for key, x in row.items() if isinstance(x, float) and key != "epoch"}
    found = {"knn": results["knn"], "seconds": results["seconds"], "device": results["device"], "curve": curve}
    for part in sorted(folder.glob("*/results.json")):
        found[part.parent.name] = json.loads(part.read_text(encoding="utf-8"))
    return {**found, "last": last}


# The final accuracies of a run: the title of the column, and the keys in its line of the record.
ACCURACIES = {
    "kNN": ("knn",),
    "linear": ("linear-fast", "top1"),
    "1 % of the labels": ("finetune-1pct", "top1"),
}


def value(line: dict[str, Any], keys: tuple[str, ...]) -> float:
    """Return a number of a record's line."""
    found: Any = line
    for key in keys:
        found = found[key]
    return float(found)


def table(record: list[dict[str, Any]]) -> str:
    """Return the final runs as Markdown: mean and standard deviation over the seeds, in percent."""
    finals: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in record:
        if line["final"]:
            finals.setdefault((line["method"], json.dumps(line["settings"])), []).append(line)
    rows = [f"| method | seeds | epochs | {' | '.join(ACCURACIES)} |", "|---" * (3 + len(ACCURACIES)) + "|"]
    for (method, _), lines in sorted(finals.items(), key=lambda item: -mean(value(x, ("knn",)) for x in item[1])):
        cells = [method, str(len(lines)), str(lines[0]["epochs"])]
        for keys in ACCURACIES.values():
            percents = [100 * value(line, keys) for line in lines]
            deviation = f" ± {stdev(percents):.1f}" if len(percents) > 1 else ""
            cells.append(f"{mean(percents):.1f}{deviation}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Run what the record lacks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--only", nargs="+", choices=sorted(START), default=list(START))
    parser.add_argument("--tune-only", action="store_true")
    arguments = parser.parse_args()
    comparison = Comparison(arguments.cifar10.absolute(), arguments.runs.absolute())
    work = comparison.tune if arguments.tune_only else comparison.compare
    with ThreadPoolExecutor() as threads:
        list(threads.map(work, arguments.only))
    print(table(comparison.record))


if __name__ == "__main__":
    main()
