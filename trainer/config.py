"""The configuration: its sections, the types, limits and defaults of their keys, and the checks across sections.

`trainer.config_file` reads it from YAML. Unknown keys and values out of range are refused.
"""

from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from data.references import is_reference, normalise, resolve
from data.settings import RESUMABLE, DataSettings, PathText
from models import acssl, adco, byol, caco, method, moco, simclr
from models.negatives.base import BankSettings, num_shards
from trainer.engines import ddp, fsdp, zero
from trainer.engines.optim import Optim
from trainer.evaluate.finetune import Settings as FinetuneSettings
from trainer.evaluate.knn import Settings as EvalSettings
from trainer.evaluate.linear import Settings as LinearSettings
from trainer.evaluate.linear_fast import Settings as FastLinearSettings
from trainer.evaluate.voc07 import Settings as Voc07Settings
from trainer.external import Reference, short_name
from trainer.schema import Section, default_variant

# The keys of section `method` depend on its `name`. Register a new method here.
Method = Annotated[
    adco.Settings | caco.Settings | acssl.Settings | moco.Settings | simclr.Settings | byol.Settings,
    Field(discriminator="name"),
]
# The keys of section `engine` depend on its `kind`. Register a new engine here.
Engine = Annotated[ddp.Settings | fsdp.Settings | zero.Settings, Field(discriminator="kind")]


class Run(Section):
    """Storage, length, device, intervals and time limits of a run."""

    dir: PathText = Field(
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
    log_every: int = Field(
        50,
        ge=1,
        description="Steps between two log rows; there is one at each checkpoint and stop, too.",
        json_schema_extra=RESUMABLE,
    )
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

    backbone: Reference = Field(
        "resnet50", description="Name of a timm model, or file.py:function of one of your own (docs/extend.md)."
    )
    backbone_args: dict[str, Any] = Field({}, description="Arguments for timm's create_model, or for that function.")
    small_images: bool = Field(
        False, description="Replace a ResNet's stem by one 3 x 3 convolution without max pooling, for small images."
    )
    stem_stride: Literal[1, 2] = Field(1, description="Stride of the stem for small images.")
    stem_padding: Literal[1, 2] = Field(1, description="Padding of the stem for small images; solo-learn has 2.")
    dim: int = Field(128, ge=2, description="Dimensions of the embeddings.")
    hidden: int | None = Field(
        None,
        ge=1,
        description="Units of each hidden layer of the projection head; null for as many as the backbone's features.",
    )
    head_layers: Literal[1, 2, 3] = Field(2, description="Linear layers of the projection head.")
    head_norm: bool = Field(False, description="Use BatchNorm in the hidden layers of the projection head.")
    head_final_norm: bool = Field(
        False, description="End projection head and predictor with a BatchNorm without scale and bias (MoCo v3)."
    )
    head_bias: bool = Field(
        True,
        description="Give the last linear layers of projection head and predictor a bias; BYOL's have none. With "
        "head_final_norm there is none in any case.",
    )
    predictor: int | None = Field(None, ge=1, description="Hidden units of the student's predictor; null for none.")
    weights: PathText | None = Field(
        None,
        description="What initialises the encoder: the directory of a run or of an imported model, or a checkpoint as "
        "`import` takes it, such as a folder in timm's or transformers' format; null for random weights.",
    )


class MonitorSettings(Section):
    """Destinations of log rows besides metrics.jsonl."""

    tensorboard: bool = Field(True, description="Write TensorBoard files to `tensorboard/` in the run directory.")
    wandb: str | None = Field(
        None,
        min_length=1,
        description="Project of Weights & Biases, or null for none; its environment variables such as "
        "WANDB_MODE=offline apply, and its files are in `wandb/` in the run directory.",
    )
    prometheus: PathText | None = Field(
        None,
        pattern=r"\.prom$",
        description="File for node_exporter's textfile collector, rewritten with the newest values; null for none.",
    )


class Config(Section):
    """The configuration of a run."""

    run: Run = Field(description="Where a run is stored, how long it takes, and what it records.")
    data: DataSettings = Field(description="The images, how batches are made, and what happens to each view.")
    model: Model = Field(Model(), description="The encoder: backbone, projection head and predictor.")
    method: SerializeAsAny[Method] = Field(
        adco.Settings(),
        description="The method and its loss; `name` chooses it. Besides those of the table it may be file.py:Class, a "
        "method of your own, whose settings are the keys (docs/extend.md).",
    )
    bank: BankSettings = Field(
        BankSettings(), description="The negatives: a bank of learned ones, or a queue of keys, as the method needs."
    )
    optim: Optim = Field(Optim(), description="The encoder's optimizer and its learning-rate schedule.")
    engine: Engine = Field(
        ddp.Settings(),
        description="How student, teacher and optimizer are distributed over the ranks; `kind` chooses the engine.",
        json_schema_extra=RESUMABLE,  # an engine changes rounding errors only, as the number of ranks does
    )
    eval: EvalSettings = Field(
        EvalSettings(),
        description="kNN on the frozen backbone while training; image and batch size of every evaluation.",
        json_schema_extra=RESUMABLE,
    )
    linear: LinearSettings = Field(
        LinearSettings(),
        description="Linear evaluation: one classifier on the frozen backbone.",
        json_schema_extra=RESUMABLE,
    )
    fast: FastLinearSettings = Field(
        FastLinearSettings(),
        description="Fast linear evaluation: many classifiers on stored features.",
        json_schema_extra=RESUMABLE,
    )
    finetune: FinetuneSettings = Field(
        FinetuneSettings(),
        description="Fine-tuning of the whole network with few labels.",
        json_schema_extra=RESUMABLE,
    )
    voc07: Voc07Settings = Field(
        Voc07Settings(), description="SVMs on PASCAL VOC 2007 features.", json_schema_extra=RESUMABLE
    )
    monitor: MonitorSettings = Field(
        MonitorSettings(), description="Where log rows go besides metrics.jsonl.", json_schema_extra=RESUMABLE
    )

    def __reduce__(self) -> Any:
        """Pickle the values, because a process that unpickles them has to import a method from outside first."""
        return Config.model_validate, (self.model_dump(),)

    @field_validator("method", "engine", mode="before")
    @classmethod
    def _default_variant(cls, values: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        return default_variant(field) | values if isinstance(values, dict) else values

    @field_validator("method", mode="wrap")
    @classmethod
    def _external_method(cls, values: Any, known: ValidatorFunctionWrapHandler) -> Any:
        """Let the settings of a method from outside check their own values."""
        name = values.get("name") if isinstance(values, dict) else getattr(values, "name", None)
        if not is_reference(name):
            return known(values)
        if not isinstance(values, dict):
            return values
        settings = settings_class(str(name))
        try:
            return settings.model_validate({**values, "name": normalise(str(name))})
        except ValidationError as error:
            keys = ", ".join(settings.model_fields)
            texts = {"extra_forbidden": f"unknown key, {short_name(str(name))} has {keys}"}
            found = (f"{'.'.join(map(str, e['loc']))}: {texts.get(e['type'], e['msg'])}" for e in error.errors())
            raise ValueError("; method.".join(found)) from None

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        data = self.data
        self.method.check(data.batch_size, len(data.views), self.bank)
        for section, warmup in (("optim", self.optim.warmup), ("bank", self.bank.warmup)):
            if warmup > self.run.epochs:
                raise ValueError(f"{section}.warmup: {warmup} epochs are more than run.epochs, {self.run.epochs}")
        if self.optim.frozen_epochs and not self.model.weights:
            raise ValueError("optim.frozen_epochs: a backbone with random weights would not learn; give model.weights")
        if self.optim.frozen_epochs > self.run.epochs:
            raise ValueError(
                f"optim.frozen_epochs: {self.optim.frozen_epochs} are more than run.epochs, {self.run.epochs}"
            )
        return self


def settings_class(reference: str) -> type[method.Settings]:
    """Return the class of the settings of a method from outside, which the annotation of its `settings` names.

    Raises:
        ValueError: The reference names something else than a method, or one without this annotation.
    """
    try:
        found = resolve(reference)
    except ValueError as error:
        raise ValueError(f"name: {error}") from error
    if not (isinstance(found, type) and issubclass(found, method.Method)):
        raise ValueError(f"name: {reference} is {found!r}, need a subclass of models.method.Method")
    settings = get_type_hints(found).get("settings")
    if not (isinstance(settings, type) and issubclass(settings, method.Settings)):
        raise ValueError(f"name: {reference} needs `settings: Settings` with its subclass of models.method.Settings")
    return settings


def check_world(config: Config, world_size: int, ranks_per_node: int) -> None:
    """Check that the configuration can train on that many ranks.

    Raises:
        ValueError: The batch or the negatives cannot be divided among the ranks.
    """
    shards = num_shards(config.bank.placement, world_size, ranks_per_node)
    negatives = config.method.num_negatives(config.bank)
    batch, accumulate = config.data.batch_size, config.optim.accumulate
    if batch % (world_size * accumulate):
        raise ValueError(
            f"data.batch_size: {batch} does not divide among {world_size} ranks"
            + (f" times {accumulate} micro-batches (optim.accumulate)" if accumulate > 1 else "")
        )
    if config.method.bn != "sync" and batch // (world_size * accumulate) < 2:
        raise ValueError(f"data.batch_size: {batch} gives micro-batches of one image, BatchNorm needs at least 2")
    micro_batch, group = batch // (world_size * accumulate), config.method.bn_group
    if group and micro_batch // -(-micro_batch // group) < 2:
        raise ValueError(
            f"method.bn_group: {group} divides micro-batches of {micro_batch} images into groups of which some have "
            "one image, BatchNorm needs at least 2"
        )
    if negatives and (shards - 1) * -(-negatives // shards) >= negatives:
        raise ValueError(
            f"bank.size: {negatives} negatives do not give each of {shards} ranks at least one; "
            "need a larger bank or bank.placement=replicated"
        )
