"""The planner: times computed by hand, calibration, published measurements, tables and invalid input."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from tests.trainer.small import VIT, VIT_ARGS, small_config
from trainer.__main__ import app
from trainer.bench import throughput
from trainer.config import Config
from trainer.plan.calibrate import Calibration, calibration_factors
from trainer.plan.cases import PlanCase
from trainer.plan.collectives import Collective
from trainer.plan.hardware import GPUS, make_cluster
from trainer.plan.nccl import collective_seconds
from trainer.plan.planner import DryRuns, _Planner, make_plan
from trainer.plan.predict import (
    BANDWIDTH,
    CUDA_CORES,
    KERNEL_SECONDS,
    LAUNCH_SECONDS,
    REPLAYED_LAUNCH_SECONDS,
    TENSOR_CORES,
    operator_seconds,
    phase_time,
    step_time,
)
from trainer.plan.report import WIDTH, report
from trainer.plan.request import PlanRequest, parse_nodes
from trainer.plan.shape_only import ShapeOnlyMode
from trainer.plan.trace import CollectiveEvent, Event, OperatorEvent, StepTrace

CLUSTER = make_cluster("a100", 8, "ib-hdr")
MB = 10**6


def collective(operator: str, ranks: int, sent: int) -> Collective:
    return Collective(operator, (1,), "float32", ranks, sent)


@pytest.mark.parametrize(
    ("call", "nodes", "microseconds"),
    [
        # 100 MB over NVLink: 14 hops in a ring at full bandwidth.
        (collective("all_reduce", 8, 175 * MB), 1, 8.4 + 14 * 3.4 + 175e6 / 235e3),
        # 1 kB: the LL protocol (flags in the data) is the fastest, at a quarter of the bandwidth.
        (collective("all_reduce", 8, 1792), 1, 3.6 + 14 * 0.47 + 1792 / 235e3 * 4),
        # 16 nodes, 1 kB: a tree crosses the network 2 log2(16) times, the ring 30 times.
        (collective("all_reduce", 128, 2032), 16, 4.4 + 2 * (7 * 0.52 + 4 * 5.0) + 2048 / 180e3 * 3.8 / 0.9),
        # Two nodes, each with 8 NICs of 25 GB/s that reach nine tenths of it.
        (collective("all_gather", 16, 150 * MB), 2, 8.4 + 14 * 3.4 + 9.6 + 150e6 / 180e3),
        # One GPU of each of two nodes gets an eighth of the network.
        (collective("reduce_scatter", 2, 50 * MB), 2, 8.4 + 9.6 + 50e6 / 22.5e3),
        # 8 of the 15 peers are in the other node; two rounds of eight peers.
        (collective("all_to_all", 16, 15 * MB), 2, 3.6 + 2 * 2.7 + 8e6 / 22.5e3),
        (collective("all_to_all", 8, 7 * MB), 1, 3.6 + 0.47 + 7e6 / 235e3),
        (collective("broadcast", 1, 0), 1, 0.0),
    ],
)
def test_collective_seconds(call: Collective, nodes: int, microseconds: float) -> None:
    assert 1e6 * collective_seconds(call, nodes, CLUSTER) == pytest.approx(microseconds)


def test_network_bandwidth() -> None:
    assert make_cluster("a100", 4, "ib-hdr").network == pytest.approx(0.9 * 4 * 25e9)
    assert make_cluster("h100", 8, "ethernet-100").network == pytest.approx(0.9 * 12.5e9)
    assert make_cluster("h100", 8, "400").network == pytest.approx(0.9 * 50e9)


def op(
    phase: str = "backward", flops: float = 0.0, bytes: int = 0, name: str = "mm", dtype: str = "bfloat16"
) -> OperatorEvent:
    return OperatorEvent(phase, name, dtype, flops, bytes, 0.0)


def test_operator_seconds() -> None:
    gpu, v100 = GPUS["a100"], GPUS["v100"]
    product, read = operator_seconds(op(flops=1e12, bytes=1), gpu), operator_seconds(op(flops=1, bytes=10**9), gpu)
    assert [product[0], read[0]] == pytest.approx([1e12 / (312e12 * TENSOR_CORES), 1e9 / (2039e9 * BANDWIDTH)])
    assert [product[1], read[1]] == [False, True]
    # In fp32, torch convolves with TF32 and multiplies matrices without tensor cores.
    by_name = [operator_seconds(op(flops=1e12, name=name, dtype="float32"), gpu)[0] for name in ("convolution", "mm")]
    assert by_name == pytest.approx([1e12 / (156e12 * TENSOR_CORES), 1e12 / (19.5e12 * CUDA_CORES)])
    assert operator_seconds(op(flops=1e12, name="convolution", dtype="float32"), v100)[0] == pytest.approx(
        1e12 / (15.7e12 * CUDA_CORES)
    )


MS = round(2039e9 * BANDWIDTH / 1e3)  # bytes that take a millisecond


def call(phase: str, operator: str, engine: bool = True) -> CollectiveEvent:
    return CollectiveEvent(phase, collective(operator, 8, 500 * MB), 1, engine)


SENT = 1e3 * collective_seconds(call("", "all_gather").collective, 1, CLUSTER)  # about 2.2 ms
REDUCED = 1e3 * collective_seconds(call("", "all_reduce").collective, 1, CLUSTER)


@pytest.mark.parametrize(
    ("events", "exposed", "hidden"),
    [
        # The rest of the phase overlaps a reduction.
        ([1, "all_reduce", 1, 1], REDUCED - 2, 2.0),
        ([1, "all_reduce", 9], 0.0, REDUCED),
        # Collectives run one after the other.
        ([1, "reduce_scatter", 0.5, "reduce_scatter", 1], 2 * SENT - 1.5, 1.5),
        # A block's parameters are gathered while the previous block runs; the first block waits for its own.
        (["all_gather", 9, "all_gather", 9], SENT, SENT),
        (["all_gather", 1, "all_gather", 1], 2 * SENT - 1, 1.0),
    ],
)
def test_overlap_of_collectives(events: list[float | str], exposed: float, hidden: float) -> None:
    """Numbers are milliseconds of operators, names are collectives of an engine."""
    made = [call("backward", x) if isinstance(x, str) else op(bytes=round(x * MS)) for x in events]
    time = phase_time("backward", made, CLUSTER)
    assert [1e3 * time.network, 1e3 * time.hidden] == pytest.approx([exposed, hidden], abs=1e-5)
    assert 1e3 * time.memory == pytest.approx(sum(x for x in events if not isinstance(x, str)), rel=1e-6)
    assert time.sent == 500 * MB * sum(isinstance(x, str) for x in events)


def test_collectives_without_overlap() -> None:
    """Those of the method, and those outside of forward and backward."""
    for phase, engine in (("backward", False), ("optimizer", True)):
        time = phase_time(phase, [op(), call(phase, "all_gather", engine), op(bytes=9 * MS)], CLUSTER)
        assert [1e3 * time.network, time.hidden] == pytest.approx([SENT, 0.0])


def test_step_of_several_phases() -> None:
    gather = call("score", "all_gather", engine=False)
    events: list[Event] = [op("student", flops=1e12), op("student", bytes=MS), gather]
    events += [op("ema")] * 100
    tiny = [op("ema")] * 400
    step = step_time(events, CLUSTER, ranks=8, images=64)
    compute = 1e12 / (312e12 * TENSOR_CORES)
    student, score, ema = step.phases
    assert student.seconds == pytest.approx(compute + 1e-3)
    assert ema.seconds == pytest.approx(100 * KERNEL_SECONDS)
    assert step.host == pytest.approx(102 * LAUNCH_SECONDS)
    assert score.seconds == pytest.approx(1e-3 * SENT)
    work = student.work + ema.work
    assert step.waiting == pytest.approx(0.01 * (2 * 2.0794415) ** 0.5 * work)  # ln 8
    assert step.seconds == pytest.approx(work + 1e-3 * SENT + step.waiting)
    assert step.bottleneck == "compute"
    late = step_time([*events, *tiny, *tiny], CLUSTER, 8, 64)  # the host launches ahead, until the whole step is late
    assert late.bottleneck == "host"
    assert late.idle == pytest.approx(902 * LAUNCH_SECONDS - student.seconds - score.seconds - 900 * KERNEL_SECONDS)
    assert late.seconds == pytest.approx(902 * LAUNCH_SECONDS + late.waiting)
    assert step_time([*events, *tiny], CLUSTER, 8, 64).idle == 0
    replayed = step_time(
        [event._replace(replayed=True) for event in [*events, *tiny, *tiny] if isinstance(event, OperatorEvent)],
        CLUSTER,
        1,
        64,
    )
    assert replayed.idle == 0
    assert replayed.host == pytest.approx(902 * REPLAYED_LAUNCH_SECONDS)
    assert step_time([*events, op("ema", bytes=9 * MS)], CLUSTER, 8, 64).bottleneck == "memory"
    assert step_time([*events, *[gather] * 9], CLUSTER, 8, 64).bottleneck == "network"
    starved = step_time(events, CLUSTER, 8, 64, data_rate=640.0)
    assert starved.seconds == pytest.approx(0.1)
    assert starved.bottleneck == "data"
    factors = calibration_factors(step, {"student": 2 * student.seconds, "score": 1.0, "data": 1.0})
    assert factors == {"student": pytest.approx(2.0)}
    assert step_time(events, CLUSTER, 8, 64, factors).phases[0].seconds == pytest.approx(2 * student.seconds)
    whole = calibration_factors(step, {"normalize": 1.0, "graph": 3 * work + step.network})
    assert whole == dict.fromkeys(("student", "ema"), pytest.approx(3.0)) | {"score": pytest.approx(3.0)}
    with pytest.raises(ValueError, match=r"backward took 1 ms, less than the .* predicted for its collectives alone"):
        calibration_factors(step_time([call("backward", "all_reduce"), op()], CLUSTER, 8, 64), {"backward": 1e-3})


def supervised(batch: int, precision: torch.dtype) -> list[Any]:
    """Return the events of a training step of a ResNet-50 classifier."""
    with ShapeOnlyMode():
        network = timm.create_model("resnet50").to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, foreach=True)
        for _ in range(2):
            with StepTrace(8) as trace:
                images = torch.empty(batch, 3, 224, 224).to(memory_format=torch.channels_last)
                with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                    loss = F.cross_entropy(network(images), torch.zeros(batch, dtype=torch.long))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return trace.events


@pytest.mark.slow
def test_published_throughput() -> None:
    """NVIDIA's results for ResNet-50 v1.5 in PyTorch (github.com/NVIDIA/DeepLearningExamples), one GPU, 256 images.

    TENSOR_CORES is fitted to the first; the others are predictions.
    """
    low, full = supervised(256, torch.bfloat16), supervised(256, torch.float32)
    assert sum(event.flops for event in low) / 256 == pytest.approx(3 * 8.18e9, rel=0.02)
    rates = {}
    for gpu, events in (("a100", low), ("v100", [e._replace(dtype="float16") for e in low]), ("v100", full)):
        rates[gpu, events is full] = 256 / step_time(events, make_cluster(gpu, 1, "ib-hdr"), 1, 256).seconds
    assert rates["a100", False] == pytest.approx(2470, rel=0.02)
    assert rates["v100", False] == pytest.approx(1156, rel=0.15)
    assert rates["v100", True] == pytest.approx(356, rel=0.15)


def small(**sections: dict[str, Any]) -> Config:
    """Return the configuration of a ViT with two blocks."""
    values: dict[str, dict[str, Any]] = {
        "run": {"device": "auto"},
        "data": {"batch_size": 64, "views": [{"size": 16}] * 2},
        "model": {**VIT, "dim": 32},
        "method": {"bn": "local"},
        "bank": {"size": 4096, "init": "random"},
    }
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    return small_config(Path("run"), Path("none"), **values)


@pytest.mark.slow
def test_plan_for_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small(model={"backbone_args": {**VIT_ARGS, "depth": 1}})
    plan = make_plan(config, PlanRequest([1, 2, 64], images=10_000, data_rate=1e9, price=2.0))
    assert [(row.gpus, row.batch, row.case.images) for row in plan.rows] == [(8, 64, 8), (16, 64, 4)]
    assert "512 ranks: data.batch_size: 64 does not divide" in plan.skipped[64]
    assert all(row.fits for row in plan.rows)
    for row in plan.rows:
        assert row.hours == pytest.approx(3 * (10_000 // 64) * row.step.seconds / 3600)
    assert {row.case.engine for row in plan.candidates} == {"ddp", "fsdp", "zero1", "zero2", "zero3"}
    assert {row.case.placement for row in plan.candidates} == {"replicated", "sharded", "node"}
    assert [row.case.images for row in plan.candidates][-3:] == [8, 16, 32]
    assert plan.best
    assert plan.best.case.images == 32, "launching operators takes most of such a small step"
    assert plan.best.step.bottleneck == "host"
    report(plan, config, tmp_path / "out/plan.json")
    written = json.loads((tmp_path / "out/plan.json").read_text())
    assert [row["gpu_hours"] for row in written["rows"]] == [row.hours * row.gpus for row in plan.rows]
    assert written["rows"][0]["cost"] == pytest.approx(16 * plan.rows[0].hours)
    assert written["best"] == plan.best.case._asdict()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= WIDTH
    assert "best: engine.kind=" in printed
    assert "1e+09" not in printed


def test_batches_that_the_method_refuses_are_not_compared() -> None:
    """A queue of 256 rows holds the keys of one direction of 256 images, not of 512."""
    config = small(method={"name": "moco", "symmetric": False}, bank={"size": 256})
    dry_runs = DryRuns(config, "a100")
    planner = _Planner(config, 10_000, make_cluster("a100", 8, "ib-hdr"), Calibration(None, None), dry_runs)
    cases = planner._other_batches(PlanCase("ddp", "sharded", 1, 8), 8, larger=True)
    assert [case.images for case in cases] == [8, 16, 32]
    assert [case.images for case in planner._other_batches(cases[0], 8, larger=False)] == [8, 4, 2]


@pytest.mark.slow
def test_engines_shard_memory() -> None:
    """FSDP shards the networks, ZeRO-1 the optimizer's state; 64 GPUs, without allocating their memory."""
    plan = make_plan(
        small(engine={"kind": "fsdp"}),
        PlanRequest([8], images_per_gpu=2, images=10_000, all_engines=True, recommend=False),
    )
    found = {row.case.engine: row.memory for row in plan.rows}
    assert list(found) == ["ddp", "fsdp", "zero1", "zero2", "zero3"]
    assert found["fsdp"].networks < 0.2 * found["ddp"].networks
    assert found["zero1"].optimizer < found["ddp"].optimizer


def test_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the CPU, whose times come from the measurement alone."""
    config = small(run={"device": "cpu"}, data={"batch_size": 8})
    result = throughput.run(config, ("synthetic",), steps=3, warmup=1)
    result["modes"]["data"] = {"images_per_second": 1e6}
    path = tmp_path / "one.json"
    path.write_text(json.dumps(result))
    plan = make_plan(config, PlanRequest([1], gpus_per_node=1, images=1000, calibrate=path, recommend=False))
    (row,) = plan.rows
    measured = {name: phase["seconds"] for name, phase in result["modes"]["synthetic"]["phases"].items()}
    times = {phase.phase: phase.seconds for phase in row.step.phases}
    for name in ("teacher", "student", "backward", "optimizer", "adversary", "ema"):
        assert times[name] == pytest.approx(measured[name])
    assert plan.calibration.data_rate == 1e6
    report(plan, config, None)
    assert "phases as measured in the file" in capsys.readouterr().out
    with pytest.raises(ValueError, match="it has negatives 4096, the configuration 512"):
        make_plan(small(run={"device": "cpu"}, bank={"size": 512}), PlanRequest([1], gpus_per_node=1, calibrate=path))
    with pytest.raises(ValueError, match=r"measured on CPU, .* planned for A100"):
        make_plan(small(run={"precision": "fp32"}), PlanRequest([1], calibrate=path))
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a file of bench throughput"):
        make_plan(config, PlanRequest([1], gpus_per_node=1, calibrate=path))


def test_only_memory_is_predicted_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    config = small(run={"device": "cpu"}, data={"batch_size": 8})
    plan = make_plan(config, PlanRequest([1], gpus_per_node=1, images=1000))
    assert not plan.timed
    assert not plan.candidates
    report(plan, config, None)
    printed = capsys.readouterr().out
    assert "GiB per rank on the CPU" in printed
    assert "times need --calibrate" in printed


@pytest.mark.parametrize(
    ("text", "numbers"), [("1,2,8", [1, 2, 8]), ("8, 1", [1, 8]), ("1..8", [1, 2, 4, 8]), ("3..13", [3, 6, 12])]
)
def test_parse_nodes(text: str, numbers: list[int]) -> None:
    assert parse_nodes(text) == numbers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "8,x"], "got --nodes 8,x, need numbers such as 1,2,8, or 1..1024"),
        (["--nodes", "0"], "got --nodes 0"),
        (["--nodes", "8..1"], "got --nodes 8..1"),
        (["--gpu", "tpu"], "got --gpu tpu, need one of v100, a100-40, a100, h100, h200"),
        (["--net", "string"], "got --net string, need one of ib-hdr"),
        (["--net", "-1"], "need more than 0 Gb/s"),
        (
            ["--nodes", "3", "--gpus-per-node", "1"],
            "data.batch_size: 256 does not divide among 3 ranks; --images-per-gpu",
        ),
        (["engine.kind=fsdp", "engine.cpu_offload=true"], "engine.cpu_offload=true cannot be planned"),
        (["--images", "100"], "100 images do not fill one batch of 256"),
        (["--calibrate", "/no/such/file.json"], "/no/such/file.json"),
    ],
)
def test_invalid_requests(arguments: list[str], message: str) -> None:
    config = Path(__file__).parents[2] / "configs/adco_r50_200ep.yaml"
    result = CliRunner().invoke(app, ["plan", str(config), *arguments])
    assert isinstance(result.exception, ValueError | OSError)
    assert message in str(result.exception)
