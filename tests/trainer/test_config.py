"""Configurations: files, overrides, limits, error messages, and the reference of all keys."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from models import adco, byol, moco
from trainer.config import Config, check_world
from trainer.config_file import changed_keys, dump, load
from trainer.engines import ddp, fsdp, zero
from trainer.report import config_reference
from trainer.schema import walk_keys

BASE: dict[str, Any] = {"run": {"dir": "runs/x", "epochs": 2}, "data": {"train": "pictures"}}
PUBLISHED = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def write(path: Path, values: object) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    """Return the message of `load`'s error, which must be one line."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        load(path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_files_load(path: Path) -> None:
    config = load(path)
    assert config.run.epochs > 0
    check_world(config, 1, 1)


def test_a_dump_loads_as_an_equal_configuration(tmp_path: Path) -> None:
    values = {
        **BASE,
        "data": {"train": "pictures", "views": [{"size": 28}, {"size": 28, "scale": [0.1, 0.5]}, {"size": 12}]},
        "model": {"backbone_args": {"channels": [8, 16], "act_layer": "gelu"}},
        "optim": {"weight_decay": 1e-6, "lr": 0.1 + 0.2},
        "bank": {"lr_final": 0.5},
    }
    config = load(write(tmp_path / "a.yaml", values))
    (tmp_path / "b.yaml").write_text(dump(config), encoding="utf-8")
    assert load(tmp_path / "b.yaml") == config


def test_defaults_are_those_of_the_papers(tmp_path: Path) -> None:
    config = load(write(tmp_path / "a.yaml", BASE))
    assert isinstance(config.method, adco.Settings)
    assert (config.method.temperature, config.bank.temperature, config.bank.lr) == (0.12, 0.02, 3.0)
    assert (config.bank.size, config.data.batch_size, config.optim.lr) == (65536, 256, 0.03)


def test_extends_merges_sections_but_not_backbone_args(tmp_path: Path) -> None:
    base = {**BASE, "model": {"backbone": "resnet18", "dim": 64, "backbone_args": {"channels": [8, 16]}}}
    write(tmp_path / "base.yaml", base)
    above = {"extends": "base.yaml", "model": {"backbone": "resnet34", "backbone_args": {"width": 2}}}
    config = load(write(tmp_path / "above.yaml", above))
    assert config.run.epochs == 2
    assert (config.model.backbone, config.model.dim) == ("resnet34", 64)
    assert config.model.backbone_args == {"width": 2}


def test_extends_only_once(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", BASE)
    write(tmp_path / "b.yaml", {"extends": "a.yaml"})
    assert "only one level" in refusal(write(tmp_path / "c.yaml", {"extends": "b.yaml"}))
    assert "only one level" in refusal(write(tmp_path / "d.yaml", {"extends": "d.yaml"}))


def test_extends_a_file_that_is_missing(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.yaml", {"extends": "nowhere.yaml"}))
    assert message == f"{tmp_path / 'nowhere.yaml'}: No such file or directory"


def test_overrides_come_last_and_keep_their_neighbours(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {**BASE, "model": {"backbone_args": {"channels": [8, 16]}}})
    config = load(
        path,
        [
            "optim.lr=1e-3",
            "run.epochs=7",
            "run.dir=a=b",
            "data.val=",
            "data.views=[{size: 28}, {size: 12}]",
            "method.symmetric=true",
            "model.backbone_args.channels=[4, 8]",
        ],
    )
    assert config.optim.lr == 1e-3
    assert (config.run.epochs, config.run.dir) == (7, str(Path.cwd() / "a=b"))
    assert config.data.train == str(Path.cwd() / "pictures")
    assert config.data.val is None
    assert isinstance(config.method, adco.Settings)
    assert config.method.symmetric
    assert [view.size for view in config.data.views] == [28, 12]
    assert config.model.backbone_args == {"channels": [4, 8]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: [1", "not YAML"),
        ("run:\n\tdir: x", "not YAML"),
        ("run: *x", "line 1: not YAML: found undefined alias 'x'; put a text with special characters in quotes"),
        ("run: x\n---\nrun: x", "line 2: not YAML"),
        ("run: 2024-13-45", "run: input should be a valid dictionary"),
        ("just words", "need sections"),
        ("", "need sections such as 'run:' and 'data:', got an empty file"),
        ("# nothing", "got an empty file"),
        ("- run\n- data", "got a list"),
        ("run:\n  dir: x\n  epochs: 2\n  dir: y", "line 4: the key 'dir' is in line 2 already"),
        ("data: {train: x}\nrun: {}\ndata: {val: x}", "line 3: the key 'data' is in line 1 already"),
        ("run: {dir: x, epochs: 1,\n dir: x}", "line 2: the key 'dir' is in line 1 already"),
        ("? [a]\n: 1", "line 1: a key must be a name"),
    ],
)
def test_files_that_are_not_configurations(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert words in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "Is a directory" in refusal(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfd")
    assert "not YAML" in refusal(tmp_path / "binary.yaml")
    (tmp_path / "latin.yaml").write_bytes("run: {epochs: 2}\ndata: {train: caf\u00e9}".encode("latin-1"))
    assert "line 2 is not UTF-8 text: save the file as UTF-8" in refusal(tmp_path / "latin.yaml")
    (tmp_path / "wide.yaml").write_bytes("run: {epochs: 2}".encode("utf-16"))
    assert "line 1 is not UTF-8" in refusal(tmp_path / "wide.yaml")


def test_files_of_other_systems(tmp_path: Path) -> None:
    text = "run: {dir: x, epochs: 2}\ndata:\n  train: pictures\n"
    expected = load(write(tmp_path / "a.yaml", BASE | {"run": {"dir": "x", "epochs": 2}}))
    for name, encoded in (("bom", "\ufeff" + text), ("crlf", text.replace("\n", "\r\n"))):
        (tmp_path / name).write_bytes(encoded.encode())
        assert load(tmp_path / name) == expected


def test_scalars_of_yaml_1_2(tmp_path: Path) -> None:
    """PyYAML reads version 1.1, in which these are 8, true, 90, False, 0o10 and a date."""
    path = tmp_path / "a.yaml"
    path.write_text(
        "run: {dir: on, epochs: 010, seed: 1_000}\ndata: {train: no, val: 2026-11-29, order: block}\n"
        "optim: {lr: 1e-3}\nmethod: {symmetric: yes}\n"
        "model: {backbone_args: {a: 1e-3, b: 0x10, c: 1:30, d: off, e: ~, f: .5, g: 0o10, h: '012'}}\n"
    )
    config = load(path)
    assert (Path(config.run.dir).name, config.run.epochs, config.run.seed) == ("on", 10, 1000)
    assert (Path(config.data.train).name, Path(str(config.data.val)).name) == ("no", "2026-11-29")
    assert config.optim.lr == 1e-3
    assert config.method == adco.Settings(symmetric=True)
    assert list(config.model.backbone_args.values()) == [1e-3, 16, "1:30", "off", None, 0.5, 8, "012"]
    (tmp_path / "b.yaml").write_text(dump(config), encoding="utf-8")
    assert load(tmp_path / "b.yaml") == config
    assert yaml.safe_load(dump(config)) == config.model_dump(mode="json")
    assert ": run.dir: need a text, got 20261129; put it in quotes" in refusal(
        write(path, {**BASE, "run": {"dir": 20261129, "epochs": 1}})
    )
    assert ": run.dir: need a text, got None" in refusal(write(path, {**BASE, "run": {"dir": None, "epochs": 1}}))


def test_keys_of_a_merged_mapping_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "run: {dir: x, epochs: 2}\ndata: {train: x}\nfinetune: &f {lr: 1, <<: {epochs: 3}}\nlinear: {<<: *f, lr: 2}\n"
    )
    assert (load(path).finetune.lr, load(path).linear.lr, load(path).linear.epochs) == (1, 2, 3)


def test_a_base_with_a_key_given_twice(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("run: {dir: x}\nrun: {epochs: 1}\n")
    message = refusal(write(tmp_path / "a.yaml", {"extends": "base.yaml"}))
    assert message == f"{tmp_path / 'base.yaml'}: line 2: the key 'run' is in line 1 already"


TEXTS = ["/data/set #1", "20261129", "*.tar", "null", "yes", "1e3", "a: b", "[x]", "{x}", "@x", "%x", "'x'", '"x']
TEXTS += ["- x", "!x", "a=b", " x", "./~", "x\\n", "2024-13-45", "$HOME", "caf\u00e9", "&x", "|", "x # y"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_on_the_command_line_is_taken_as_it_is(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.yaml", BASE)
    config = load(path, [f"run.dir={text}", f"data.train={text}", f"model.backbone={text}", f"monitor.wandb={text}"])
    assert config.run.dir == config.data.train == str(Path.cwd() / text)
    assert config.model.backbone == text
    assert config.monitor.wandb == (None if text == "null" else text)


def test_named_validation_images(tmp_path: Path) -> None:
    data = {"train": "t", "val": "v", "more_val": {"sketch": "s"}}
    path = write(tmp_path / "a.yaml", {**BASE, "data": data})
    more_val = load(path, ["data.more_val.x_2=/a #1: b"]).data.more_val
    assert more_val == {"sketch": str(Path.cwd() / "s"), "x_2": "/a #1: b"}
    assert load(path, ["data.more_val=null"]).data.paths == {
        "train": str(Path.cwd() / "t"),
        "val": str(Path.cwd() / "v"),
    }
    for override, words in (
        ("data.more_val.my-set=/a", "data.more_val.my-set: need a name of letters, digits and _"),
        ("data.more_val.=/a", "data.more_val.: need a name"),
        (
            "data.more_val.pixels=/a",
            "data.more_val.pixels: knn_pixels has another meaning in the results, need another name",
        ),
        ("data.more_val.a.b=/a", "data.more_val.a: need a text, got {'b': '/a'}"),
        ("data.more_val=/a", "data.more_val: "),
        ("data.val=", "data.more_val.sketch: need data.val as well"),
    ):
        assert words in refusal(path, override)
    text = "run: {dir: r, epochs: 1}\ndata:\n  train: t\n  val: v\n  more_val: {a: b, a: c}\n"
    (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(ValueError, match="line 5: the key 'a' is in line 5 already"):
        load(tmp_path / "b.yaml")
    with pytest.raises(ValueError, match=r"data\.more_val\.a is given twice"):
        load(path, ["data.more_val.a=b", "data.more_val.a=c"])


def test_an_optional_text_is_null_for_an_empty_value_and_for_null(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {**BASE, "model": {"weights": "runs/a"}, "monitor": {"wandb": "p"}})
    for value in ("", "null"):
        config = load(path, [f"model.weights={value}", f"monitor.wandb={value}", f"data.val={value}"])
        assert (config.model.weights, config.monitor.wandb, config.data.val) == (None, None, None)
    assert "run.dir: need a path, got ''" in refusal(path, "run.dir=")
    assert "data.train: need a path, got ''" in refusal(path, "data.train=")


@pytest.mark.parametrize(
    "key", ["run.dir", "data.train", "data.val", "model.weights", "finetune.subset_list", "voc07.root"]
)
def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Paths are relative to the working directory and `~` is expanded, in files and on the command line."""
    section, name = key.split(".")
    path = write(tmp_path / "a.yaml", BASE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for text, expected in (("x/../y", f"{tmp_path}/x/../y"), ("~/x", "/home/me/x"), ("~root/x", "/root/x")):
        assert getattr(getattr(load(path, [f"{key}={text}"]), section), name) == expected
        values: dict[str, Any] = {**BASE, section: {**BASE.get(section, {}), name: text}}
        assert getattr(getattr(load(write(tmp_path / "b.yaml", values)), section), name) == expected
    assert f"{key}: there is no home directory ~nobody-here" in refusal(path, f"{key}=~nobody-here/x")


def test_an_empty_section_has_its_defaults(tmp_path: Path) -> None:
    expected = load(write(tmp_path / "a.yaml", BASE))
    for name in ("engine", "method", "model"):
        assert load(write(tmp_path / "b.yaml", {**BASE, name: None})) == expected
    assert "data: is missing" in refusal(write(tmp_path / "c.yaml", {**BASE, "data": None}))


def test_the_default_path_is_absolute_too(tmp_path: Path) -> None:
    assert load(write(tmp_path / "a.yaml", BASE)).voc07.root == str(Path.cwd() / "VOCdevkit/VOC2007")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run.epochs=5", "run.epochs=7"], "run.epochs is given twice: as 5 and as 7"),
        (["run.dir=a", "optim.lr=1", "run.dir=a"], "run.dir is given twice: as 'a' and as 'a'"),
        (
            ["engine={compile: none}", "engine.compile=blocks"],
            "engine.compile is given twice: as 'none' and as 'blocks'",
        ),
        (["model={head_norm: true}", "model.head_norm=false"], "model.head_norm is given twice: as True and as False"),
        (["model.backbone_args={a: 1}", "model.backbone_args.a=2"], "model.backbone_args.a is given twice"),
        (["engine={compile: true, compile: false}"], "compile: false}': the key 'compile' is in line 1 already"),
    ],
)
def test_an_override_given_twice(tmp_path: Path, overrides: list[str], words: str) -> None:
    assert words in refusal(write(tmp_path / "a.yaml", BASE), *overrides)


def test_single_arguments_of_the_backbone_keep_the_others(tmp_path: Path) -> None:
    model = {"backbone": "resnet18", "backbone_args": {"channels": [8], "layers": [1]}}
    path = write(tmp_path / "a.yaml", {**BASE, "model": model})
    one, other = "model.backbone_args.layers=[2]", "model.backbone_args.act_layer=gelu"
    assert load(path, [one, other]).model.backbone_args == {"channels": [8], "layers": [2], "act_layer": "gelu"}
    assert load(path, [one, "model.backbone=resnet34"]).model.backbone_args == {"layers": [2]}
    assert load(path, ["model.backbone_args={}"]).model.backbone_args == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key, did you mean optim.lr?"),
        ("data.augment.blurr=1", "data.augment.blurr: unknown key, did you mean data.augment.blur?"),
        ("data.on=3", "data.on: unknown key, did you mean data.train?"),
        ("data.vews=3", "data.vews: unknown key, did you mean data.views?"),
        ("optm.lr=1", "optm: unknown key, did you mean optim?"),
        ("workrs=3", "workrs: unknown key, did you mean data.workers?"),
        ("epoch=3", "epoch: unknown key, did you mean run.epochs or linear.epochs or fast.epochs or finetune.epochs?"),
        ("momentums=0", "momentums: unknown key, did you mean bank.momentum or optim.momentum?"),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path / "a.yaml", BASE)
    assert refusal(path, override) == f"{path}: {message}"


def test_unknown_key_of_a_view(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.yaml", BASE), "data.views=[{size: 28, scales: [0.1, 1]}, {size: 28}]")
    assert message.endswith("data.views.0.scales: unknown key, did you mean data.views.scale?")


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.yaml", {"run": {"dir": "x", "epochs": 0}, "optim": {"rl": 1}}))
    for words in ("run.epochs: input should be greater", "data: is missing", "did you mean optim.lr?"):
        assert words in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.epochs=many", "run.epochs: input should be a valid integer"),
        ("run.epochs=2.5", "run.epochs: input should be a valid integer"),
        ("method.symmetric=maybe", "method.symmetric: input should be a valid boolean"),
        ("optim=3", "optim: input should be a valid dictionary"),
        ("optim.lr.x=3", "optim.lr: input should be a valid number"),
        ("model.backbone_args=3", "model.backbone_args: input should be a valid dictionary"),
        ("optim.name=adam", "'sgd', 'lars' or 'adamw', got 'adam'"),
        ("run.epochs=0", "greater than or equal to 1, got 0"),
        ("optim.momentum=1", "optim.momentum: input should be less than 1"),
        ("optim.lr=.inf", "optim.lr: input should be a finite number"),
        ("run.seed=-1", "run.seed"),
        ("data.views=[{size: 28}]", "data.views: need at least 2 views"),
        ("data.views=3", "data.views: input should be a valid tuple"),
        ("data.augment.flip=2", "data.augment.flip: input should be less than or equal to 1, got 2"),
        ("optim.lr_final=1", "optim.lr_final: 1.0 is above optim.lr, 0.03"),
        ("optim.warmup=3", "optim.warmup: 3.0 epochs are more than run.epochs, 2"),
        ("engine.kind=fsdp2", "engine.kind: got 'fsdp2', need one of 'ddp', 'fsdp', 'deepspeed'"),
        ("engine.stage=1", "engine.stage: unknown key for engine.kind=ddp, need engine.kind=deepspeed"),
        (
            "engine.cpu_offload=true",
            "engine.cpu_offload: unknown key for engine.kind=ddp, need engine.kind=fsdp or deepspeed",
        ),
        ("engine={kind: deepspeed, compile: true}", "engine.compile: ZeRO-3 hooks into every layer"),
        ("engine={kind: deepspeed, compile: encoder}", "engine.compile: ZeRO-3 hooks into every layer"),
        ("engine={kind: fsdp, compile: encoder}", "engine.compile: encoder does not go with FSDP2"),
        ("engine={compile: encoder, activation_checkpointing: true}", "engine.compile: encoder does not go with activ"),
        ("engine={compile: all}", "engine.compile: "),
        ("optim.lr", "need section.key=value"),
        ("=3", "need section.key=value"),
        ("optim.lr=[", "optim.lr: value '[' is not YAML"),
        ("data.tran=*.tar", "data.tran: unknown key, did you mean data.train?"),
        ("bank.velocity=null", "bank.velocity: input should be 'fp32', 'bf16' or 'none', got 'null'"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, override: str, words: str) -> None:
    assert words in refusal(write(tmp_path / "a.yaml", BASE), override)


def test_a_window_of_blocks_holds_a_batch(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", BASE)
    small = ["data.block_size=50", "data.block_window=5"]
    assert load(path, small).data.blocks is None
    assert load(path, ["data.order=block"]).data.blocks == (1024, 16)
    assert load(path, [*small, "data.order=block", "data.batch_size=250"]).data.blocks == (50, 5)
    assert refusal(path, *small, "data.order=block") == (
        f"{path}: data.block_window: need at least 6 blocks of 50 images to mix batches of 256 images, got 5"
    )


def test_a_bad_view_is_named_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", BASE)
    message = refusal(path, "data.views=[{size: 28}, {size: 4}]")
    assert message == f"{path}: data.views.1.size: input should be greater than or equal to 8, got 4"


def test_temperatures_that_overflow_fp32(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", BASE)
    assert ": bank.temperature: temperature 0.012 " in refusal(path, "bank.temperature=0.012")
    assert ": method.temperature: temperature 0.012 " in refusal(path, "method.temperature=0.012")
    # fewer terms in the sum allow a lower one
    small = ["bank.temperature=0.012", "bank.size=2"]
    assert "bank.temperature" in refusal(path, *small)
    assert load(path, [*small, "method.batch_keys=false"]).bank.size == 2


def test_the_method_decides_which_keys_there_are(tmp_path: Path) -> None:
    """A section without a name is AdCo's, and a change of the method starts the section empty."""
    path = write(tmp_path / "a.yaml", {**BASE, "method": {"temperature": 0.15, "symmetric": True}})
    assert load(path).method == adco.Settings(temperature=0.15, symmetric=True)
    assert load(path, ["method.temperature=0.3", "method.name=moco"]).method == moco.Settings(temperature=0.3)
    assert load(path, ["method.name=moco", "method.temperature=0.3"]).method == moco.Settings(temperature=0.3)
    assert load(path, ["method.name=adco", "method.crops=mean"]).method == adco.Settings(
        temperature=0.15, symmetric=True, crops="mean"
    )
    above = write(tmp_path / "b.yaml", {"extends": "a.yaml", "method": {"name": "byol", "bn": "local"}})
    assert load(above).method == byol.Settings(bn="local")
    (tmp_path / "c.yaml").write_text(dump(load(above)), encoding="utf-8")
    assert load(tmp_path / "c.yaml") == load(above)


def test_the_engine_decides_which_keys_there_are(tmp_path: Path) -> None:
    """A section without a kind is DDP's, and a change of the kind starts the section empty."""
    path = write(tmp_path / "a.yaml", {**BASE, "engine": {"kind": "deepspeed", "stage": 1, "compile": "blocks"}})
    assert load(path).engine == zero.Settings(stage=1, compile="blocks")
    assert load(path, ["engine.kind=fsdp"]).engine == fsdp.Settings()
    assert load(path, ["engine.stage=2"]).engine == zero.Settings(stage=2, compile="blocks")
    above = write(tmp_path / "b.yaml", {"extends": "a.yaml", "engine": {"kind": "ddp", "compress": "bf16"}})
    assert load(above).engine == ddp.Settings(compress="bf16")
    assert load(write(tmp_path / "c.yaml", {**BASE, "engine": {"compile": "blocks"}})).engine == ddp.Settings(
        compile="blocks"
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["method.name=mocco"],
            "method.name: got 'mocco', need one of 'adco', 'caco', 'acssl', 'moco', 'simclr', 'byol'",
        ),
        (["method.name=moco", "method.symetric=true"], "method.symetric: unknown key, did you mean method.symmetric?"),
        (["method.name=byol", "method.symmetric=true"], "method.symmetric: unknown key"),
        (["method.symetric=true"], "method.symetric: unknown key, did you mean method.symmetric?"),
        (["method.name=byol", "method.bn=none"], "method.bn: input should be 'shuffle', 'sync' or 'local', got 'none'"),
        (["method=3"], "method: input should be a valid dictionary"),
        (["method.name=moco", "method.temperature=0.01"], "method.temperature: temperature 0.01 with 65537 negatives"),
        (["method.name=moco", "bank.size=100"], "bank.size: a queue of 100 is shorter than the 256 keys of a step"),
        (["method.name=simclr", "data.views=[{size: 28}, {size: 28}, {size: 28}]"], "simclr pairs two views, got 3"),
        (["method.name=simclr", "method.bn=shuffle"], "method.bn: input should be 'sync' or 'local', got 'shuffle'"),
        (["method.teacher=false"], "teacher: false needs symmetric: true"),
        (["method.teacher=false", "method.symmetric=true"], "teacher: false needs bn: sync or local"),
        (["method.name=acssl", "method.hardest=129"], "129 after 0 left out (method.guard_top) are 129 columns"),
        (["method.name=acssl", "method.guard_top=0.5"], "16 after 127 left out (method.guard_top) are 143 columns"),
    ],
)
def test_errors_of_methods(tmp_path: Path, overrides: list[str], words: str) -> None:
    assert words in refusal(write(tmp_path / "a.yaml", BASE), *overrides)


def config(**bank: object) -> Config:
    return Config.model_validate({**BASE, "bank": bank})


def changed(config: Config, **sections: dict[str, object]) -> Config:
    values = config.model_dump()
    return Config.model_validate({name: values[name] | sections.get(name, {}) for name in values})


def test_momentum_needs_a_velocity() -> None:
    with pytest.raises(ValueError, match=r"velocity: none goes with momentum: 0; .* momentum 0\.9 take lr: 30"):
        config(velocity="none")
    assert config(velocity="none", momentum=0).bank.velocity == "none"


def test_batches_that_do_not_divide() -> None:
    check_world(config(), 8, 8)
    with pytest.raises(ValueError, match=r"data\.batch_size: 256 does not divide among 3 ranks$"):
        check_world(config(), 3, 3)
    parts = changed(config(), optim={"accumulate": 3})
    with pytest.raises(
        ValueError, match=r"256 does not divide among 2 ranks times 3 micro-batches \(optim\.accumulate\)$"
    ):
        check_world(parts, 2, 2)


def test_batch_norm_needs_two_images() -> None:
    with pytest.raises(ValueError, match="BatchNorm needs at least 2"):
        check_world(config(), 256, 1)
    check_world(changed(config(), method={"bn": "sync"}), 256, 1)
    in_groups = changed(config(), method={"bn_group": 2}, data={"batch_size": 9})
    with pytest.raises(ValueError, match=r"bn_group: 2 divides micro-batches of 9 images"):
        check_world(in_groups, 1, 1)
    check_world(changed(in_groups, method={"bn_group": 3}), 1, 1)


@pytest.mark.parametrize(
    ("size", "shards", "fits"), [(8, 8, True), (7, 8, False), (5, 4, False), (6, 4, False), (7, 4, True)]
)
def test_every_rank_needs_a_negative(size: int, shards: int, fits: bool) -> None:
    # Shards are cut as torch.chunk does: 5 rows for 4 ranks are 2, 2, 1, 0.
    if fits:
        check_world(config(size=size), shards, shards)
    else:
        with pytest.raises(ValueError, match=rf"bank\.size: {size} negatives .* each of {shards} ranks"):
            check_world(config(size=size), shards, shards)
    check_world(config(size=size, placement="node"), shards, 1)
    check_world(config(size=size, placement="replicated"), shards, shards)


def test_every_key_is_described() -> None:
    assert [key.name for key in walk_keys(Config) if not key.field.description] == []


def test_the_reference_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    command = "python -m trainer config --reference > docs/configuration.md"
    assert page.read_text(encoding="utf-8") == config_reference.reference() + "\n", f"run {command}"


def test_explaining_a_key() -> None:
    lines = config_reference.explain("optim.accumulate").splitlines()
    assert lines[0] == "optim.accumulate"
    assert lines[1].startswith("  Number of gradient-accumulation steps")
    assert lines[2:] == ["  type: integer, at least 1", "  default: 1"]
    assert "for: engine.kind=deepspeed\n  may differ" in config_reference.explain("engine.stage")
    assert "type: number or null, above 0\n  default: null" in config_reference.explain("run.max_minutes")


def test_explaining_a_section() -> None:
    text = config_reference.explain("engine")
    assert text.startswith("engine: How student, teacher and optimizer are distributed")
    assert text.count("engine.compile\n") == 1  # one text for all kinds
    assert text.count("engine.cpu_offload\n") == 2
    assert "data.decoder.width" in config_reference.explain("data.decoder")


def test_explaining_an_unknown_key() -> None:
    with pytest.raises(ValueError, match=r"bank\.lrr: unknown key, did you mean bank\.lr\?"):
        config_reference.explain("bank.lrr")
    with pytest.raises(ValueError, match="need CONFIG, --explain KEY or --reference"):
        config_reference.show(None)


@pytest.mark.parametrize(
    ("section", "changes", "expected"),
    [
        ("run", {"dir": "elsewhere", "keep_every": 5, "device": "cpu"}, []),
        ("data", {"workers": 3, "decoder": {"width": 100}}, []),
        ("engine", {"kind": "deepspeed", "stage": 1}, []),
        ("engine", {"kind": "deepspeed", "options": {"a": {"b": 1}}}, []),
        ("linear", {"lr": 1.0}, []),
        ("run", {"seed": 7}, ["run.seed was 0, now 7"]),
        ("bank", {"lr": 1.0}, ["bank.lr was 3.0, now 1.0"]),
        ("model", {"backbone_args": {"width": 2}}, ["model.backbone_args.width was None, now 2"]),
    ],
)
def test_what_may_change_on_resume(section: str, changes: dict[str, object], expected: list[str]) -> None:
    before = config()
    values = before.model_dump()
    kept = {} if section == "engine" else values[section]
    now = Config.model_validate({**values, section: {**kept, **changes}})
    assert changed_keys(before, now) == expected


@pytest.mark.parametrize(("earlier", "now"), [(True, "blocks"), (False, "none")])
def test_compile_was_true_or_false(tmp_path: Path, earlier: bool, now: str) -> None:
    """Earlier versions wrote true or false, in configurations and in the directories of runs."""
    for engine in ({}, {"kind": "fsdp"}, {"kind": "deepspeed", "stage": 2}):
        path = write(tmp_path / "a.yaml", {**BASE, "engine": {**engine, "compile": earlier}})
        assert load(path).engine.compile == now
    assert load(write(tmp_path / "b.yaml", BASE), [f"engine.compile={str(earlier).lower()}"]).engine.compile == now
