"""The configuration: its sections, the types, limits and defaults of their keys, and the checks across sections.

`trainer.config_file` reads it from YAML. Unknown keys and values out of range are refused.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from data.settings import RESUMABLE, DataSettings
from models import acssl, adco, byol, moco, simclr
from models.negatives.base import BankSettings, num_shards
from trainer.engines import ddp, fsdp, zero
from trainer.engines.optim import Optim
from trainer.schema import Section, default_variant

# The keys of section `method` depend on its `name`. Register a new method here.
Method = Annotated[
    adco.Settings | acssl.Settings | moco.Settings | simclr.Settings | byol.Settings, Field(discriminator="name")
]
# The keys of section `engine` depend on its `kind`. Register a new engine here.
Engine = Annotated[ddp.Settings | fsdp.Settings | zero.Settings, Field(discriminator="kind")]


class Run(Section):
    """Where a run is stored, how long it takes, and what it records."""

    dir: str = Field(
        description="Run directory; the same command with the same directory resumes the run.",
        json_schema_extra=RESUMABLE,
    )
    epochs: int = Field(ge=1, description="Number of epochs.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of weights, order of images, augmentations and shuffling.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device that trains; auto takes a GPU if there is one.", json_schema_extra=RESUMABLE
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Type of autocast; auto is bf16 on a GPU that supports it, else fp32."
    )
    log_every: int = Field(50, ge=1, description="Steps between two log rows.", json_schema_extra=RESUMABLE)
    save_every: int = Field(1000, ge=1, description="Steps between two checkpoints.", json_schema_extra=RESUMABLE)
    keep: int = Field(2, ge=1, description="Number of newest checkpoints to keep.", json_schema_extra=RESUMABLE)
    keep_every: int | None = Field(
        None,
        ge=1,
        description="Epochs between checkpoints that are kept for good; null for none.",
        json_schema_extra=RESUMABLE,
    )
    profile: int = Field(
        0,
        ge=0,
        description="Number of steps to trace on rank 0, from the tenth step after the start on.",
        json_schema_extra=RESUMABLE,
    )
    max_minutes: float | None = Field(
        None,
        gt=0,
        description="Minutes after which the process must have ended; it saves and stops two minutes before, and a "
        "SLURM job is requeued. null for no limit.",
        json_schema_extra=RESUMABLE,
    )
    step_timeout: float = Field(
        600,
        gt=0,
        description="Seconds that a step may take before the process ends itself.",
        json_schema_extra=RESUMABLE,
    )
    long_timeout: float = Field(
        3600,
        gt=0,
        description="Seconds that the first step or an evaluation may take before the process ends itself.",
        json_schema_extra=RESUMABLE,
    )


class Model(Section):
    """The encoder: a timm backbone, a projection head and, for some methods, a predictor."""

    backbone: str = Field("resnet50", description="Name of a timm model.")
    backbone_args: dict[str, Any] = Field({}, description="Arguments for timm's create_model.")
    small_images: bool = Field(
        False, description="Replace a ResNet's stem by one 3 x 3 convolution without max pooling, for small images."
    )
    stem_stride: Literal[1, 2] = Field(1, description="Stride of the stem for small images.")
    dim: int = Field(128, ge=2, description="Dimensions of the embeddings.")
    hidden: int | None = Field(
        None, ge=1, description="Hidden units of the projection head; null for as many as the backbone's features."
    )
    head_norm: bool = Field(False, description="Use BatchNorm in the projection head.")
    predictor: int | None = Field(None, ge=1, description="Hidden units of the student's predictor; null for none.")
    weights: str | None = Field(
        None, description="Run directory, pre-trained or imported, whose student initialises this run; null for none."
    )


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
    """Where log rows go besides metrics.jsonl."""

    tensorboard: bool = Field(True, description="Write TensorBoard files to `tensorboard/` in the run directory.")
    wandb: str | None = Field(
        None,
        min_length=1,
        description="Project of Weights & Biases, or null for none; its environment variables such as "
        "WANDB_MODE=offline apply, and its files are in `wandb/` in the run directory.",
    )
    prometheus: str | None = Field(
        None,
        pattern=r"\.prom$",
        description="File for node_exporter's textfile collector, rewritten with the newest values; null for none.",
    )


class Config(Section):
    """The configuration of a run."""

    run: Run = Field(description="Where a run is stored, how long it takes, and what it records.")
    data: DataSettings = Field(description="The images, how batches are made, and what happens to each view.")
    model: Model = Field(Model(), description="The encoder: backbone, projection head and predictor.")
    method: Method = Field(adco.Settings(), description="The method and its loss; `name` chooses it.")
    bank: BankSettings = Field(
        BankSettings(), description="The negatives: a bank of learned ones, or a queue of keys, as the method needs."
    )
    optim: Optim = Field(Optim(), description="The encoder's optimizer and its learning-rate schedule.")
    engine: Engine = Field(
        ddp.Settings(),
        description="How student, teacher and optimizer are distributed over the ranks; `kind` chooses the engine.",
        json_schema_extra=RESUMABLE,  # an engine changes rounding errors only, as the number of ranks does
    )
    eval: Eval = Field(
        Eval(),
        description="kNN on the frozen backbone while training; image and batch size of every evaluation.",
        json_schema_extra=RESUMABLE,
    )
    linear: Linear = Field(
        Linear(), description="Linear evaluation: one classifier on the frozen backbone.", json_schema_extra=RESUMABLE
    )
    fast: Fast = Field(
        Fast(), description="Fast linear evaluation: many classifiers on stored features.", json_schema_extra=RESUMABLE
    )
    finetune: Finetune = Field(
        Finetune(), description="Fine-tuning of the whole network with few labels.", json_schema_extra=RESUMABLE
    )
    voc07: Voc07 = Field(Voc07(), description="SVMs on PASCAL VOC 2007 features.", json_schema_extra=RESUMABLE)
    monitor: MonitorSettings = Field(
        MonitorSettings(), description="Where log rows go besides metrics.jsonl.", json_schema_extra=RESUMABLE
    )

    @field_validator("method", "engine", mode="before")
    @classmethod
    def _default_variant(cls, values: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        return default_variant(field) | values if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        data = self.data
        self.method.check(data.batch_size, len(data.views), self.bank)
        if self.optim.warmup > self.run.epochs:
            raise ValueError(f"optim.warmup: {self.optim.warmup} epochs are more than run.epochs, {self.run.epochs}")
        return self


def check_world(config: Config, world_size: int, ranks_per_node: int) -> None:
    """Raise ValueError where the configuration does not fit so many ranks."""
    shards = num_shards(config.bank.placement, world_size, ranks_per_node)
    negatives = config.method.num_negatives(config.bank)
    batch, parts = config.data.batch_size, config.optim.accumulate
    if batch % (world_size * parts):
        raise ValueError(
            f"data.batch_size: {batch} does not divide among {world_size} ranks"
            + (f" times {parts} parts (optim.accumulate)" if parts > 1 else "")
        )
    if config.method.bn != "sync" and batch // (world_size * parts) < 2:
        raise ValueError(f"data.batch_size: {batch} leaves one image a rank and part, BatchNorm needs at least 2")
    if negatives and (shards - 1) * -(-negatives // shards) >= negatives:
        raise ValueError(
            f"bank.size: {negatives} negatives do not give each of {shards} ranks at least one; "
            "need a larger bank or bank.placement=replicated"
        )
