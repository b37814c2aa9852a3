"""The configuration: what may be in a YAML file, its types and limits, and how command line values change it.

A file holds the sections of `Config`. `extends: other.yaml` takes another file of the same folder as the base, once;
`section.key=value` on the command line is applied last. Unknown keys and values out of range are refused.
"""

import difflib
import functools
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data.settings import DataSettings
from models import acssl, adco, byol, moco, simclr

# Which keys section `method` has is decided by its `name`; a new method's settings are added here.
Method = Annotated[
    adco.Settings | acssl.Settings | moco.Settings | simclr.Settings | byol.Settings, Field(discriminator="name")
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Run(Section):
    """Where and how long. log_every and save_every in steps; keep: checkpoints that stay. keep_every: in epochs; those
    that are saved then stay for good. profile: steps to trace, on rank 0, from the tenth after the start on.

    max_minutes: by which the process has ended: training saves and stops two minutes before; a SLURM job is requeued.
    step_timeout: seconds in which a step must end, or the process ends itself; long_timeout: likewise for the first
    step and evaluations.
    """

    dir: str
    epochs: int = Field(ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 autocast on a GPU that has it, else fp32
    log_every: int = Field(50, ge=1)
    save_every: int = Field(1000, ge=1)
    keep: int = Field(2, ge=1)
    keep_every: int | None = Field(None, ge=1)
    profile: int = Field(0, ge=0)
    max_minutes: float | None = Field(None, gt=0)
    step_timeout: float = Field(600, gt=0)
    long_timeout: float = Field(3600, gt=0)


class Model(Section):
    """See `models.encoder.Encoder`. weights: a run directory, also an imported one, whose student is the start."""

    backbone: str = "resnet50"
    backbone_args: dict[str, Any] = {}
    small_images: bool = False
    stem_stride: Literal[1, 2] = 1  # of the stem for small images
    dim: int = Field(128, ge=2)
    hidden: int | None = Field(None, ge=1)
    head_norm: bool = False
    predictor: int | None = Field(None, ge=1)
    weights: str | None = None


class BankSettings(Section):
    """The negatives: a bank of learned ones (`models.negatives.bank`) or a queue of keys (`models.negatives.queue`).

    Of a queue size, placement, kernels and precision are used. lr_final: cosine from lr to it; constant if None.

    precision: type of queries, keys and unit rows in products; auto: what run.precision says for the encoder.
    weights, velocity: types that are stored; for banks of many millions, bf16 and none take 4 or 6 bytes a number less.
    """

    size: int = Field(65536, ge=1)
    temperature: float = Field(0.02, gt=0)
    lr: float = Field(3.0, ge=0)
    lr_final: float | None = Field(None, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    init: Literal["keys", "random"] = "keys"
    placement: Literal["replicated", "sharded", "node"] = "sharded"
    kernels: Literal["auto", "reference", "chunked", "triton"] = "auto"  # auto: triton on a GPU, else chunked
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    weights: Literal["fp32", "bf16"] = "fp32"
    velocity: Literal["fp32", "bf16", "none"] = "fp32"

    @model_validator(mode="after")
    def _momentum_needs_velocity(self) -> "BankSettings":
        if self.velocity == "none" and self.momentum > 0:
            raise ValueError(
                f"velocity: none goes with momentum: 0; for the same pace as momentum {self.momentum:g} "
                f"take lr: {self.lr / (1 - self.momentum):g}"
            )
        return self


class Optim(Section):
    """The encoder's optimizer. lr and lr_final are per 256 images of a batch; warmup in epochs.

    accumulate: parts that a rank cuts its batch into, one after the other, to save memory. Each part has its own
    batch statistics and its own batch keys. clip: the gradient's length is cut to it. decay_norm_and_bias: weight
    decay (and LARS's adaptation) for vectors and scalars too, and not for matrices and filters alone. momentum: of sgd
    and lars.
    """

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    lr: float = Field(0.03, gt=0)
    lr_final: float = Field(0.0, ge=0)
    warmup: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    decay_norm_and_bias: bool = True
    accumulate: int = Field(1, ge=1)
    clip: float | None = Field(None, gt=0)


class EngineSettings(Section):
    """How the networks are spread over the ranks, see docs/engines.md. After each option, the kinds that take it.

    stage: of ZeRO; 1 shards the optimizer's state, 2 gradients too, 3 parameters too. placement: sharded over all
    ranks, or over those of a node. options: more of DeepSpeed's own JSON, refused where it contradicts the rest.
    """

    kind: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    activation_checkpointing: bool = False  # all
    compile: bool = False  # all
    compress: Literal["none", "bf16"] = "none"  # ddp: what gradients travel in
    reshard_after_forward: bool = True  # fsdp
    placement: Literal["sharded", "node"] = "sharded"  # fsdp
    cpu_offload: bool = False  # fsdp, deepspeed
    stage: Literal[1, 2, 3] = 3  # deepspeed
    options: dict[str, Any] = {}  # deepspeed

    def check(self) -> None:
        """Raise ValueError for an option that this kind does not take."""
        takes = {
            "compress": ("ddp",),
            "reshard_after_forward": ("fsdp",),
            "placement": ("fsdp",),
            "cpu_offload": ("fsdp", "deepspeed"),
            "stage": ("deepspeed",),
            "options": ("deepspeed",),
        }
        for name, kinds in takes.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"engine.{name}: is for engine.kind={' or '.join(kinds)}, got {self.kind}")
        if self.compile and self.kind == "deepspeed" and self.stage == 3:
            raise ValueError("engine.compile: ZeRO-3 hooks into every layer; need engine.kind=fsdp or another stage")


class Eval(Section):
    """Weighted kNN on the frozen backbone, every `knn_every` epochs and at the end; 0: never while training.

    size and batch_size: of every evaluation.
    """

    knn_every: int = Field(10, ge=0)
    k: int = Field(200, ge=1)
    temperature: float = Field(0.1, gt=0)
    batch_size: int = Field(256, ge=1)
    size: int | None = Field(None, ge=8)  # pixels; None: that of views[0]


def _share(value: tuple[float, float]) -> tuple[float, float]:
    low, high = value
    if not 0 < low <= high <= 1:
        raise ValueError("need (low, high) with 0 < low <= high <= 1")
    return value


Share = Annotated[tuple[float, float], AfterValidator(_share)]


class Linear(Section):
    """The linear protocol, see `trainer.evaluate.linear`. Images are of the size of kNN's, eval.size.

    lr and lr_final for a batch as it is, batch_size that of all ranks; scale: of the random crops, in shares of the
    picture's area. save_every in steps. fast: see `Fast`.
    """

    lr: float = Field(10.0, gt=0)
    lr_final: float = Field(0.01, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(256, ge=1)
    epochs: int = Field(100, ge=1)
    scale: Share = (0.08, 1.0)
    seed: int = Field(0, ge=0, lt=2**63)
    save_every: int = Field(1000, ge=1)
    fast: bool = False


class Fast(Section):
    """The fast linear protocol, see `trainer.evaluate.linear_fast`: every lr with every weight decay, for features of
    which the average squared length is 1. holdout: share of the training images on which the best is chosen. crops:
    random ones of each training image, as linear.scale says; 0 for the central view alone.
    """

    lrs: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
    weight_decays: tuple[float, ...] = (0.0, 1e-6, 1e-5, 1e-4)
    batch_size: int = Field(1024, ge=1)
    epochs: int = Field(20, ge=1)
    holdout: float = Field(0.1, gt=0, lt=1)
    crops: int = Field(4, ge=0)

    @field_validator("lrs", "weight_decays")
    @classmethod
    def _some(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or min(values) < 0:
            raise ValueError("need at least one number, none below 0")
        return values


class Finetune(Section):
    """Fine-tuning with few labels, see `trainer.evaluate.finetune`; lr is per 256 images of a batch of all ranks.

    labels: share of the training images whose labels are used, drawn by subset_seed, or subset_list: file with their
    names. seeds: of the head and the order; one training each. epochs: None for 60 up to 1 % of the labels, else 30.
    head_lr: the head's learning rate is that many times lr; layer_decay: each layer's is that many times the next's.
    """

    labels: float = Field(0.01, gt=0, le=1)
    subset_list: str | None = None
    subset_seed: int = Field(0, ge=0, lt=2**63)
    seeds: tuple[int, ...] = (0, 1, 2)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.05, gt=0)
    head_lr: float = Field(1.0, gt=0)
    layer_decay: float = Field(1.0, gt=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(256, ge=1)
    epochs: int | None = Field(None, ge=1)
    scale: Share = (0.08, 1.0)
    save_every: int = Field(1000, ge=1)

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise ValueError("need different numbers from 0 on")
        return seeds


class Voc07(Section):
    """SVMs on frozen features, see `trainer.evaluate.voc07`. costs: C, tried by cross-validation; folds: of it."""

    root: str = "VOCdevkit/VOC2007"
    costs: tuple[float, ...] = (*(10.0**power for power in range(-7, 3)), *(0.5**power for power in range(4, 20)))
    folds: int = Field(3, ge=2)
    seed: int = Field(0, ge=0, lt=2**31)


class MonitorSettings(Section):
    """Where the log goes beside metrics.jsonl. tensorboard: the run directory's `tensorboard/`.

    wandb: project of Weights & Biases, None for none; its variables such as WANDB_MODE=offline apply, and its files are
    in the run directory's `wandb/`. prometheus: file with the newest values, for node_exporter's textfile collector.
    """

    tensorboard: bool = True
    wandb: str | None = Field(None, min_length=1)
    prometheus: str | None = Field(None, pattern=r"\.prom$")


class Config(Section):
    run: Run
    data: DataSettings
    model: Model = Model()
    method: Method = adco.Settings()
    bank: BankSettings = BankSettings()
    optim: Optim = Optim()
    engine: EngineSettings = EngineSettings()
    eval: Eval = Eval()
    linear: Linear = Linear()
    fast: Fast = Fast()
    finetune: Finetune = Finetune()
    voc07: Voc07 = Voc07()
    monitor: MonitorSettings = MonitorSettings()

    @field_validator("method", mode="before")
    @classmethod
    def _default_method(cls, method: Any) -> Any:
        return {"name": "adco", **method} if isinstance(method, dict) else method

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        data = self.data
        self.method.check(data.batch_size, len(data.views), self.bank.size, self.bank.temperature)
        self.engine.check()
        if self.optim.lr_final > self.optim.lr:
            raise ValueError(f"optim.lr_final: {self.optim.lr_final} is above optim.lr, {self.optim.lr}")
        if self.optim.warmup > self.run.epochs:
            raise ValueError(f"optim.warmup: {self.optim.warmup} epochs are more than run.epochs, {self.run.epochs}")
        return self


def check_world(config: Config, world_size: int, ranks_per_node: int) -> None:
    """Raise ValueError where the configuration does not fit so many ranks."""
    shards = {"replicated": 1, "sharded": world_size, "node": ranks_per_node}[config.bank.placement]
    batch, parts = config.data.batch_size, config.optim.accumulate
    if batch % (world_size * parts):
        raise ValueError(
            f"data.batch_size: {batch} does not divide among {world_size} ranks"
            + (f" times {parts} parts (optim.accumulate)" if parts > 1 else "")
        )
    if config.method.bn != "sync" and batch // (world_size * parts) < 2:
        raise ValueError(f"data.batch_size: {batch} leaves one image a rank and part, BatchNorm needs at least 2")
    if config.method.negatives != "none" and (shards - 1) * -(-config.bank.size // shards) >= config.bank.size:
        raise ValueError(
            f"bank.size: {config.bank.size} negatives do not give each of {shards} ranks at least one; "
            "need a larger bank or bank.placement=replicated"
        )


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """The configuration of a YAML file, with `section.key=value` overrides.

    Raises ValueError, one line, for a file that is missing or not YAML, and for unknown or unfit keys.
    """
    values = _read(path)
    base = values.pop("extends", None)
    if base is not None:
        base_path = path.parent / str(base)
        base_values = _read(base_path)
        if "extends" in base_values:
            raise ValueError(f"{path}: extends {base}, which extends another; only one level is allowed")
        values = _lay_over(base_values, values)
    values = _lay_over(values, functools.reduce(_merge, map(_parse_override, overrides or []), {}))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: " + "; ".join(_describe(e) for e in error.errors())) from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level of dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: need sections such as 'run:' and 'data:', got {type(values).__name__}")
    return values


def _parse_override(text: str) -> dict[str, Any]:
    """`a.b=1` as {"a": {"b": 1}}."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"got {text!r}, need section.key=value")
    try:
        nested: Any = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{name}: value {value!r} is not YAML: {' '.join(str(error).split())}") from error
    for key in reversed(name.split(".")):
        nested = {key: nested}
    return nested


def _lay_over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`; a method that `top` names does not take over the keys of another."""
    below, above = base.get("method"), top.get("method")
    if isinstance(below, dict) and isinstance(above, dict):
        name = below.get("name", "adco")
        if above.get("name", name) != name:
            base = {**base, "method": {}}
    return _merge(base, top)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        # backbone_args belongs to one backbone: another file's are not mixed in
        if isinstance(below, dict) and isinstance(value, dict) and key != "backbone_args":
            value = _merge(below, value)
        merged[key] = value
    return merged


def _describe(error: Any) -> str:
    """One pydantic error in words, with the nearest valid name for an unknown key."""
    method = None
    if error["loc"][:1] == ("method",) and len(error["loc"]) > 1:  # pydantic puts the method's name into the place
        method, error = error["loc"][1], {**error, "loc": ("method", *error["loc"][2:])}
    place = ".".join(map(str, error["loc"]))
    if error["type"] == "union_tag_invalid":
        return f"{place}.name: got {error['ctx']['tag']!r}, need one of {error['ctx']['expected_tags']}"
    if error["type"] == "extra_forbidden":
        names: dict[str, list[str]] = {}
        for name in _names(Config, method):
            if "." not in place:  # a section, or a key of any section
                names.setdefault(name.split(".")[-1], []).append(name)
            elif "." in name:
                names[name] = [name]
        near = difflib.get_close_matches(place, names, n=1, cutoff=0)[0]
        return f"{place}: unknown key, did you mean {' or '.join(names[near])}?"
    if error["type"] == "missing":
        return f"{place}: is missing"
    message = error["msg"].removeprefix("Value error, ")
    if not place:  # a check of several keys names them itself
        return str(message)
    return f"{place}: {message[0].lower()}{message[1:]}, got {error['input']!r}"


def _names(section: type[BaseModel], method: str | None = None, prefix: str = "") -> list[str]:
    """The dotted names of all keys, those of sections too; in section `method` the keys of one, or of all."""
    names = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        inner = get_args(field.annotation) or (field.annotation,)
        if get_origin(field.annotation) is tuple:
            inner = inner[:1]
        for model in inner:
            if isinstance(model, type) and issubclass(model, BaseModel):
                tag = model.model_fields["name"].default if name == "method" else None
                if method is None or tag in (None, method):
                    names += [n for n in _names(model, method, f"{prefix}{name}.") if n not in names]
    return names
