"""Methods, backbones and evaluations from outside: the files of docs/extend.md, in a folder of their own."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tests.test_docs import write_examples
from tests.trainer.signal_at import signal_at
from tests.trainer.small import RESNET, small_config, write_images
from tests.trainer.test_kills import TIMINGS
from trainer.config_file import dump, load
from trainer.evaluate.run import run_evaluation
from trainer.interop.export import export
from trainer.interop.weights import NEWEST
from trainer.ops.stop import Stopped
from trainer.plan.planner import make_plan
from trainer.plan.request import PlanRequest
from trainer.pretrain import pretrain
from trainer.report.compare import read, tabulate
from trainer.run.directory import read_config
from trainer.run.results import read_rows

METHOD = ["method.name=own/my_method.py:SimSiam", "method.margin=0.1", "model.predictor=16"]
BACKBONE = ["model.backbone=own/my_backbone.py:Convolutions", "model.backbone_args={width: 16}"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration beside the folder `own` with the files, in the working directory."""
    (tmp_path / "own").mkdir()
    write_examples(tmp_path / "own")
    assert len((tmp_path / "own" / "my_method.py").read_text().splitlines()) <= 40
    config = small_config(tmp_path / "run", write_images(tmp_path / "images", each=8), model=RESNET)
    (tmp_path / "small.yaml").write_text(dump(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "small.yaml"


def rank_of(file: Path, overrides: list[str], rank: int, port: int, killed: bool) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(file.parent)
    torch.set_num_threads(1)
    if killed:
        signal_at(5, signal.SIGKILL)
    pretrain(load(file, overrides))


def start(file: Path, overrides: list[str], killed: bool = False) -> list[BaseProcess]:
    """Start two ranks; rank 0 may be killed after five steps."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    processes: list[BaseProcess] = [
        context.Process(target=rank_of, args=(file, overrides, r, port, killed)) for r in range(2)
    ]
    for process in processes:
        process.start()
    return processes


def join(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(["engine.kind=ddp"], marks=pytest.mark.slow),
        pytest.param(["engine.kind=fsdp"], marks=pytest.mark.slow),
        pytest.param(["engine.kind=deepspeed", "engine.stage=2"], marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp", "zero-2"],
)
def test_a_method_that_is_killed_and_resumed(file: Path, engine: list[str]) -> None:
    """Two ranks; bit for bit the run without an interruption."""
    settings = [*METHOD, *engine, "run.epochs=6", "run.save_every=2", "data.val="]
    assert join(start(file, [*settings, "run.dir=whole"])) == [0, 0]
    assert join(start(file, [*settings, "run.dir=cut"], killed=True))[0] == -signal.SIGKILL
    assert list(Path("cut/checkpoints").glob("step-*"))
    assert join(start(file, [*settings, "run.dir=cut"])) == [0, 0]
    outcomes = []
    for folder in (Path("cut"), Path("whole")):
        rows = [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_rows(folder / "metrics.jsonl")]
        manifest = json.loads((folder / "checkpoints/step-00000012/manifest.json").read_text())
        tensors = {x: entry["sha256"] for x, entry in manifest.items() if x.endswith((".distcp", ".safetensors"))}
        outcomes.append((rows[-6:], tensors))
        assert tensors
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0][-1]["similarity"] > 0


def test_what_works_on_its_run(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Export, model card, comparison and evaluation, after the file has gone."""
    settings = [*METHOD, "run.epochs=1"]
    pretrain(load(file, settings))
    shutil.move("own", "gone")
    run = Path("run")
    assert read_config(run).method.name == f"{Path.cwd()}/run/code/my_method.py:SimSiam"
    export(run, "huggingface", Path("card"), NEWEST, "mit")
    card = Path("card/README.md").read_text()
    assert "my_method.py:SimSiam" in card
    assert "2011.10566" in card
    assert str(Path.cwd()) not in card
    run_evaluation("knn", run, [], None, NEWEST)
    columns, (row,) = tabulate([read(run, [run])])
    assert row[columns.index("method")] == "my_method.py:SimSiam"
    capsys.readouterr()


@pytest.mark.slow
def test_it_is_planned(file: Path) -> None:
    """The planner's processes get the configuration by pickling."""
    plan = make_plan(load(file, [*METHOD, "run.device=auto"]), PlanRequest([1], gpus_per_node=2, recommend=False))
    assert [row.gpus for row in plan.rows] == [2]


def test_its_configuration_is_pickled_for_a_process_that_has_not_imported_it(file: Path) -> None:
    config = load(file, METHOD)
    pickled = pickle.dumps(config)
    del sys.modules[type(config.method).__module__]
    again = pickle.loads(pickled)
    assert again.model_dump() == config.model_dump()
    assert type(again.method).__module__ == type(config.method).__module__


def stopped(file: Path, overrides: list[str]) -> None:
    """Train a few steps, until the run finds the file `stop`."""
    Path("run/stop").touch()
    with pytest.raises(Stopped, match="asked by file"):
        pretrain(load(file, overrides))


def test_a_changed_file(file: Path) -> None:
    long = [*METHOD, "run.epochs=1000", "data.val="]
    Path("run").mkdir()
    stopped(file, long)
    source, copy = Path("own/my_method.py"), Path("run/code/my_method.py")
    assert copy.read_text() == source.read_text()
    shutil.copytree("own", "elsewhere")
    elsewhere = [long[0].replace("own", "elsewhere"), *long[1:]]
    stopped(file, elsewhere)
    Path("elsewhere/my_method.py").write_text(source.read_text() + "# changed\n")
    with pytest.raises(ValueError, match=r"elsewhere/my_method\.py has changed since the run was started") as caught:
        pretrain(load(file, elsewhere))
    assert "\n" not in str(caught.value)
    assert copy.read_text() == source.read_text()
    with pytest.raises(ValueError, match=r"method\.margin was 0\.1, now 0\.2"):
        pretrain(load(file, [text.replace("0.1", "0.2") for text in long]))
    shutil.copy("elsewhere/my_method.py", copy)
    stopped(file, elsewhere)


def test_a_backbone_and_an_evaluation(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(load(file, [*BACKBONE, "run.epochs=1"]))
    run = Path("run")
    capsys.readouterr()
    run_evaluation("own/my_evaluation.py:EVALUATOR", run, [], None, NEWEST)
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= first["nearest_mean"] <= 1
    assert Path("run/nearest-mean/results.json").exists()
    assert "onnx" in export(run, "onnx", Path("net.onnx"), NEWEST, "mit")
    with pytest.raises(ValueError, match=r"--format timm: my_backbone\.py:Convolutions is not a model of timm"):
        export(run, "timm", Path("net.safetensors"), NEWEST, "mit")
    Path("own/my_evaluation.py").write_text(Path("own/my_evaluation.py").read_text() + "# changed\n")
    with pytest.raises(ValueError, match=r"holds another evaluation: code was"):
        run_evaluation("own/my_evaluation.py:EVALUATOR", run, [], None, NEWEST)


def test_a_module_of_a_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(file.parent))
    shutil.move("own", "our_package")
    config = load(file, ["method.name=our_package.my_method:SimSiam", "method.margin=0.1", "run.epochs=1", "data.val="])
    pretrain(config)
    assert Path("run/code/our_package.my_method.py").read_text() == Path("our_package/my_method.py").read_text()
    assert read_config(Path("run")) == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.name=own/my_method.py:Nothing"], "my_method.py has no Nothing; it has Settings, SimSiam"),
        (["method.name=own/nowhere.py:A"], "own/nowhere.py cannot be imported: FileNotFoundError"),
        (["method.name=no_package.x:A"], "no_package.x cannot be imported: ModuleNotFoundError"),
        (["method.name=own/my_method.py:Settings"], "need a subclass of models.method.Method"),
        (["method.name=own/my_method.py:Method"], "needs `settings: Settings`"),
        (["method.name=own/broken.py:A"], "own/broken.py cannot be imported: SyntaxError"),
        (["method.name=own/exits.py:A"], "own/exits.py cannot be imported: RuntimeError: no licence"),
        (["method.name=my_method"], "method.name: got 'my_method', need one of 'adco'"),
        ([*METHOD, "method.lr=1"], "method.lr: unknown key, my_method.py:SimSiam has name, teacher_momentum,"),
        ([METHOD[0], "method.margin=2"], "method.margin: Input should be less than 1"),
        ([METHOD[0], "method.bn=none"], "method.bn: Input should be 'shuffle', 'sync' or 'local'"),
        (["model.backbone=own/my_backbone.py:Tensor"], "model.backbone"),
        ([*BACKBONE[:1], "model.backbone_args={size: 3}"], "model.backbone_args: Convolutions does not take"),
        ([*BACKBONE, "model.small_images=true"], "model.small_images: is for models of timm"),
        (["model.backbone=own/my_backbone.py:nn"], "model.backbone: torch.nn is module, need a function or class"),
        (
            ["model.backbone=own/linear.py:build", "model.backbone_args={}"],
            "model.backbone: build returned Linear, need a module with",
        ),
    ],
)
def test_mistakes(file: Path, overrides: list[str], words: str) -> None:
    Path("own/broken.py").write_text("def\n")
    Path("own/linear.py").write_text("import torch\ndef build():\n    return torch.nn.Linear(2, 2)\n")
    Path("own/exits.py").write_text("raise RuntimeError('no licence')\n")
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        pretrain(load(file, overrides))
    assert words in str(caught.value)


def test_an_evaluation_that_is_none(file: Path) -> None:
    for name in ("linera", "own/my_evaluation.py:nearest_mean"):
        with pytest.raises(ValueError, match=r"evaluate: got .*, need file\.py:NAME"):
            run_evaluation(name, Path("run"), [], None, NEWEST)
