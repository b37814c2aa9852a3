"""Predicts how long a step takes: a roofline for operators, an alpha-beta model for collectives, and their overlap.

    step = max(operators and collectives that are not overlapped, launching) + waiting for the slowest rank

The host never waits for the device within a step, so it launches ahead: only the whole step's sums are compared.

docs/plan.md lists the assumptions and compares the predictions with published measurements.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from trainer.plan.hardware import CPU, Cluster, Gpu
from trainer.plan.nccl import collective_seconds
from trainer.plan.trace import Event, OperatorEvent

# Shares of the peak rates that operators reach. TENSOR_CORES is fitted to ResNet-50's 2,470 images/s on one A100
# (docs/plan.md); the other two are for products without tensor cores and for the memory.
TENSOR_CORES, CUDA_CORES, BANDWIDTH = 0.44, 0.9, 0.8
KERNEL_SECONDS = 2e-6  # the least time of an operator on a GPU, with its start
LAUNCH_SECONDS = 20e-6  # of Python and torch per operator
COMPILED_LAUNCH_SECONDS = 6e-6  # per kernel of a compiled graph
REPLAYED_LAUNCH_SECONDS = 0.2e-6  # per operator of a CUDA graph: the driver's
LOOP_SECONDS = 0.9e-3  # Python of a step outside of all phases, besides its operators (docs/bench/launches.json)
JITTER = 0.01  # standard deviation of a rank's time as a share; all ranks wait for the slowest
OTHER = "other"  # what a step does outside of all phases
OVERLAPPED_PHASES = ("teacher", "student", "backward")  # phases in which engines communicate during arithmetic


class PhaseTime(NamedTuple):
    """The predicted seconds of one phase of a step.

    Attributes:
        phase: Name of the phase.
        compute: Seconds of operators that arithmetic limits.
        memory: Seconds of operators that the memory bandwidth limits.
        host: Seconds of the host to launch the operators, during this phase or others.
        network: Seconds in which the GPU only waits for collectives.
        hidden: Seconds of collectives that arithmetic overlaps.
        sent: Bytes that a rank sends.
        factor: Measured over predicted time of the operators, from a calibration.
    """

    phase: str
    compute: float
    memory: float
    host: float
    network: float
    hidden: float
    sent: int
    factor: float = 1.0

    @property
    def work(self) -> float:
        """Seconds of the operators."""
        return self.factor * (self.compute + self.memory)

    @property
    def seconds(self) -> float:
        """Seconds of the phase on the GPU."""
        return self.work + self.network


class StepTime(NamedTuple):
    """The predicted seconds of a step: of its phases, and of waiting for the slowest rank and for the loader."""

    phases: list[PhaseTime]
    waiting: float
    data: float

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return sum(phase.seconds for phase in self.phases) + self.idle + self.waiting + self.data

    @property
    def host(self) -> float:
        """Seconds of the host to launch the step."""
        return sum(phase.host for phase in self.phases)

    @property
    def idle(self) -> float:
        """Seconds in which the GPU waits for the host to launch."""
        return max(0.0, self.host - sum(phase.seconds for phase in self.phases))

    @property
    def sent(self) -> int:
        """Bytes that a rank sends in the step."""
        return sum(phase.sent for phase in self.phases)

    @property
    def network(self) -> float:
        """Seconds in which the GPU only waits for collectives."""
        return sum(phase.network for phase in self.phases)

    @property
    def bottleneck(self) -> str:
        """Return what limits the step: data, host, or the one of compute, memory and network that takes most time."""
        if self.data:
            return "data"
        if self.idle:
            return "host"
        shares = {
            "compute": sum(phase.factor * phase.compute for phase in self.phases),
            "memory": sum(phase.factor * phase.memory for phase in self.phases),
            "network": self.network,
        }
        return max(shares, key=shares.__getitem__)


def operator_seconds(event: OperatorEvent, gpu: Gpu) -> tuple[float, bool]:
    """Return the seconds that an operator takes, and whether the memory bandwidth limits it."""
    # In fp32, torch convolves with tensor cores (TF32) but multiplies matrices without them; our kernels add up three
    # products in TF32 for each.
    products = 3 if event.name in ("score", "adversary_step", "hardest") else 1 if "convolution" in event.name else 0
    tf32 = gpu.flops.get("tf32", 0.0) / products if products else None
    tensor_cores = gpu.flops.get(event.dtype) or tf32
    product = event.flops / (tensor_cores * TENSOR_CORES if tensor_cores else gpu.fp32_flops * CUDA_CORES)
    compute = max(product, event.exponentials / gpu.exponentials)
    memory = event.bytes / (gpu.bandwidth * BANDWIDTH)
    least = 0.0 if gpu is CPU else KERNEL_SECONDS
    return max(compute, memory, least), memory >= compute


def phase_time(name: str, events: Iterable[Event], cluster: Cluster, factor: float = 1.0) -> PhaseTime:
    """Predict the time of one phase by replaying its events on two streams, for operators and for collectives.

    An engine starts an all-gather when the block before starts, as FSDP2 and ZeRO-3 do. Its reductions may run until
    the phase ends. All other collectives block the operators.

    `factor` is the measured over the predicted time of the operators.
    """
    by_limit = {True: 0.0, False: 0.0}  # seconds by whether the memory limits the operator
    compute_end = network_end = block_start = collectives = host = 0.0
    sent = 0
    for event in events:
        if isinstance(event, OperatorEvent):
            duration, memory_bound = operator_seconds(event, cluster.gpu)
            by_limit[memory_bound] += duration
            compute_end += duration * factor
            host += _launch_seconds(event)
            continue
        duration = collective_seconds(event.collective, event.nodes, cluster)
        collectives += duration
        sent += event.collective.sent
        overlapped = event.engine and name in OVERLAPPED_PHASES
        if overlapped and event.collective.operator not in ("all_gather", "broadcast"):
            network_end = max(network_end, compute_end) + duration
        else:
            network_end = max(network_end, block_start if overlapped else compute_end) + duration
            compute_end = block_start = max(compute_end, network_end)
    operators_only = factor * (by_limit[True] + by_limit[False])
    network = max(0.0, max(compute_end, network_end) - operators_only)  # rounding could make it negative
    if name == OTHER:
        host += LOOP_SECONDS
    if cluster.gpu is CPU:
        host = 0.0
    hidden = max(0.0, collectives - network)
    return PhaseTime(name, by_limit[False], by_limit[True], host, network, hidden, sent, factor)


def _launch_seconds(event: OperatorEvent) -> float:
    if event.replayed:
        return REPLAYED_LAUNCH_SECONDS
    return COMPILED_LAUNCH_SECONDS if event.compiled else LAUNCH_SECONDS


def step_time(
    events: list[Event],
    cluster: Cluster,
    ranks: int,
    images: int,
    factors: dict[str, float] | None = None,
    data_rate: float | None = None,
) -> StepTime:
    """Predict the time of a step.

    Args:
        events: The operators and collectives of one rank's step in order.
        cluster: The hardware.
        ranks: Number of ranks.
        images: Images of a node in a step.
        factors: Measured over predicted time by phase, see `calibration_factors`.
        data_rate: Images/s that a node's loader delivers; None if it always keeps up.
    """
    by_phase: dict[str, list[Event]] = {}
    for event in events:
        by_phase.setdefault(event.phase or OTHER, []).append(event)
    phases = [phase_time(name, own, cluster, (factors or {}).get(name, 1.0)) for name, own in by_phase.items()]
    # The largest of R normally distributed times is about sqrt(2 ln R) standard deviations above the mean.
    work = max(sum(phase.work for phase in phases), sum(phase.host for phase in phases))
    step = StepTime(phases, JITTER * math.sqrt(2 * math.log(ranks)) * work, 0.0)
    return step._replace(data=max(0.0, images / data_rate - step.seconds)) if data_rate else step
