"""The least time that a kernel can take on a GPU, and the limit that sets it.

The largest of three limits binds: matrix products at the tensor cores' full rate, exponentials at the rate of the
special function units, and the bytes that must cross the memory interface at least once. No kernel reaches it: the
limits overlap at best, and the rates are peaks.

N queries and as many keys, K negatives, D dimensions.
"""

from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from trainer.plan.hardware import GPUS, Gpu

BY_CAPABILITY = {80: GPUS["a100"], 90: GPUS["h100"]}  # by compute capability


class Roofline(NamedTuple):
    """FLOPs and least bytes of a kernel, and the seconds of each limit."""

    flops: float
    bytes: float
    tensor_seconds: float
    exponential_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        """The least time."""
        return max(self[2:])

    @property
    def limit(self) -> str:
        """The limit that sets it."""
        names = ("tensor cores", "exponentials", "memory")
        return max(zip(self[2:], names, strict=True))[1]


def score(gpu: Gpu, queries: int, negatives: int, dim: int, dtype: str) -> Roofline:
    """Return the roofline of `kernels.score` with as many keys as queries.

    With T / T_a = 6 one exponential serves both temperatures.
    """
    columns = queries + negatives
    size = getattr(torch, dtype).itemsize
    inputs, outputs = (queries + columns) * dim * size, queries * (dim + 3) * 4
    return _roofline(gpu, queries * columns, dim, dtype, inputs + outputs)


def adversary(
    gpu: Gpu, queries: int, negatives: int, dim: int, dtype: str, w_bytes: int = 4, v_bytes: int = 4
) -> Roofline:
    """Return the roofline of `kernels.adversary_step`.

    `w_bytes` and `v_bytes` are the bytes of an element of the weights and of the velocity, 0 without velocity.
    """
    size = getattr(torch, dtype).itemsize
    bank = negatives * dim * 2 * (size + w_bytes + v_bytes)  # read and written
    return _roofline(gpu, queries * negatives, dim, dtype, queries * (dim * size + 4) + bank + negatives * 2 * 4)


def _roofline(gpu: Gpu, elements: int, dim: int, dtype: str, bytes: int) -> Roofline:
    """Return the roofline of two products, similarity and weighted sum, of `elements` similarities."""
    product = 2 * elements * dim
    # As in `kernels.triton.tiles.products`: an fp32 product takes three tf32 products, or no tensor cores, and the
    # weighted sums of fp16 are in tf32.
    fp32 = gpu.flops["tf32"] / 3 if dim <= 128 else gpu.fp32_flops
    rates = {
        "bfloat16": (gpu.flops["bfloat16"], gpu.flops["bfloat16"]),
        "float16": (gpu.flops["float16"], gpu.flops["tf32"]),
        "float32": (fp32, fp32),
    }[dtype]
    tensor_seconds = sum(product / rate for rate in rates)
    return Roofline(2 * product, bytes, tensor_seconds, elements / gpu.exponentials, bytes / gpu.bandwidth)


def rows(queries: tuple[int, ...], negatives: tuple[int, ...], dim: int, dtype: str) -> list[dict[str, Any]]:
    """Return one dictionary for each GPU, shape and kernel."""
    return [
        {"gpu": gpu.name, "kernel": kernel.__name__, "N": n, "K": k, "D": dim, "dtype": dtype, **bound._asdict()}
        | {"seconds": bound.seconds, "limit": bound.limit}
        for gpu in BY_CAPABILITY.values()
        for k in negatives
        for n in queries
        for kernel in (score, adversary)
        for bound in (kernel(gpu, n, k, dim, dtype),)
    ]


def report(rows: list[dict[str, Any]]) -> None:
    """Print the result of `rows`, one table for each GPU."""
    for name in dict.fromkeys(row["gpu"] for row in rows):
        first = rows[0]
        table = Table(title=f"Least time on {name}, D = {first['D']}, {first['dtype']}", box=None)
        table.add_column("kernel")
        for column in ("N", "K", "GFLOP", "MiB", "tensor cores", "exponentials", "memory", "limit"):
            table.add_column(column, justify="right")
        for row in rows:
            if row["gpu"] == name:
                limits = (row["tensor_seconds"], row["exponential_seconds"], row["memory_seconds"])
                table.add_row(
                    row["kernel"],
                    f"{row['N']:,}",
                    f"{row['K']:,}",
                    f"{row['flops'] / 1e9:,.0f}",
                    f"{row['bytes'] / 2**20:,.0f}",
                    *(f"{1e3 * seconds:.3f} ms" for seconds in limits),
                    row["limit"],
                )
        Console(width=max(120, Console().width)).print(table)
