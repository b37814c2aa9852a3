"""A training step as one CUDA graph: captured once and replayed, so that Python launches one thing instead of hundreds.

A replay repeats the kernels of the captured step on the same memory. So all that differs from step to step is data on
the device: the images, which are copied into the memory of the first replay's, and `DeviceInputs`. Python's random
numbers and branches would be those of the captured step for ever. torch seeds its generator on the GPU before a replay
as before an eager step.

Under DDP, torch asks for 11 eager steps before the capture, and for one stream on which DDP is built, these steps run
and the capture happens (https://docs.pytorch.org/docs/stable/notes/cuda.html, "Usage with DistributedDataParallel").
They are training steps, so a run with a graph takes the same steps as one without. The note's third demand, no error
handling of NCCL's watchdog, is from before torch 2.2, since when the watchdog does not look at captured collectives.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from data.references import is_reference
from trainer.config import Config
from trainer.distributed import graphs
from trainer.run.phases import PhaseTimer

log = logging.getLogger(__name__)

WARM_UP = 11  # eager steps before the capture


class DeviceInputs:
    """Holds on the device what differs from step to step besides the images. One copy that the host starts fills it.

    Attributes:
        seed: int64 scalar.
        lr: Learning rate of the encoder, fp32 scalar, as torch's fused optimizers need it.
        backbone_lr: Learning rate of its backbone, fp32 scalar.
        bank_lr: Learning rate of the negatives, fp64 scalar.
        teacher_momentum: fp64 scalar, whose difference from 1 has all digits of fp32.
        orders: The BatchNorm shuffles of a step, int64 [B] each.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._allocate([])

    def fill(
        self,
        seed: int,
        lr: float,
        backbone_lr: float,
        bank_lr: float,
        teacher_momentum: float,
        orders: Sequence[NDArray[np.int64]],
    ) -> None:
        """Set all values. Their memory stays the same unless the number of orders or their lengths change."""
        rates, slow_rates = np.array([lr, backbone_lr], np.float32), np.array([bank_lr, teacher_momentum])
        host = torch.from_numpy(np.concatenate([[seed], rates.view(np.int64), slow_rates.view(np.int64), *orders]))
        if self.device.type == "cuda":
            host = host.pin_memory()  # new memory: that of the step before may not be copied yet
        lengths = [len(order_B) for order_B in orders]
        if lengths != self.lengths:
            self._allocate(lengths)
        self.values.copy_(host, non_blocking=True)

    def _allocate(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.values = torch.empty(4 + sum(lengths), dtype=torch.int64, device=self.device)
        self.seed = self.values[0]
        self.lr, self.backbone_lr = self.values[1:2].view(torch.float32).unbind()
        self.bank_lr, self.teacher_momentum = self.values[2:4].view(torch.float64).unbind()
        self.orders = self.values[4:].split(lengths)


def reason_against(config: Config, device: torch.device) -> str | None:
    """Return why a training cannot use a graph, if its configuration shows it."""
    if device.type != "cuda":
        return f"the device is a {device.type.upper()}"
    if is_reference(config.model.backbone):
        return "a backbone from outside may draw random numbers or decide on the host"
    if config.engine.activation_checkpointing:
        return "engine.activation_checkpointing keeps the generator's state on the host"
    return None


class StepGraph:
    """Runs a step eagerly for the first times, then captures it once and replays it.

    If it cannot be captured on a rank, all ranks say so in a line of the log and go on eagerly: a capture executes
    nothing, so the state is that before it.
    """

    def __init__(self, device: torch.device, phases: PhaseTimer, discard: Callable[[], None]) -> None:
        """Prepare the graph.

        Args:
            device: The GPU.
            phases: The timer of the step. Its phases cannot be timed within a replay, which is one phase, `graph`.
            discard: Forgets a backward pass that an error interrupted.
        """
        self.device, self.phases, self.discard = device, phases, discard
        self.stream = self.make_stream()
        self.warm_up, self.failed = WARM_UP, False
        self.reset()
        graphs.add(self)

    def reset(self) -> None:
        """Forget the graph, after tensors of the step were replaced; it is captured again after as many steps."""
        self.steps = 0
        self.replay: Callable[[], None] | None = None
        self.views: list[Tensor] = []
        self.values = torch.empty(0)

    def __call__(self, step: Callable[[list[Tensor]], Tensor], views: list[Tensor]) -> Tensor:
        """Return the result of `step(views)`. Called by all ranks, always with the same function and shapes.

        Args:
            step: Changes and returns memory of the device only, and reads nothing else that differs between calls.
            views: Tensors on the device.
        """
        if self.failed:
            return step(views)
        with self.on_stream():
            self.steps += 1
            if self.steps <= self.warm_up:
                return step(views)
            if self.replay is None and not self._capture(step, views):
                return step(views)
            with self.phases("graph"):
                torch._foreach_copy_(self.views, views)
                assert self.replay is not None
                self.replay()
                return self.values.clone()

    def _capture(self, step: Callable[[list[Tensor]], Tensor], views: list[Tensor]) -> bool:
        """Capture the step. Returns whether all ranks could."""
        reason = None
        self.views = [view.clone() for view in views]
        try:
            with self.phases.muted():
                self.replay, self.values = self.capture(step, self.views)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
        failures = torch.tensor(float(reason is not None), device=self.device)
        dist.all_reduce(failures)
        self.failed = bool(failures)  # waits for the device, once
        if not self.failed:
            if dist.get_rank() == 0:
                log.info("the step is a CUDA graph from now on; all its phases are timed together as `graph`")
            return True
        self.reset()
        self.discard()
        if reason or dist.get_rank() == 0:
            reason = reason or "other ranks failed"
            log.warning("engine.cuda_graph: the step cannot be captured (%s); training goes on without it", reason)
        return False

    def make_stream(self) -> torch.cuda.Stream | None:
        """Return the stream on which all steps run."""
        return torch.cuda.Stream(self.device)

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Run the `with` block on the graph's stream, after the work of the current one and before its next."""
        assert self.stream is not None
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def capture(self, step: Callable[[list[Tensor]], Tensor], views: list[Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture `step(views)`. Returns a function that replays it, and the result, which a replay overwrites."""
        graph = torch.cuda.CUDAGraph()
        # DALI and the thread that pins memory may call CUDA meanwhile: only calls of this thread are checked.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            values = step(views)
        return graph.replay, values
