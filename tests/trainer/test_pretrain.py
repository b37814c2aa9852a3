"""Whole runs: what is written, that several ranks do the same as one, that a killed run goes on bit for bit."""

import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from data.tools import write_shards
from tests.processes import Program, start_ranks, trainer
from tests.trainer.signal_at import signal_at
from tests.trainer.small import PYTHON, RESNET, VIT, VIT_ARGS, small_config, write_images
from trainer.config import Config
from trainer.config_file import dump
from trainer.pretrain import pretrain
from trainer.report.run import write_report
from trainer.run.results import read_rows

TIMINGS = {"seconds", "images_per_second", "data_wait", "memory_gib", "teraflops", "phases"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "train")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock or the memory decides."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file with tensors in every checkpoint of a run."""
    return {
        f"{manifest.parent.name}/{name}": entry["sha256"]
        for manifest in sorted(folder.glob("checkpoints/*/manifest.json"))
        for name, entry in json.loads(manifest.read_text()).items()
        if name.endswith(".distcp")
    }


def write_config(config: Config) -> str:
    path = Path(config.run.dir).with_suffix(".yaml")
    path.write_text(dump(config))
    return str(path)


def command(config: Config, ranks: int = 1) -> list[str]:
    """Return the command of a run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [PYTHON, *launcher, "-m", "trainer", "pretrain", write_config(config)]


def pretrain_with_signal(config: str, steps: int, name: str) -> None:
    """Pre-train; after that many steps rank 0 sends itself a signal."""
    signal_at(steps, signal.Signals[name])
    trainer("pretrain", config)


def pretrain_with_limit(config: str, size: int) -> None:
    """Pre-train with files of at most `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    trainer("pretrain", config)


def test_a_run_leaves_what_a_user_looks_for(tmp_path: Path, images: Path) -> None:
    two = write_images(tmp_path / "two", classes=2, each=4)
    config = small_config(tmp_path / "run", images, data={"more_val": {"two": str(two)}})
    pretrain(config)
    rows = rows_of(tmp_path / "run")
    training, evaluations = ([row for row in rows if key in row] for key in ("loss", "knn"))
    assert [row["step"] for row in training] == list(range(1, 19))
    assert [row["step"] for row in evaluations] == [0, 6, 12, 18]
    assert training[-1]["loss"] < training[0]["loss"]
    for key in ("pretext_top1", "positive_similarity", "hardest_similarity", "adversary_grad_norm", "bank_norm",
                "bank_share", "teacher_momentum", "lr", "bank_lr", "unreadable"):  # fmt: skip
        assert key in training[0], key
    assert training[0]["lr"] == pytest.approx(0.5 * 12 / 256), "the first step takes the whole rate"
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["knn_untrained"] == evaluations[0]["knn"]
    assert results["knn_pixels"] == evaluations[0]["knn_pixels"]
    assert not any("knn_pixels" in row for row in rows[1:]), "measured once"
    assert results["knn"] == evaluations[-1]["knn"]
    assert all("knn_two" in row for row in evaluations)
    assert results["knn_two"] == evaluations[-1]["knn_two"]
    steps = [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())]
    assert steps == [f"step-{n:08d}" for n in (4, 8, 12, 16, 18)]
    assert list((tmp_path / "run/tensorboard").iterdir())
    html = write_report(tmp_path / "run").read_text()
    assert "negative 0" in html
    assert "class-2" in html
    assert "over chance (33.3 %)" in html
    moved = write_report(tmp_path / "run", [f"data.train={tmp_path}/moved"]).read_text()
    assert "negative 0" not in moved
    assert "over chance (33.3 %)" in moved


METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "symmetric": {"method": {"symmetric": True}},
    "multi-crop": {"data": {"views": [{"size": 16}, {"size": 16}, {"size": 12, "scale": [0.1, 0.5]}]}},
    "symmetric multi-crop, mean": {
        "data": {"views": [{"size": 16}, {"size": 16}, {"size": 12, "scale": [0.1, 0.5]}]},
        "method": {"symmetric": True, "crops": "mean"},
    },
    "own key only, random bank": {
        "method": {"batch_keys": False},
        "bank": {"init": "random", "lr_final": 0.1},
    },
    "vit, adamw, accumulation": {
        "model": VIT,
        "optim": {"name": "adamw", "lr": 1e-3, "warmup": 1, "accumulate": 3, "decay_norm_and_bias": False},
    },
    "lars, sync": {"optim": {"name": "lars", "lr": 200.0}, "method": {"bn": "sync"}},
    # In bf16 torch 2.14's CPU convolution of stride 2 over single pixels gives gradients that are not defined.
    "bf16": {"run": {"precision": "bf16"}, "model": {**RESNET, "small_images": True}},
    "fp16, clipped": {
        "run": {"precision": "fp16"},
        "model": {**RESNET, "small_images": True},
        "optim": {"clip": 1.0},
    },
    "dali": {"data": {"backend": "dali"}},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("multi-crop", "fp16, clipped", "dali") else pytest.mark.slow)
        for name in METHODS
    ],
)
def test_every_option_trains(tmp_path: Path, images: Path, name: str) -> None:
    config = small_config(tmp_path / "run", images, **METHODS[name])
    pretrain(config)
    training = [row for row in rows_of(tmp_path / "run") if "loss" in row]
    assert len(training) == 18
    losses = [row["loss"] for row in training]
    assert sum(losses[-6:]) < sum(losses[:6])
    if config.run.precision != "fp32":
        assert "negative 0" in write_report(tmp_path / "run").read_text(), "whose type is that of autocast"


OTHER_METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "acssl": {
        "model": {**RESNET, "predictor": 16, "head_norm": True},
        "method": {"name": "acssl", "negatives_from": "bank", "hardest": 4, "guard": 0.95},
        "bank": {"init": "random"},
        "optim": {"accumulate": 2, "lr": 0.5},
    },
    "byol": {"model": {**RESNET, "predictor": 16, "head_norm": True}, "method": {"name": "byol", "bn": "local"}},
    "caco": {
        "method": {"name": "caco", "temperature": 0.2},
        "bank": {"size": 32, "temperature": 0.2, "lr": 0.3, "warmup": 1},
        "optim": {"accumulate": 2, "lr": 0.1},
    },
    "moco": {
        "method": {"name": "moco", "symmetric": True},
        "bank": {"size": 31},
        "optim": {"accumulate": 2, "lr": 0.1},
    },
    "simclr": {"method": {"name": "simclr", "bn": "local"}},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "acssl" else pytest.mark.slow) for name in OTHER_METHODS]
)
def test_every_method_trains_and_goes_on_bit_for_bit(tmp_path: Path, images: Path, name: str) -> None:
    """Queue, its pointer and the schedules, too: cut off after step 8 of 18."""
    whole, cut = (small_config(tmp_path / rank_info, images, **OTHER_METHODS[name]) for rank_info in ("whole", "cut"))
    pretrain(whole)
    rows = rows_of(tmp_path / "whole")
    training = [row for row in rows if "loss" in row]
    assert all({"feature_std", "effective_rank"} <= row.keys() for row in training)
    assert ("pretext_top1" in training[0]) == (name != "byol")
    assert [row["knn"] for row in rows if "knn" in row][-1] > 0.4, "chance is a third"
    momenta = [row["teacher_momentum"] for row in training]
    assert (momenta == sorted(momenta) and momenta[-1] > 0.999) == (name in ("acssl", "byol", "caco"))

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut/results.json").unlink()
    for step in (12, 16, 18):
        shutil.rmtree(tmp_path / f"cut/checkpoints/step-{step:08d}")
    pretrain(cut)
    assert rows_of(tmp_path / "cut") == rows
    assert checksums(tmp_path / "cut") == checksums(tmp_path / "whole")
    html = write_report(tmp_path / "cut").read_text()
    assert ("negative 0" in html) == (name in ("acssl", "caco"))


def test_a_run_that_collapses_says_so(tmp_path: Path, images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Pairs only, without predictor, and a teacher that is the student of the step before."""
    method = {"name": "acssl", "hardest": 0, "teacher_momentum": 0, "teacher_momentum_final": None}
    pretrain(small_config(tmp_path / "run", images, method=method, optim={"lr": 8.0}, eval={"knn_every": 0}))
    said = [line for line in capfd.readouterr().err.splitlines() if "collapsed" in line]
    assert len(said) == 1
    assert re.match(r"step \d+: collapsed: all images have nearly the same embedding", said[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "method", "tolerance"),
    [(VIT, {"symmetric": True}, 1e-5), (RESNET, {"bn": "sync"}, 1e-2)],
    ids=["no BatchNorm", "BatchNorm over all ranks"],
)
def test_two_ranks_do_the_same_as_one(
    tmp_path: Path, images: Path, model: dict[str, Any], method: dict[str, Any], tolerance: float
) -> None:
    """`tolerance`: BatchNorm multiplies rounding errors a hundredfold in these 18 steps."""
    one = small_config(tmp_path / "one", images, model=model, method=method)
    two = one.model_copy(update={"run": one.run.model_copy(update={"dir": str(tmp_path / "two")})})
    pretrain(one)
    subprocess.run(command(two, ranks=2), check=True, capture_output=True, timeout=300)
    for alone, together in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert together.keys() == alone.keys()
        for key in ("loss", "positive_similarity", "hardest_similarity", "adversary_grad_norm", "bank_norm"):
            if key in alone:
                assert together[key] == pytest.approx(alone[key], rel=tolerance, abs=1e-5), (alone["step"], key)


@pytest.mark.parametrize(
    "engine",
    [{}, *(pytest.param({"kind": kind}, marks=pytest.mark.slow) for kind in ("fsdp", "deepspeed"))],
    ids=["ddp", "fsdp", "zero3"],
)
def test_shuffled_batchnorm_trains_on_two_ranks_and_goes_on_with_one(
    tmp_path: Path, images: Path, engine: dict[str, Any]
) -> None:
    """Under any engine; and then with none."""
    config = small_config(tmp_path / "run", images, engine=engine)
    ranks = start_ranks(2, pretrain_with_signal, write_config(config), 9, "SIGINT")
    assert [rank.wait() for rank in ranks] == [75, 75], ranks[0].errors
    pretrain(small_config(tmp_path / "run", images))
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 19))
    assert [row["step"] for row in rows if "knn" in row] == [0, 6, 12, 18]
    assert rows[-1]["knn"] > 0


@pytest.mark.slow
def test_the_loss_curve_goes_on_over_other_numbers_of_ranks(tmp_path: Path, images: Path) -> None:
    """FSDP with a sharded bank on 4 ranks, then 2, then 3; against one rank without FSDP. No BatchNorm: see above."""
    settings: dict[str, Any] = {"model": VIT, "eval": {"knn_every": 0}, "method": {"teacher_momentum": 0.9}}
    whole = small_config(tmp_path / "whole", images, **settings)
    elastic = small_config(tmp_path / "elastic", images, **settings, engine={"kind": "fsdp"})
    pretrain(whole)
    stops = []
    for ranks in (4, 2):
        programs = start_ranks(ranks, pretrain_with_signal, write_config(elastic), 5, "SIGTERM")
        assert [rank.wait() for rank in programs] == [75] * ranks
        stops.append(json.loads((tmp_path / "elastic/stopped.json").read_text())["step"])
        assert f"{ranks} ranks on cpu" in programs[0].errors
    assert [rank.wait() for rank in start_ranks(3, trainer, "pretrain", write_config(elastic))] == [0] * 3
    assert stops == [6, 12], "one step after the signal"
    rows = [[row for row in rows_of(tmp_path / name) if "loss" in row] for name in ("whole", "elastic")]
    for alone, together in zip(*rows, strict=True):
        assert together["step"] == alone["step"]
        for key in ("loss", "positive_similarity", "bank_norm"):
            assert together[key] == pytest.approx(alone[key], rel=1e-5), (alone["step"], key)


BF16 = {"size": 30, "precision": "bf16", "weights": "bf16", "velocity": "bf16"}


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({}, id="resnet"),
        pytest.param(
            {"model": {**VIT, "backbone_args": VIT_ARGS | {"drop_rate": 0.2}}, "bank": BF16},
            id="vit with dropout, bank in bf16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, images: Path, sections: dict[str, Any]) -> None:
    whole = small_config(tmp_path / "whole", images, **sections)
    killed = whole.model_copy(update={"run": whole.run.model_copy(update={"dir": str(tmp_path / "killed")})})
    pretrain(whole)
    program = Program(pretrain_with_signal, write_config(killed), 10, "SIGKILL")
    assert program.wait() == -signal.SIGKILL, program.errors
    pretrain(killed)
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    assert checksums(tmp_path / "killed") == checksums(tmp_path / "whole")


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, images: Path) -> None:
    whole = small_config(tmp_path / "whole", images)
    stopped = whole.model_copy(update={"run": whole.run.model_copy(update={"dir": str(tmp_path / "stopped")})})
    pretrain(whole)
    program = Program(pretrain_with_signal, write_config(stopped), 5, "SIGTERM")
    assert program.wait() == 75, program.errors
    assert json.loads((tmp_path / "stopped/stopped.json").read_text())["step"] == 6
    last_line = program.errors.splitlines()[-1]
    assert last_line == "stopped after step 6 (SIGTERM): the same command resumes the run"
    assert (tmp_path / "stopped/checkpoints/step-00000006").is_dir()
    pretrain(stopped)
    assert not (tmp_path / "stopped/stopped.json").exists()
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")
    assert checksums(tmp_path / "stopped").items() >= checksums(tmp_path / "whole").items()


def test_a_finished_run_is_left_alone(tmp_path: Path, images: Path) -> None:
    config = small_config(tmp_path / "run", images, run={"dir": str(tmp_path / "run"), "epochs": 1, "device": "cpu"})
    pretrain(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.suffix == ".json"}
    pretrain(config)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.suffix == ".json"}


def test_unreadable_images_are_listed_skipped_and_counted(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    (images / "class-1/003.png").write_bytes(b"")
    (images / "class-2/004.png").write_bytes(b"not a picture")
    config = small_config(tmp_path / "run", images, run={"dir": str(tmp_path / "run"), "epochs": 1, "device": "cpu"})
    pretrain(config)
    listed = (tmp_path / "run/unreadable-0.txt").read_text()
    assert "class-1/003.png" in listed
    assert "class-2/004.png" in listed
    last = [row for row in rows_of(tmp_path / "run") if "loss" in row][-1]
    assert last["unreadable"] == len(listed.splitlines()) == 2


def test_too_many_unreadable_images_stop_the_run_on_all_ranks(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    for i in range(0, 24, 2):
        (images / f"class-1/{i:03d}.png").write_bytes(b"")
    config = small_config(tmp_path / "run", images)
    ranks = start_ranks(2, trainer, "pretrain", write_config(config))
    assert [rank.wait() for rank in ranks] == [1, 1]
    refusals = [line for rank in ranks for line in rank.errors.splitlines() if line.startswith("error: ")]
    assert len(set(refusals)) == 1, "every rank refuses in the same words; the first one may end the second one"
    assert re.fullmatch(
        r"error: 1[12] of \d+ images cannot be read, more than data\.max_unreadable=0\.01 allows; "
        r"they are listed in .*/run/unreadable-\*\.txt",
        refusals[0],
    )
    assert not (tmp_path / "run/results.json").exists()
    pretrain(Config.model_validate(config.model_dump() | {"data": config.data.model_dump() | {"max_unreadable": 0.5}}))
    assert (tmp_path / "run/results.json").exists()


def test_blocks_and_shards_train_and_go_on(tmp_path: Path, images: Path) -> None:
    """The same run from a folder and from shards of it, in blocks; and one that is cut off."""
    write_shards(str(images), tmp_path / "shards", 20, 1, 0)
    blocks = {"order": "block", "block_size": 6, "block_window": 4}
    config = small_config(tmp_path / "run", tmp_path / "shards", data=blocks)
    pretrain(config)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["knn"] > 0.5
    cut = small_config(tmp_path / "cut", tmp_path / "shards", data=blocks)
    pretrain(cut)
    for path in ("results.json", "checkpoints/step-00000018", "checkpoints/step-00000016"):
        os.rename(tmp_path / "cut" / path, tmp_path / os.path.basename(path))
    pretrain(cut)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "run")
    assert checksums(tmp_path / "cut") == checksums(tmp_path / "run")


@pytest.mark.parametrize("backbone", ["vit_relpos_small_patch16_224", "swin_tiny_patch4_window7_224"])
def test_images_of_other_sizes_than_the_backbone_takes(tmp_path: Path, images: Path, backbone: str) -> None:
    small: dict[str, dict[str, Any]] = {
        "vit_relpos_small_patch16_224": {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 8},
        "swin_tiny_patch4_window7_224": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    }
    arguments = small[backbone]
    sections: dict[str, Any] = {"run": {"epochs": 1}, "bank": {"init": "random"}, "eval": {"knn_every": 0}}
    model = {"backbone": backbone, "backbone_args": arguments}
    message = rf"model\.backbone: {backbone} takes only images of 224 x 224 pixels, .* have 16; .*img_size: SIZE"
    with pytest.raises(ValueError, match=message):
        pretrain(small_config(tmp_path / "a", images, model=model, **sections))
    model = {"backbone": backbone, "backbone_args": {**arguments, "img_size": 16}}
    views = {"views": [{"size": 16}, {"size": 16}, {"size": 8}]}
    with pytest.raises(ValueError, match=r"takes only images of 16 x 16 pixels, .* have 8, 16; "):
        pretrain(small_config(tmp_path / "b", images, model=model, data=views, **sections))
    pretrain(small_config(tmp_path / "c", images, model=model, **sections))


def test_a_truncated_checkpoint_is_skipped_for_the_one_before(
    tmp_path: Path, images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, cut = (small_config(tmp_path / name, images) for name in ("whole", "cut"))
    pretrain(whole)
    pretrain(cut)
    (tmp_path / "cut/results.json").unlink()
    for name in ("step-00000018", "step-00000016"):
        file = tmp_path / "cut/checkpoints" / name / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-100])
    pretrain(cut)
    assert capfd.readouterr().err.count("is damaged") == 2
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert checksums(tmp_path / "cut") == checksums(tmp_path / "whole")


def test_a_full_disk_does_not_stop_training_but_fails_the_run(tmp_path: Path, images: Path) -> None:
    """A limit on the size of a file stands for the full disk: metrics fit, checkpoints do not."""
    config = small_config(tmp_path / "run", images, run={"dir": str(tmp_path / "run"), "epochs": 1, "device": "cpu"})
    program = Program(pretrain_with_limit, write_config(config), 60_000)
    assert program.wait() == 1, program.errors
    assert re.search(r"^error: checkpoint of step 6 not saved in .*File too large", program.errors, re.M)
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    assert [row["step"] for row in rows_of(tmp_path / "run") if "loss" in row] == list(range(1, 7))
    assert not (tmp_path / "run/results.json").exists(), "the weights of the last step are not saved"


@pytest.mark.slow
def test_a_disk_that_fills_up(tmp_path: Path, images: Path) -> None:
    """A file system of 3 MB, in a mount namespace of its own, has room for some checkpoints of a run, not for all."""
    config = small_config(tmp_path / "disk", images, eval={"knn_every": 0})
    run = shlex.join(command(config))
    (tmp_path / "disk").mkdir(exist_ok=True)
    script = f"""
        mount -t tmpfs -o size=3m none {tmp_path}/disk
        code=0; {run} || code=$?
        cp -r {tmp_path}/disk {tmp_path}/run
        exit $code"""
    namespace = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount in a namespace")
    done = subprocess.run([*namespace, "sh", "-ec", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert not (tmp_path / "run/results.json").exists(), "the weights of the last step are not saved"
    lost = re.findall(
        r"^checkpoint of step (\d+) not saved in (.*): .*No space left.*; it takes about (.*) MB", done.stderr, re.M
    )
    assert lost, done.stderr
    assert {path for _, path, _ in lost} == {f"{tmp_path}/disk/checkpoints"}
    assert all(0.2 < float(size) < 3 for _, _, size in lost)
    saved = {path.name for path in (tmp_path / "run/checkpoints").glob("step-*")}
    assert saved, "the first ones fit"
    assert not saved & {f"step-{int(step):08d}" for step, _, _ in lost}
    for manifest in (tmp_path / "run/checkpoints").glob("*/manifest.json"):
        for name, entry in json.loads(manifest.read_text()).items():
            assert hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest() == entry["sha256"]
    assert [row["step"] for row in rows_of(tmp_path / "run") if "loss" in row] == list(range(1, 19))


def test_checkpoints_of_whole_epochs_stay(tmp_path: Path, images: Path) -> None:
    run = {"epochs": 3, "save_every": 5, "keep": 1, "keep_every": 2}
    pretrain(small_config(tmp_path / "run", images, run=run, eval={"knn_every": 0}))
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-00000012", "step-00000018"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"train": "/no/such/folder"}}, "data: /no/such/folder does not exist"),
        ({"data": {"batch_size": 73}}, "data.batch_size: a batch of 73 images is larger than"),
        ({"model": {"backbone": "resnet_none"}}, "model.backbone: timm has no model 'resnet_none'"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    tmp_path: Path, images: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        pretrain(small_config(tmp_path / "run", images, **sections))
    assert "\n" not in str(refusal.value)
