"""The Triton kernels compiled for sm_80 and sm_90 without a GPU; run by `test_triton.py`.

The resources and the machine code are read from the binary by the cuobjdump that comes with Triton.
"""

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.tiles import Tiles, products, tiles
from kernels.triton_adversary import adversary_kernel
from kernels.triton_score import score_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
KERNELS = {"score": score_kernel, "adversary": adversary_kernel}
TENSOR_CORE_INSTRUCTION = {8: "HMMA", 9: "HGMMA"}
SHARED_MEMORY = {8: 163 * 1024, 9: 227 * 1024}  # bytes a program may use

POINTERS = {"own_ptr": "*i64", "q_ptr": "*bf16", "c_ptr": "*bf16", "n_ptr": "*bf16"}  # the others are fp32
INTEGERS = ("num_queries", "num_columns", "num_negatives", "tiles_per_split")


class Binary(NamedTuple):
    """Registers of a thread, bytes of its stack (where registers are spilled), shared memory in bytes, code."""

    registers: int
    stack: int
    shared: int
    sass: str


def type_of(argument: str) -> str:
    if argument.endswith("_ptr"):
        return POINTERS.get(argument, "*fp32")
    return "i32" if argument in INTEGERS else "fp32"


def compile_kernel(name: str, major: int, dim: int, tile: Tiles, folder: Path) -> Binary:
    """For bf16 with the published temperatures, with own keys, sizes and addresses that are multiples of 16."""
    similarity, weighted, precision = products(torch.bfloat16)
    constants: dict[str, Any] = {
        "D": dim,
        "B": tile.rows,
        "T": tile.columns,
        "SIMILARITY": similarity,
        "WEIGHTED": weighted,
        "PRECISION": precision,
    }
    if name == "score":
        constants |= {"HAS_OWN": True, "SIXTH_POWER": True, "RAGGED": False}
    arguments = KERNELS[name].arg_names
    signature = {a: "constexpr" if a in constants else type_of(a) for a in arguments}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, a in enumerate(arguments) if a.endswith("_ptr") or a.startswith("num_")
    }
    compiled = triton.compile(
        ASTSource(KERNELS[name], signature, constants, aligned),
        target=GPUTarget("cuda", 10 * major, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = dict(re.findall(r"(REG|STACK):(\d+)", cuobjdump("--dump-resource-usage", cubin)))
    sass = cuobjdump("-sass", cubin)
    return Binary(int(usage["REG"]), int(usage["STACK"]), compiled.metadata.shared, sass)


def cuobjdump(option: str, cubin: Path) -> str:
    return subprocess.run([CUOBJDUMP, option, cubin], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", KERNELS)
def test_fits_the_registers_and_uses_tensor_cores(name: str, dim: int, major: int, tmp_path: Path) -> None:
    binary = compile_kernel(name, major, dim, tiles(name, major, dim, torch.bfloat16), tmp_path)
    print(f"{name} sm_{major}0 D={dim}: {binary.registers} registers, {binary.shared} bytes of shared memory")
    assert binary.stack == 0
    assert not re.search(r"\b(STL|LDL)\b", binary.sass)
    assert binary.registers <= 255
    assert binary.shared <= SHARED_MEMORY[major]
    assert re.search(rf"\b{TENSOR_CORE_INSTRUCTION[major]}\b", binary.sass)


def test_spills_are_seen(tmp_path: Path) -> None:
    binary = compile_kernel("adversary", 8, 128, Tiles(128, 128, 4, 2), tmp_path)
    assert binary.stack > 0
    assert re.search(r"\b(STL|LDL)\b", binary.sass)
