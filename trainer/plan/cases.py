"""The cases that the planner compares, and the configuration that trains each of them."""

from typing import Any, NamedTuple

from pydantic import ValidationError

from trainer.config import Config, check_world
from trainer.engines import zero
from trainer.engines.base import EngineSettings
from trainer.plan.hardware import GPUS

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "zero1": {"kind": "deepspeed", "stage": 1},
    "zero2": {"kind": "deepspeed", "stage": 2},
    "zero3": {"kind": "deepspeed", "stage": 3},
}


class PlanCase(NamedTuple):
    """A training to predict: engine (a key of ENGINES), placement of the negatives, nodes, images per GPU."""

    engine: str
    placement: str
    nodes: int
    images: int


def engine_name(engine: EngineSettings) -> str:
    """Return the key of ENGINES."""
    return f"zero{engine.stage}" if isinstance(engine, zero.Settings) else engine.kind


def replaced(config: Config, changes: dict[str, dict[str, Any]]) -> Config:
    """Return the configuration with other values in some sections."""
    values = config.model_dump()
    return Config.model_validate({**values, **{name: {**values[name], **x} for name, x in changes.items()}})


def case_config(config: Config, engine: str, placement: str, batch_size: int, gpu: str) -> Config:
    """Return the configuration of a case, with the choices of `auto` made for the GPU.

    Settings of the configuration's own engine are kept. Compilation and CUDA graph are off, as a dry run has neither;
    ZeRO overlaps its communication on a GPU.
    """
    own = config.engine.model_dump() if engine == engine_name(config.engine) else {}
    own.pop("cuda_graph", None)
    shared = {"activation_checkpointing": config.engine.activation_checkpointing, "compile": "none"}
    values = replaced(config, {"data": {"batch_size": batch_size}, "bank": {"placement": placement}}).model_dump()
    values["engine"] = settings = {**own, **ENGINES[engine], **shared}
    for_gpu = config.run.device != "cpu"
    if config.run.precision == "auto":
        values["run"]["precision"] = "bf16" if for_gpu and "bfloat16" in GPUS[gpu].flops else "fp32"
    if for_gpu and engine.startswith("zero"):
        overlap = {"zero_optimization": {"overlap_comm": True}}
        settings["options"] = zero.merge(overlap, settings.get("options", {}), "")
    return Config.model_validate(values)


def check_ranks(config: Config, batch_size: int, ranks: int, ranks_per_node: int) -> None:
    """Raise ValueError if the batch or the negatives cannot be divided among the ranks."""
    if ranks < 1:
        raise ValueError(f"plan: got {ranks} ranks, need at least 1")
    try:
        check_world(replaced(config, {"data": {"batch_size": batch_size}}), ranks, ranks_per_node)
    except ValidationError as error:
        raise ValueError(f"plan: {ranks} ranks: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        hint = "; --images-per-gpu N makes it N times the GPUs" if "batch_size" in str(error) else ""
        raise ValueError(f"plan: {ranks} ranks: {error}{hint}") from None
