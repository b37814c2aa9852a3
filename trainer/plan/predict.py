"""From what a step does to how long it takes: a roofline for operators, alpha-beta for collectives, and their overlap.

    step = sum over phases of max(GPU, host) + collectives that nothing hides, times what the slowest rank takes more

docs/plan.md says which assumptions are in it, and what it was held against.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from trainer.plan.hardware import CPU, Cluster, Gpu, seconds
from trainer.plan.trace import Call, Op

# What is reached of the peaks: of tensor cores, fitted to ResNet-50's 2,470 images/s on one A100 (docs/plan.md); of
# other multiplication; of the memory.
TENSOR, PLAIN, MEMORY = 0.44, 0.9, 0.8
LAUNCH = 20e-6  # seconds of Python and torch for an operator; the GPU waits where it takes less
JITTER = 0.01  # spread of ranks' times, as a share; all wait for the slowest
OVERLAPPING = ("teacher", "student", "backward")  # phases in which engines send beside arithmetic


class PhaseTime(NamedTuple):
    """Seconds of a phase. compute, memory: of operators, by what binds each. host: to launch them. network: in which
    nothing else happens. hidden: of collectives behind arithmetic. factor: by which a measurement differs from
    what the rest says. sent: bytes.
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
        """Without waiting for the network."""
        return self.factor * max(self.compute + self.memory, self.host)

    @property
    def seconds(self) -> float:
        return self.work + self.network


class Step(NamedTuple):
    """waiting: seconds for the slowest rank. data: seconds for the loader, beyond all others."""

    phases: list[PhaseTime]
    waiting: float
    data: float

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases) + self.waiting + self.data

    @property
    def sent(self) -> int:
        return sum(phase.sent for phase in self.phases)

    @property
    def network(self) -> float:
        return sum(phase.network for phase in self.phases)

    @property
    def binds(self) -> str:
        """compute, memory, host (launching operators), network or data: what takes most of the step."""
        if self.data:
            return "data"
        shares = dict.fromkeys(("compute", "memory", "host"), 0.0)
        for phase in self.phases:
            gpu = phase.compute + phase.memory
            if phase.host > gpu:
                shares["host"] += phase.work
            elif gpu:
                shares["compute"] += phase.work * phase.compute / gpu
                shares["memory"] += phase.work * phase.memory / gpu
        return max((*shares.items(), ("network", self.network)), key=lambda share: share[1])[0]


def op_seconds(op: Op, gpu: Gpu) -> tuple[float, bool]:
    """Of an operator, and whether it is the memory that binds it."""
    rates = gpu.peaks.flops
    tf32 = rates.get("tf32") if "convolution" in op.name or op.name in ("score", "adversary_step", "hardest") else None
    tensor = rates.get(op.dtype) or tf32  # torch multiplies fp32 matrices without tensor cores, convolves with them
    product = op.flops / (tensor * TENSOR if tensor else gpu.fp32 * PLAIN)
    compute = max(product, op.exponentials / gpu.peaks.exponentials)
    memory = op.bytes / (gpu.peaks.memory * MEMORY)
    return max(compute, memory), memory >= compute


def phase_time(name: str, events: Iterable[Op | Call], cluster: Cluster, factor: float = 1.0) -> PhaseTime:
    """Of the events of one phase, played in order on two streams, for operators and for collectives.

    What an engine gathers is begun when the block before begins, as FSDP2 and ZeRO-3 do; what it reduces has time
    until the phase ends; for other collectives everything waits.
    """
    spent = {True: 0.0, False: 0.0}
    now = free = block = total = 0.0
    operators, sent = 0, 0
    for event in events:
        if isinstance(event, Op):
            took, by_memory = op_seconds(event, cluster.gpu)
            spent[by_memory] += took
            now += took * factor
            operators += 1
            continue
        took = seconds(event.collective, event.nodes, cluster)
        total += took
        sent += event.collective.sent
        beside = event.engine and name in OVERLAPPING
        if beside and event.collective.operator not in ("all_gather", "broadcast"):
            free = max(free, now) + took
        else:
            free = max(free, block if beside else now) + took
            now = block = max(now, free)
    end = max(now, free)
    network = max(0.0, end - factor * (spent[True] + spent[False]))  # sums of the same, but for rounding
    host = 0.0 if cluster.gpu is CPU else operators * LAUNCH
    return PhaseTime(name, spent[False], spent[True], host, network, max(0.0, total - network), sent, factor)


def step_time(
    events: list[Op | Call],
    cluster: Cluster,
    ranks: int,
    images: int,
    factors: dict[str, float] | None = None,
    data_rate: float | None = None,
) -> Step:
    """images: of a node in a step. factors: of `calibration`. data_rate: images/s that a node's loader gives."""
    by_phase: dict[str, list[Op | Call]] = {}
    for event in events:
        by_phase.setdefault(event.phase or "other", []).append(event)
    phases = [phase_time(name, own, cluster, (factors or {}).get(name, 1.0)) for name, own in by_phase.items()]
    took = sum(phase.seconds for phase in phases)
    # The largest of R normally distributed times is about sqrt(2 ln R) standard deviations above the mean.
    waiting = JITTER * math.sqrt(2 * math.log(ranks)) * sum(phase.work for phase in phases)
    data = max(0.0, images / data_rate - took - waiting) if data_rate else 0.0
    return Step(phases, waiting, data)


def calibration(step: Step, measured: dict[str, float]) -> dict[str, float]:
    """Factors by which measured seconds of phases differ from a step that was predicted for the same ranks and batch.

    Raises ValueError for a phase that was measured to take less than its collectives alone are predicted to.
    """
    factors = {}
    for phase in step.phases:
        if phase.phase in measured and phase.work:
            left = measured[phase.phase] - phase.network
            if left <= 0:
                raise ValueError(
                    f"plan: --calibrate: {phase.phase} took {1e3 * measured[phase.phase]:.3g} ms, less than the "
                    f"{1e3 * phase.network:.3g} ms predicted for its collectives alone; need a file of fewer ranks"
                )
            factors[phase.phase] = left / phase.work
    return factors
