"""Predicts what a compiler makes of the operators of an encoder that is compiled as one graph (engine.compile=encoder).

Convolutions, matrix products and attention stay what they are. The operators between two of them, a region, are fused:
each tensor that enters the region is read once, each that is used after it is written once, and all others stay in
registers. A BatchNorm needs its input's statistics, or its gradient's sums, before it can normalise: it reads the
region's tensors of its size a second time, in a kernel of its own, of which a large one is split into two.
The remaining operators of a region become one kernel for each size of their results.

This is how torch's Inductor schedules a ResNet or ViT, simplified: it looks at the graph and not at the order, so it
can fuse over a convolution in a side branch, and it may recompute cheap operators instead of storing their results.
"""

from collections.abc import Iterable

from trainer.plan.trace import Event, OperatorEvent, Use

COMPILED_PHASES = ("teacher", "student", "backward")
_REDUCTION_KERNELS = 2  # partial sums, and their sum
_BATCH_NORMS = ("native_batch_norm", "native_batch_norm_backward")


def fuse(events: list[Event]) -> list[Event]:
    """Return the events of a step with the operators of student and teacher fused, in the phases of both networks.

    A collective ends the region in which it is issued. The few operators in these phases that belong to the shuffle of
    the teacher's images and to the loss are fused, too.
    """
    last_use: dict[int, int] = {}  # by tensor
    for i, event in enumerate(events):
        if isinstance(event, OperatorEvent):
            last_use |= {use.tensor: i for use in event.reads}
    fused: list[Event] = []
    region: list[OperatorEvent] = []
    for i, event in enumerate(events):
        compiled = isinstance(event, OperatorEvent) and event.phase in COMPILED_PHASES
        if isinstance(event, OperatorEvent) and compiled and not event.flops:
            if region and event.phase != region[0].phase:
                fused += _fuse_region(region, i, last_use)
                region = []
            region.append(event)
            continue
        fused += _fuse_region(region, i, last_use)
        region = []
        fused.append(event._replace(compiled=compiled) if isinstance(event, OperatorEvent) else event)
    return fused + _fuse_region(region, len(events), last_use)


def _fuse_region(region: list[OperatorEvent], end: int, last_use: dict[int, int]) -> list[Event]:
    """Return the kernels of a region that ends before event `end`; their bytes are all in the first."""
    if not region:
        return []
    reads: list[Use] = []  # of tensors from before the region
    writes: list[Use] = []
    own: set[int] = set()  # tensors that the region makes
    for event in region:
        reads += [use for use in event.reads if use.tensor not in own]
        writes += event.writes
        own |= {use.tensor for use in event.writes}
    sizes, made = _covered(reads), _covered(writes)
    # A tensor that existed before, such as a running mean, is written in place.
    kept = [tensor for tensor in made if last_use.get(tensor, -1) >= end or tensor in sizes]
    bytes = sum(sizes.values()) + sum(made[tensor] for tensor in kept)
    norms = [max(event.reads, key=lambda use: use.bytes) for event in region if event.name in _BATCH_NORMS]
    for size in set(_covered(norms).values()):
        # The second pass reads the tensors of this size from before the region, or the input if it is made here.
        bytes += max(size, sum(x for x in sizes.values() if x == size))
    kernels = len({max((use.bytes for use in event.writes), default=0) for event in region})
    kernels += _REDUCTION_KERNELS * len(norms)
    kernel = OperatorEvent(region[0].phase, "fused", region[0].dtype, 0.0, 0, 0.0, compiled=True)
    return [kernel._replace(bytes=bytes), *[kernel] * (kernels - 1)]


def _covered(uses: Iterable[Use]) -> dict[int, int]:
    """Return the bytes that the uses of each tensor cover. The groups of a BatchNorm read a slice of it each."""
    covered: dict[int, int] = {}
    ends: dict[int, int] = {}
    for tensor, start, size in sorted(set(uses)):
        end = max(start + size, ends.get(tensor, 0))
        covered[tensor] = covered.get(tensor, 0) + end - max(start, ends.get(tensor, 0))
        ends[tensor] = end
    return covered
