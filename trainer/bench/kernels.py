"""Time and memory of the game's arithmetic: `chunked` kernels against the materialised formulation.

One step is what the negatives cost a training step: the contrastive loss of N queries against their
keys and K negatives, its accuracy, its gradient by the queries, and the update of the bank. The
materialised formulation is that of AdCo's published code (github.com/maple-research-lab/AdCo):
autograd through logits of size N x (N + K). In its favour it is asked for nothing else: the published
step also finds the five likeliest classes and takes a third softmax for a metric.

N queries and as many keys, K negatives, D dimensions, C = N + K.
"""

import functools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kernels

TEMPERATURE = 0.12
ADVERSARY_TEMPERATURE = 0.02
LR = 3.0
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4

# How far apart two implementations may be, as a share of the largest value.
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}


@dataclass
class Game:
    """Everything a step reads and writes; the bank is W and v, unit negatives n are made from W."""

    q_ND: Tensor
    k_ND: Tensor
    w_KD: Tensor
    v_KD: Tensor
    n_KD: Tensor

    def copy(self) -> "Game":
        return Game(self.q_ND, self.k_ND, self.w_KD.clone(), self.v_KD.clone(), self.n_KD.clone())

    def transposed(self) -> "Game":
        """The bank as [D, K], the layout of the published code; the names keep theirs."""
        w, v, n = (t.T.contiguous() for t in (self.w_KD, self.v_KD, self.n_KD))
        return Game(self.q_ND, self.k_ND, w, v, n)


class Played(NamedTuple):
    """What a step returns: loss [], share [] of the queries nearest to their own key, gradient by the queries."""

    loss: Tensor
    accuracy: Tensor
    grad_ND: Tensor


Step = Callable[[Game], Played]  # steps the game's bank, too


def run(rows: int, negatives: int, dim: int, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """Compare the implementations on random unit vectors; one dictionary for each.

    rows N, negatives K, dim D, dtype `float32` or `float64`. Keys: impl, N, K, D, dtype,
    seconds_median (of `repeats` steps, the implementations taking turns), peak_bytes (the most that
    a step holds beyond its inputs, counted at the allocator), speedup (over `materialised`).
    Raises ValueError for another type and RuntimeError where the implementations disagree.
    """
    torch_dtype = getattr(torch, dtype, None)
    if torch_dtype not in _TOLERANCES:
        raise ValueError(f"bench kernels: got dtype {dtype!r}, need float32 or float64")
    game = random_game(rows, negatives, dim, torch_dtype)
    steps: dict[str, tuple[Step, Game]] = {
        "materialised": (materialised, game.transposed()),
        "chunked": (functools.partial(ours, implementation="chunked"), game),
    }
    _check_agreement(game, _TOLERANCES[torch_dtype])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, (step, start) in steps.items():
            state = start.copy()  # from the same bank each time, outside the clock
            begin = time.perf_counter()
            step(state)
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "impl": name,
            "N": rows,
            "K": negatives,
            "D": dim,
            "dtype": dtype,
            "seconds_median": medians[name],
            "peak_bytes": _peak_bytes(step, start.copy()),
            "speedup": medians["materialised"] / medians[name],
        }
        for name, (step, start) in steps.items()
    ]


def materialised_peak(rows: int, negatives: int, dim: int) -> int:
    """Bytes that a step of the materialised formulation in fp32 holds at once beyond its inputs."""
    return _peak_bytes(materialised, random_game(rows, negatives, dim, torch.float32).transposed())


def report(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Print the rows of `run` as a table, and write them with the machine they hold for to `out` as JSON."""
    first = rows[0]
    title = f"N = {first['N']}, K = {first['K']}, D = {first['D']}, {first['dtype']}"
    table = Table("implementation", "seconds", "peak memory", "speed-up", "less memory", title=title)
    most = max(row["peak_bytes"] for row in rows)
    for row in rows:
        table.add_row(
            row["impl"],
            f"{row['seconds_median']:.4f}",
            f"{row['peak_bytes'] / 2**20:.1f} MiB",
            f"{row['speedup']:.2f}x",
            f"{most / row['peak_bytes']:.1f}x",
        )
    Console().print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        machine = {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def random_game(rows: int, negatives: int, dim: int, dtype: torch.dtype) -> Game:
    """Random unit queries, keys near them and a bank at rest, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def unit(count: int) -> Tensor:
        return F.normalize(torch.randn(count, dim, generator=generator, dtype=dtype), dim=1)

    q_ND, w_KD = unit(rows), unit(negatives)
    k_ND = F.normalize(q_ND + 2.5 * unit(rows), dim=1)  # about as near as the nearest of many negatives
    return Game(q_ND, k_ND, w_KD, torch.zeros_like(w_KD), w_KD.clone())


def ours(game: Game, implementation: str) -> Played:
    """The step by an implementation of `kernels`."""
    q_ND, k_ND = game.q_ND, game.k_ND
    own_N = torch.arange(len(q_ND), device=q_ND.device)
    score = kernels.score(q_ND, k_ND, own_N, game.n_KD, TEMPERATURE, ADVERSARY_TEMPERATURE, kernels=implementation)
    positive_N = (q_ND.to(score.z_N.dtype) * k_ND).sum(1)
    loss = (score.z_N.log() - positive_N / TEMPERATURE).mean()
    accuracy = (positive_N > score.top_N).double().mean()
    grad_ND = (score.o_ND / score.z_N[:, None] - k_ND) / (TEMPERATURE * len(q_ND))
    coef_N = 1 / (score.za_N * len(q_ND))
    kernels.adversary_step(
        q_ND,
        coef_N,
        game.n_KD,
        game.w_KD,
        game.v_KD,
        temperature=ADVERSARY_TEMPERATURE,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        kernels=implementation,
    )
    return Played(loss, accuracy, grad_ND)


def materialised(game: Game, optimised: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda f: f) -> Played:
    """The published code's step, operation by operation; its bank is [D, K]. `optimised`: such as torch.compile."""
    q_ND = game.q_ND.detach().requires_grad_()
    loss, accuracy, positive_NN, negative_NK, n_DK = optimised(_contrast)(q_ND, game.k_ND, game.w_KD)
    loss.backward()
    with torch.no_grad():
        game.w_KD, game.v_KD = optimised(_ascend)(q_ND, positive_NN, negative_NK, n_DK, game.w_KD, game.v_KD)
    assert q_ND.grad is not None
    return Played(loss.detach(), accuracy, q_ND.grad)


def _contrast(q_ND: Tensor, k_ND: Tensor, w_DK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_DK = F.normalize(w_DK, dim=0)
    positive_NN = torch.einsum("nc,ck->nk", q_ND, k_ND.T)
    negative_NK = torch.einsum("nc,ck->nk", q_ND, n_DK)
    logits_NC = torch.cat([positive_NN, negative_NK], dim=1)
    logits_NC /= TEMPERATURE
    own_N = torch.arange(len(q_ND), device=q_ND.device)
    loss = F.cross_entropy(logits_NC, own_N)
    accuracy = (logits_NC.argmax(1) == own_N).double().mean()
    return loss, accuracy, positive_NN.detach(), negative_NK.detach(), n_DK


def _ascend(
    q_ND: Tensor, positive_NN: Tensor, negative_NK: Tensor, n_DK: Tensor, w_DK: Tensor, v_DK: Tensor
) -> tuple[Tensor, Tensor]:
    logits_NC = torch.cat([positive_NN, negative_NK], dim=1) / ADVERSARY_TEMPERATURE
    p_NK = torch.softmax(logits_NC, dim=1)[:, len(q_ND) :]
    radial_K = torch.mean(p_NK * negative_NK, dim=0)
    g_DK = torch.einsum("cn,nk->ck", q_ND.T, p_NK) / len(q_ND) - radial_K * n_DK
    g_DK = -g_DK / w_DK.norm(dim=0) / ADVERSARY_TEMPERATURE
    v_DK = MOMENTUM * v_DK + g_DK + WEIGHT_DECAY * w_DK
    return w_DK - LR * v_DK, v_DK


def _check_agreement(game: Game, tolerance: float) -> None:
    mine, theirs = game.copy(), game.transposed()
    got, expected = ours(mine, "chunked"), materialised(theirs)
    pairs = {
        "loss": (got.loss, expected.loss),
        "accuracy": (got.accuracy, expected.accuracy),
        "gradient by the queries": (got.grad_ND, expected.grad_ND),
        "bank": (mine.w_KD, theirs.w_KD.T),
        "velocity": (mine.v_KD, theirs.v_KD.T),
    }
    for name, (value, other) in pairs.items():
        error = ((value - other).abs().max() / other.abs().max().clamp(min=1e-30)).item()
        if not error <= tolerance:  # so that NaN is an error, too
            raise RuntimeError(
                f"bench kernels: chunked and materialised differ in {name} by {error:.1e} of its largest"
            )


def _peak_bytes(step: Step, game: Game) -> int:
    """The most memory held at once during a step beyond what was held before, as the profiler saw it allocated."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(game)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
