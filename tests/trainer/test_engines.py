"""Every engine on 1, 2 and 4 ranks trains as one process does, and resumes from another engine's checkpoint.

Importing DeepSpeed takes seconds, so each group of processes runs many cases.
"""

import copy
import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters

from models.encoder import Encoder
from tests.ranks import run_ranks
from tests.trainer.engines import Outcome, build_train_step, make_config, make_rank_info, outcome, run, train
from tests.trainer.small import VIT_ARGS
from trainer.build import build_encoder, full_student
from trainer.config import Config
from trainer.config_file import flatten
from trainer.engines import zero
from trainer.engines.base import blocks, named_state, set_named_state
from trainer.engines.finite import LossScale
from trainer.engines.optim import Optim, make_optimizer
from trainer.run import checkpoint
from trainer.train_step import TrainStep

Sections = dict[str, dict[str, Any]]

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"kind": "fsdp"},
    "zero1": {"kind": "deepspeed", "stage": 1},
    "zero2": {"kind": "deepspeed", "stage": 2},
    "zero3": {"kind": "deepspeed", "stage": 3},
}
# Optimizer of each network; other tests use SGD. The ViT has no bias of queries, keys and values: the bias of keys has
# no effect, so its gradient is a rounding error, which AdamW turns into full steps. The same happens to single elements
# of other weights, so its rate is low.
RECIPES: dict[str, Sections] = {
    "resnet": {"optim": {"name": "lars", "lr": 3.0, "weight_decay": 1e-3, "decay_norm_and_bias": False}},
    "vit": {
        "model": {"backbone_args": {**VIT_ARGS, "qkv_bias": False}},
        "optim": {"name": "adamw", "lr": 1e-4, "weight_decay": 0.1, "decay_norm_and_bias": False, "accumulate": 2},
    },
}
# Engines by number of ranks, with options that must not change the result.
CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {"ddp": {}, "fsdp": {}, "zero2": {}},
    2: {engine: {"activation_checkpointing": True} for engine in ENGINES},
    4: {"ddp": {}, "fsdp": {"placement": "node", "reshard_after_forward": False}, "zero1": {}, "zero3": {}},
}
# The numbers of ranks and engines that `make test` runs. All others are slow tests.
FAST = {(1, "ddp"), (2, "ddp"), (2, "fsdp"), (2, "zero2")}
# Each of the slowest engines trains one network on two ranks and the other one on four.
LEFT_OUT = {(2, "zero1", "resnet"), (2, "zero3", "resnet"), (4, "zero1", "vit"), (4, "zero3", "vit")}


def run_networks(world_size: int, engine: str) -> dict[str, Outcome]:
    """Train every network under an engine of CASES."""
    outcomes = {}
    for model, recipe in RECIPES.items():
        if (world_size, engine, model) not in LEFT_OUT:
            config = make_config(model, **recipe, engine={**ENGINES[engine], **CASES[world_size][engine]})
            outcomes[model] = run(config, ranks_per_node=2 if world_size == 4 else None)
    return outcomes if dist.get_rank() == 0 else {}


@functools.cache
def on_ranks(world_size: int, engine: str) -> dict[str, Outcome]:
    return run_ranks(world_size, run_networks, world_size, engine)[0]


def differences(a: Outcome, b: Outcome, part: str) -> dict[str, float]:
    """Return each tensor's largest difference, relative to its largest element."""
    found, expected = getattr(a, part), getattr(b, part)
    assert found.keys() == expected.keys()
    return {k: float((found[k] - x).abs().max().float() / (x.abs().max().float() + 1e-6)) for k, x in expected.items()}


@pytest.mark.parametrize(
    ("world_size", "engine", "model"),
    [
        pytest.param(world_size, engine, model, marks=[] if (world_size, engine) in FAST else pytest.mark.slow)
        for world_size, cases in CASES.items()
        for engine in cases
        for model in RECIPES
        if (world_size, engine, model) not in LEFT_OUT
    ],
)
def test_the_same_as_one_process_alone(world_size: int, engine: str, model: str) -> None:
    """Ten steps: losses agree to 5e-6 and tensors to 1e-4 of their largest element. Rounding gives 6e-7 and 1e-5."""
    alone, found = on_ranks(1, "ddp")[model], on_ranks(world_size, engine)[model]
    assert len(found.losses) == 10
    assert found.losses == pytest.approx(alone.losses, rel=5e-6)
    assert found.norms == pytest.approx(alone.norms, rel=1e-4)
    for part in ("student", "teacher", "bank", "optimizer"):
        off = {name: x for name, x in differences(found, alone, part).items() if x > 1e-4}
        assert not off, part


METHODS: dict[str, Sections] = {
    "acssl": {
        "model": {"predictor": 24, "head_norm": True},
        "method": {"name": "acssl", "negatives_from": "queue", "hardest": 4, "form": "margin", "margin": 0.5},
        "bank": {"size": 48},
    },
    "adco with predictor": {"model": {"predictor": 24}},
    "adco without teacher": {"method": {"teacher": False, "symmetric": True}},
    "byol": {"model": {"predictor": 24, "head_norm": True}, "method": {"name": "byol"}},
    "caco": {"method": {"name": "caco", "temperature": 0.2}, "bank": {"size": 40, "temperature": 0.2, "lr": 0.3}},
    "moco": {"method": {"name": "moco", "symmetric": True}, "bank": {"size": 40}},
    "simclr": {"method": {"name": "simclr"}, "data": {"views": [{"size": 16}] * 2}},
}


def run_methods(engines: list[str]) -> dict[tuple[str, str], Outcome]:
    """Train each method for four steps of SGD."""
    outcomes = {}
    for engine in engines:
        for name, sections in METHODS.items():
            method = {"bn": "sync", **sections.get("method", {})}
            # At this rate no unit's input is so near to zero that rounding decides its sign, which would show as 1e-3.
            optim = {"lr": 0.02}
            config = make_config("resnet", **{**sections, "method": method}, optim=optim, engine=ENGINES[engine])
            train_step = build_train_step(config, make_rank_info())
            history = train(train_step, config, steps=4)
            outcomes[engine, name] = outcome(train_step, *history)
    return outcomes if dist.get_rank() == 0 else {}


@functools.cache
def methods_on_ranks(world_size: int, *engines: str) -> dict[tuple[str, str], Outcome]:
    return run_ranks(world_size, run_methods, list(engines))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_method_does_the_same_as_in_one_process(engine: str, name: str) -> None:
    """Compare student with predictor, teacher without it, or no teacher, and the queue with its pointer."""
    alone = methods_on_ranks(1, "ddp")["ddp", name]
    found = methods_on_ranks(2, *ENGINES)[engine, name]
    assert found.losses == pytest.approx(alone.losses, rel=5e-6)
    assert len(set(alone.losses)) == 4
    assert any("predictor" in x for x in alone.student) == ("model" in METHODS[name])
    assert not any("predictor" in x for x in alone.teacher)
    assert bool(alone.teacher) == (name not in ("simclr", "adco without teacher"))
    # The predictor's BatchNorm removes the mean that the head's last bias adds, so its gradient is a rounding error.
    noise = {"head.2.bias.momentum_buffer", "head.3.bias.momentum_buffer"} if "model" in METHODS[name] else set()
    for part in ("student", "teacher", "bank", "optimizer"):
        off = {key: x for key, x in differences(found, alone, part).items() if x > 1e-4 and key not in noise}
        assert not off, part


def run_without_teacher() -> list[Outcome]:
    """Train AdCo without a teacher, and with a teacher that is the student."""
    base = {"bn": "local", "symmetric": True, "teacher_momentum": 0}
    return [run(make_config("resnet", method={**base, "teacher": teacher})) for teacher in (False, True)]


def test_no_teacher_is_a_teacher_that_is_the_student() -> None:
    without, with_teacher = run_ranks(1, run_without_teacher)[0]
    assert (without.teacher == {}, with_teacher.teacher == {}) == (True, False)
    assert without.losses == pytest.approx(
        with_teacher.losses, rel=5e-6
    )  # the teacher embeds each view in a batch of its own
    for part in ("student", "bank", "optimizer"):
        assert max(differences(without, with_teacher, part).values()) < 1e-4, part


PRECISION = [
    ("resnet", "fp16", "ddp"),
    ("resnet", "fp16", "fsdp"),
    ("resnet", "fp16", "zero2"),
    ("resnet", "fp16", "zero3"),
    ("resnet", "bf16", "ddp"),
    ("resnet", "bf16", "fsdp"),
    ("resnet", "bf16", "zero1"),
    ("resnet", "bf16", "zero3"),
    ("vit", "bf16", "fsdp"),
    ("vit", "fp16", "zero3"),
]


def run_precision(cases: list[tuple[str, str, str]]) -> list[Outcome]:
    """Train each case for six steps of SGD."""
    outcomes = []
    for model, precision, engine in cases:
        config = make_config(model, run={"precision": precision}, optim={"lr": 0.005}, engine=ENGINES[engine])
        train_step = build_train_step(config, make_rank_info())
        if train_step.engine.scale:
            # Small, so that nothing overflows; the fewer images a rank has, the sooner gradients overflow.
            train_step.engine.scale.state[0] = 16
        outcomes.append(outcome(train_step, *train(train_step, config, steps=6)))
    return outcomes


@functools.cache
def low_precision() -> dict[tuple[str, str, str], tuple[Outcome, Outcome]]:
    alone = list(dict.fromkeys((model, precision, "ddp") for model, precision, _ in PRECISION))
    expected = dict(zip(alone, run_ranks(1, run_precision, alone)[0], strict=True))
    found = run_ranks(2, run_precision, PRECISION)[0]
    return {case: (x, expected[*case[:2], "ddp"]) for case, x in zip(PRECISION, found, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("case", PRECISION, ids="-".join)
def test_low_precision_works_with_batchnorm(case: tuple[str, str, str]) -> None:
    """Losses agree with one process's as far as low-precision averages (ZeRO) or gradients (FSDP) allow."""
    found, alone = low_precision()[case]
    assert found.losses == pytest.approx(alone.losses, rel=2e-2)
    assert all(torch.isfinite(x).all() for x in found.student.values())
    assert found.student.keys() == alone.student.keys()
    assert {x.dtype for x in found.student.values()} <= {torch.float32, torch.int64}


OPTIONS: dict[str, dict[str, Any]] = {
    "bf16 gradients": {"compress": "bf16"},
    "FSDP offloaded": {"kind": "fsdp", "cpu_offload": True},
    "ZeRO-2 offloaded": {"kind": "deepspeed", "stage": 2, "cpu_offload": True},
    "ZeRO-3 offloaded": {"kind": "deepspeed", "stage": 3, "cpu_offload": True},
}


def run_options() -> dict[str, Outcome]:
    """Train for three steps of SGD under each option."""
    outcomes = {}
    for name, settings in {"alone": {}, **OPTIONS}.items():
        config = make_config("resnet", engine=settings)
        train_step = build_train_step(config, make_rank_info())
        outcomes[name] = outcome(train_step, *train(train_step, config, steps=3))
    return outcomes


def test_options_change_what_they_say_and_no_more() -> None:
    found = run_ranks(2, run_options)[0]
    alone = found.pop("alone")
    for name, x in found.items():
        tolerance = 1e-2 if "bf16" in name else 5e-6
        assert x.losses == pytest.approx(alone.losses, rel=tolerance), name
        assert (x.losses[-1] == alone.losses[-1]) <= ("bf16" not in name), "nothing was compressed"


def run_compiled() -> list[tuple[Outcome, Outcome, int, dict[str, int]]]:
    """Train for three steps with and without compilation; also return the number of graphs and the graph breaks."""
    found = []
    compiler = functools.partial(torch.compile, backend="aot_eager")  # does everything except calling the C++ compiler
    for engine, network, on_top, what in (
        ("ddp", "resnet", {"activation_checkpointing": True}, "blocks"),
        ("fsdp", "vit", {"activation_checkpointing": True}, "blocks"),
        ("zero2", "vit", {}, "blocks"),
        ("ddp", "vit", {}, "encoder"),
    ):
        outcomes = []
        torch._dynamo.reset()
        counters.clear()
        for settings in ({}, {"compile": what}):
            config = make_config(network, method={"bn": "local"}, engine={**ENGINES[engine], **on_top, **settings})
            with mock.patch("torch.compile", compiler):
                train_step = build_train_step(config, make_rank_info())
            outcomes.append(outcome(train_step, *train(train_step, config, steps=3)))
        eager, compiled = outcomes
        found.append((eager, compiled, counters["stats"]["unique_graphs"], dict(counters["graph_break"])))
    return found


@pytest.mark.slow
def test_compiled_networks_do_the_same() -> None:
    graphs = []
    for eager, compiled, number, breaks in run_ranks(2, run_compiled)[0]:
        assert compiled.losses == pytest.approx(eager.losses, rel=5e-6)
        for part in ("student", "teacher"):
            off = {name: x for name, x in differences(compiled, eager, part).items() if x > 1e-4}
            assert not off, part
        assert not breaks
        graphs.append(number)
    # One graph per kind of block, for student and teacher: a ResNet's four blocks differ, a ViT's do not.
    # The whole encoder is one, for student and teacher.
    assert graphs == [8, 2, 2, 2]


def not_finite(engines: list[str]) -> list[tuple[str, bool, float, float]]:
    """Train on a non-finite image on rank 1, then in fp16 with a gradient that overflows.

    Returns for each engine the error message, whether tensors stayed unchanged, and the loss scale before and after.
    """
    found = []
    for engine in engines:
        config = make_config("vit", engine=ENGINES[engine])
        train_step = build_train_step(config, make_rank_info())
        before = outcome(train_step, [], [])
        with pytest.raises(ValueError, match="nothing was updated") as refusal:
            train(train_step, config, steps=1, spoil=1)
        after = outcome(train_step, [], [])
        same = all(x == 0 for part in ("student", "teacher", "bank") for x in differences(after, before, part).values())
        config = make_config("vit", run={"precision": "fp16"}, engine=ENGINES[engine])
        train_step = build_train_step(config, make_rank_info())
        scale = train_step.engine.scale
        assert scale is not None
        scale.state[0] = 2.0**40
        before = outcome(train_step, [], [])
        train(train_step, config, steps=1)
        after = outcome(train_step, [], [])
        same &= all(x == 0 for x in differences(after, before, "student").values())
        found.append((str(refusal.value), same, 2.0**40, float(scale.value)))
    return found


@pytest.mark.slow
def test_non_finite_values_update_nothing() -> None:
    for ranks in run_ranks(2, not_finite, ["ddp", "fsdp", "zero2", "zero3"]):
        for message, same, before, after in ranks:
            assert message.startswith("not finite: the loss on rank 1, gradient norm ")
            assert same
            assert after == before / 2


def save_checkpoints(folder: Path, engines: list[str], model: str) -> dict[str, tuple[Outcome, list[float]]]:
    """Train for three steps, save a checkpoint, and train for two more; return the saved state and the later losses."""
    found = {}
    for engine in engines:
        config = make_config(model, **RECIPES[model], data={"batch_size": 12}, engine=ENGINES[engine])
        train_step = build_train_step(config, make_rank_info())
        train(train_step, config, steps=3)
        saved = outcome(train_step, [], [])
        assert checkpoint.save(folder / f"{model}-{engine}", 3, train_step.state(3), keep=1)
        found[engine] = (saved, train(train_step, config, steps=2, first=3)[0])
    return found


def load_checkpoints(folder: Path, pairs: list[tuple[str, str]], model: str) -> list[tuple[Outcome, list[float]]]:
    """Load the first engine's checkpoint in the second engine of each pair; return its state and the next losses."""
    found = []
    for source, engine in pairs:
        config = make_config(model, **RECIPES[model], data={"batch_size": 12}, engine=ENGINES[engine])
        train_step = build_train_step(config, make_rank_info())
        path = checkpoint.newest(folder / f"{model}-{source}")
        assert path is not None
        assert train_step.load(path) == 3
        loaded = outcome(train_step, [], [])
        found.append((loaded, train(train_step, config, steps=2, first=3)[0]))
    return found


PAIRS = {
    1: [("ddp", "fsdp"), ("zero3", "zero1")],
    2: [("fsdp", "zero3"), ("zero3", "fsdp"), ("zero2", "ddp"), ("ddp", "zero2")],
    3: [("ddp", "fsdp"), ("fsdp", "zero3"), ("zero3", "zero2")],
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "worlds"), [("resnet", (1, 3)), ("vit", (2,))])
def test_another_engine_resumes(tmp_path: Path, model: str, worlds: tuple[int, ...]) -> None:
    """A checkpoint of 2 ranks is loaded bit for bit on other numbers of ranks."""
    saved = run_ranks(2, save_checkpoints, tmp_path, ["ddp", "fsdp", "zero2", "zero3"], model)[0]
    for world_size in worlds:
        for (source, engine), (loaded, losses) in zip(
            PAIRS[world_size],
            run_ranks(world_size, load_checkpoints, tmp_path, PAIRS[world_size], model)[0],
            strict=True,
        ):
            expected, after = saved[source]
            for part in ("student", "teacher", "bank", "optimizer"):
                assert not any(differences(loaded, expected, part).values()), (source, engine, world_size, part)
            assert losses == pytest.approx(after, rel=5e-6), (source, engine, world_size)


def embed_with_full_student() -> list[Tensor]:
    """Return embeddings by the full student under engines that replicate or shard it."""
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for engine in ("ddp", "fsdp", "zero3"):
        config = make_config("resnet", engine=ENGINES[engine])
        rank_info = make_rank_info()
        train_step = build_train_step(config, rank_info)
        train(train_step, config, steps=1)
        student = full_student(train_step.method, train_step.engine, config, rank_info).eval()
        if rank_info.rank == 0:  # alone
            with torch.no_grad():
                found.append(student([images]))
    return found


@pytest.mark.slow
def test_the_full_student_needs_no_other_rank() -> None:
    ddp, fsdp, zero3 = run_ranks(2, embed_with_full_student)[0]
    torch.testing.assert_close(fsdp, ddp, rtol=0, atol=1e-5)
    torch.testing.assert_close(zero3, ddp, rtol=0, atol=1e-5)


def running_statistics() -> dict[str, list[Tensor]]:
    """Return this rank's running statistics after a step in each engine."""
    found = {}
    for engine in ("ddp", "fsdp", "zero2", "zero3"):
        config = make_config("resnet", method={"bn": "local"}, engine=ENGINES[engine])
        train_step = build_train_step(config, make_rank_info())
        train(train_step, config, steps=1)
        found[engine] = [b.clone() for b in train_step.method.student.buffers() if b.is_floating_point()]
    return found


def test_all_ranks_have_the_same_running_statistics() -> None:
    """Ranks agree to the bit after every step, so a checkpoint changes nothing in the run that saves it."""
    first, second = run_ranks(2, running_statistics)
    for engine, buffers in first.items():
        assert buffers
        assert all(map(torch.equal, buffers, second[engine])), engine


def test_loss_scale() -> None:
    scale, yes, no = LossScale(torch.device("cpu"), 1024.0), torch.tensor(True), torch.tensor(False)
    scale.update(overflow=yes, failed=no)
    assert scale.value == 512
    for _ in range(1999):
        scale.update(overflow=no)
    assert scale.value == 512
    for overflow in (yes, no):
        scale.update(overflow, failed=yes)
        assert scale.state.tolist() == [512, 1999], "a step that no smaller scale can help changes nothing"
    scale.update(overflow=no)
    assert scale.value == 1024


@pytest.mark.parametrize(
    ("backbone", "number"),
    [("resnet18", 8), ("resnet50", 16), ("vit_tiny_patch16_224", 12), ("convnext_atto", 12), ("efficientnet_b0", 16)],
)
def test_blocks(backbone: str, number: int) -> None:
    network = Encoder(backbone)
    found = blocks(network)
    assert len(found) == number
    assert len({id(p) for block in found for p in block.parameters()}) == sum(len(list(b.parameters())) for b in found)
    covered = sum(p.numel() for block in found for p in block.parameters())
    assert covered > 0.8 * sum(p.numel() for p in network.backbone.parameters())


def scalar_parameter() -> None:
    config = make_config("vit", engine=ENGINES["zero1"])
    student = build_encoder(config)
    student.scale = nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match="deepspeed cannot shard scalar parameters, such as scale; need ddp"):
        TrainStep(config, make_rank_info(), student)


def test_scalar_parameters_are_refused_by_zero() -> None:
    run_ranks(1, scalar_parameter)


class TwoBlocks(nn.Module):
    """A backbone with blocks that are layers in a row, and a parameter that no forward pass uses."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
            nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)),
        )
        self.pooler = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.blocks(x)).mean((2, 3))


def test_layers_in_a_row_are_a_block() -> None:
    network = Encoder(TwoBlocks)
    assert blocks(network) == list(network.backbone.blocks)


def train_with_unused_parameters(engine: str) -> Outcome:
    settings = {**ENGINES[engine], "compile": "none"}
    model = {"backbone": f"{__file__}:TwoBlocks", "backbone_args": {}}
    return run(make_config("vit", model=model, method={"bn": "sync"}, engine=settings, optim={"accumulate": 2}))


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2"])
def test_parameters_that_are_not_used_are_accepted_by_every_engine(engine: str) -> None:
    expected, found = (run_ranks(ranks, train_with_unused_parameters, engine)[0] for ranks in (1, 2))
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_parameters_that_are_not_used_do_not_hinder_a_resume(name: str) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        network = TwoBlocks()
        return network, make_optimizer(network, Optim(name=name, lr=0.1))

    def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        network(torch.ones(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    network, optimizer = make()
    step(network, optimizer)
    saved = named_state(network, optimizer, None)
    again, fresh = make()
    again.load_state_dict(network.state_dict())
    assert flatten(named_state(again, fresh, None)).keys() == flatten(saved).keys()
    set_named_state(again, fresh, copy.deepcopy(saved))
    for pair in ((network, optimizer), (again, fresh)):
        step(*pair)
    for x, y in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(x, y)


def test_lars_needs_weight_decay() -> None:
    with pytest.raises(ValueError, match=r"optim\.weight_decay: lars adapts what has weight decay"):
        make_optimizer(TwoBlocks(), Optim(name="lars", weight_decay=0))


def test_a_backbone_without_known_blocks() -> None:
    with pytest.raises(ValueError, match="need a ResNet, ViT or ConvNeXt"):
        blocks(Encoder("vgg11"))


def deepspeed_json(config: Config, precision: torch.dtype) -> dict[str, Any]:
    assert isinstance(config.engine, zero.Settings)
    return zero.make_json(config.engine, config.optim, config.data.batch_size, torch.device("cpu"), precision)


def test_deepspeeds_json() -> None:
    options = {"zero_optimization": {"reduce_bucket_size": 1000, "stage": 3}, "wall_clock_breakdown": True}
    config = make_config("vit", engine={**ENGINES["zero3"], "options": options}, optim={"accumulate": 2})
    settings = deepspeed_json(config, torch.bfloat16)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000
    assert settings["wall_clock_breakdown"] is True
    assert settings["timers"]["throughput"]["enabled"] is False
    assert settings["gradient_clipping"] == 1.0
    assert (settings["train_batch_size"], settings["gradient_accumulation_steps"]) == (16, 2)
    assert settings["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage is 1, but"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but"),
        ({"gradient_clipping": 5}, "gradient_clipping is 5, but"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is not DeepSpeed's to choose"),
        ({"train_micro_batch_size_per_gpu": 7}, "train_micro_batch_size_per_gpu is not DeepSpeed's to choose"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer needs engine.cpu_offload",
        ),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param needs"),
    ],
)
def test_deepspeeds_json_may_not_contradict(options: dict[str, Any], message: str) -> None:
    config = make_config("vit", engine={**ENGINES["zero3"], "options": options})
    with pytest.raises(ValueError, match=f"engine.options: {message}"):
        deepspeed_json(config, torch.float32)
