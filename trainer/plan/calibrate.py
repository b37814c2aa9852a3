"""Calibrates the planner with a measurement: a file of `python -m trainer bench throughput --out FILE`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from trainer.build import DTYPES
from trainer.config import Config
from trainer.plan.hardware import Gpu
from trainer.plan.predict import StepTime
from trainer.run.files import read_json


class Calibration(NamedTuple):
    """Measured times that replace assumptions.

    Attributes:
        factors: Measured over predicted time of the operators of each phase; None without a measurement.
        data_rate: Images/s that a node's loader delivers; None assumes that it keeps up.
    """

    factors: dict[str, float] | None
    data_rate: float | None


def read_calibration(path: Path, config: Config, gpu: Gpu, predict: Callable[[int, int, int], StepTime]) -> Calibration:
    """Read a measurement of the same training on the same kind of GPU.

    Args:
        path: The file.
        config: The configuration to plan, with its choices of `auto` made.
        gpu: The GPU to plan for.
        predict: Predicts a step from the number of nodes, GPUs per node and images per GPU.

    Raises:
        ValueError: The file is not a result of `bench throughput`, or of another network, method, type or GPU.
    """
    result = read_json(path)
    if "modes" not in result:
        raise ValueError(f"plan: --calibrate {path}: not a file of bench throughput --out")
    expected: dict[str, Any] = {
        "backbone": config.model.backbone,
        "method": config.method.name,
        "views": [view.size for view in config.data.views],
        "negatives": config.bank.size,
        "placement": config.bank.placement,
        "engine": config.engine.kind,
        "precision": str(DTYPES[config.run.precision]).removeprefix("torch."),
    }
    for key, value in expected.items():
        if result[key] != value:
            raise ValueError(f"plan: --calibrate {path}: it has {key} {result[key]}, the configuration {value}")
    if gpu.model not in result["device"]:
        raise ValueError(f"plan: --calibrate {path}: measured on {result['device']}, planned for {gpu.model}")
    modes, nodes, ranks = result["modes"], result["nodes"], result["ranks"]
    factors = None
    if mode := modes.get("synthetic") or modes.get("full"):
        step = predict(nodes, ranks // nodes, result["batch_size"] // ranks)
        factors = calibration_factors(step, {name: phase["seconds"] for name, phase in mode["phases"].items()})
    return Calibration(factors, modes["data"]["images_per_second"] / nodes if "data" in modes else None)


def calibration_factors(step: StepTime, measured: dict[str, float]) -> dict[str, float]:
    """Return measured over predicted time of the operators of each phase; `measured` is in seconds by phase.

    All phases of a step that was replayed as a CUDA graph are measured as one, `graph`, and have the same factor.

    Raises:
        ValueError: A phase took less time than is predicted for its collectives alone.
    """
    groups = {phase.phase: [phase] for phase in step.phases if phase.phase in measured}
    if "graph" in measured:
        groups = {"graph": step.phases}
    factors: dict[str, float] = {}
    for name, phases in groups.items():
        work, network = sum(phase.work for phase in phases), sum(phase.network for phase in phases)
        if not work:
            continue
        if measured[name] <= network:
            raise ValueError(
                f"plan: --calibrate: {name} took {1e3 * measured[name]:.3g} ms, less than the "
                f"{1e3 * network:.3g} ms predicted for its collectives alone; need a file of fewer ranks"
            )
        factors |= {phase.phase: (measured[name] - network) / work for phase in phases}
    return factors
