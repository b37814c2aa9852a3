"""A request to the planner: the options of `python -m trainer plan` with their defaults."""

from dataclasses import dataclass
from pathlib import Path

IMAGENET = 1_281_167  # training images


@dataclass(frozen=True)
class PlanRequest:
    """The hardware to plan for, and what to compare.

    Attributes:
        nodes: Numbers of nodes.
        gpu: A key of `trainer.plan.hardware.GPUS`, or "cpu".
        net: A key of `trainer.plan.hardware.NETWORKS`, or a node's Gb/s as a number.
        gpus_per_node: GPUs of a node, with one process each.
        images_per_gpu: Sets data.batch_size to this times the number of GPUs; None keeps it.
        images: Images of the data set.
        price: Price of an hour of a GPU; None omits the cost.
        data_rate: Images/s that a node's loader delivers; None assumes that it keeps up.
        calibrate: Result of `bench throughput --out` whose times replace assumptions.
        all_engines: Plan for every engine and not only the configuration's.
        recommend: Compare engines, placements of the bank and batches on the largest number of nodes.
    """

    nodes: list[int]
    gpu: str = "a100"
    net: str = "ib-hdr"
    gpus_per_node: int = 8
    images_per_gpu: int | None = None
    images: int = IMAGENET
    price: float | None = None
    data_rate: float | None = None
    calibrate: Path | None = None
    all_engines: bool = False
    recommend: bool = True


def parse_nodes(text: str) -> list[int]:
    """Parse numbers of nodes.

    Args:
        text: "1,2,8" for these numbers; "1..16" for 1 times the powers of two up to 16.

    Raises:
        ValueError: The text is neither.
    """
    first, dots, last = text.partition("..")
    parts = [first, last] if dots else text.split(",")
    if all(part.strip().isdigit() and int(part) for part in parts):
        numbers = [int(part) for part in parts]
        if not dots:
            return sorted(set(numbers))
        if numbers[0] <= numbers[1]:
            return [numbers[0] * 2**i for i in range((numbers[1] // numbers[0]).bit_length())]
    raise ValueError(f"plan: got --nodes {text}, need numbers such as 1,2,8, or 1..1024")
