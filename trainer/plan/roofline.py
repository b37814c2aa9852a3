"""The least time that a kernel can take on a GPU, and what sets it.

Of three limits the largest binds: the matrix products at the tensor cores' full rate, the exponentials at that of the
special function units, the bytes that must cross the memory's interface at least once. No kernel reaches it: the
limits overlap at best, and rates are peaks.

N queries, as many keys, K negatives, D dimensions.
"""

from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class Gpu(NamedTuple):
    """Peaks: dense matrix products in FLOP/s by type, memory in bytes/s, exponentials in 1/s."""

    name: str
    flops: dict[str, float]
    memory: float
    exponentials: float


# Special function units give 16 results per clock and processor: CUDA C++ Programming Guide, "Throughput of Native
# Arithmetic Instructions", compute capabilities 8.0 and 9.0. The clock is the one that the rated FLOP/s belong to.
A100 = Gpu(  # NVIDIA A100 datasheet, 80 GB SXM; 108 processors at 1.41 GHz (GA100 whitepaper)
    "A100 80 GB", {"bfloat16": 312e12, "float16": 312e12, "tf32": 156e12}, 2039e9, 16 * 108 * 1.41e9
)
H100 = Gpu(  # NVIDIA H100 datasheet, SXM5; 132 processors at 1.83 GHz (H100 whitepaper)
    "H100 SXM", {"bfloat16": 989e12, "float16": 989e12, "tf32": 494e12}, 3350e9, 16 * 132 * 1.83e9
)
GPUS = {80: A100, 90: H100}  # by compute capability


class Roofline(NamedTuple):
    """FLOPs and the fewest bytes of a kernel; seconds of each limit."""

    flops: float
    bytes: float
    tensor_seconds: float
    exponential_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        return max(self[2:])

    @property
    def limit(self) -> str:
        names = ("tensor cores", "exponentials", "memory")
        return max(zip(self[2:], names, strict=True))[1]


def score(gpu: Gpu, queries: int, negatives: int, dim: int, dtype: str) -> Roofline:
    """Of `kernels.score` with as many keys as queries, T / T_a = 6: one exponential for both temperatures."""
    columns = queries + negatives
    size = BYTES[dtype]
    inputs, outputs = (queries + columns) * dim * size, queries * (dim + 3) * 4
    return _roofline(gpu, queries * columns, dim, dtype, inputs + outputs)


def adversary(
    gpu: Gpu, queries: int, negatives: int, dim: int, dtype: str, w_bytes: int = 4, v_bytes: int = 4
) -> Roofline:
    """Of `kernels.adversary_step`; w_bytes, v_bytes: of an element of weights and velocity, 0 without velocity."""
    size = BYTES[dtype]
    bank = negatives * dim * 2 * (size + w_bytes + v_bytes)  # read and written
    return _roofline(gpu, queries * negatives, dim, dtype, queries * (dim * size + 4) + bank + negatives * 2 * 4)


def _roofline(gpu: Gpu, elements: int, dim: int, dtype: str, bytes: int) -> Roofline:
    """For two products, similarity and weighted sum, of `elements` times dim multiplications and additions each."""
    product = 2 * elements * dim
    # As in `kernels.triton.tiles.products`: three products of tf32 stand for one of fp32, and fp16 sums up in tf32.
    rates = {
        "bfloat16": (gpu.flops["bfloat16"], gpu.flops["bfloat16"]),
        "float16": (gpu.flops["float16"], gpu.flops["tf32"]),
        "float32": (gpu.flops["tf32"] / 3, gpu.flops["tf32"] / 3),
    }[dtype]
    tensor_seconds = sum(product / rate for rate in rates)
    return Roofline(2 * product, bytes, tensor_seconds, elements / gpu.exponentials, bytes / gpu.memory)


def rows(queries: tuple[int, ...], negatives: tuple[int, ...], dim: int, dtype: str) -> list[dict[str, Any]]:
    """One dictionary for every GPU, shape and kernel."""
    return [
        {"gpu": gpu.name, "kernel": kernel.__name__, "N": n, "K": k, "D": dim, "dtype": dtype, **of._asdict()}
        | {"seconds": of.seconds, "limit": of.limit}
        for gpu in GPUS.values()
        for k in negatives
        for n in queries
        for kernel in (score, adversary)
        for of in (kernel(gpu, n, k, dim, dtype),)
    ]


def report(rows: list[dict[str, Any]]) -> None:
    """Print what `rows` gives, a table for each GPU."""
    for name in dict.fromkeys(row["gpu"] for row in rows):
        first = rows[0]
        table = Table(title=f"At best on {name}, D = {first['D']}, {first['dtype']}", box=None)
        table.add_column("kernel")
        for column in ("N", "K", "GFLOP", "MiB", "tensor cores", "exponentials", "memory", "binds"):
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
