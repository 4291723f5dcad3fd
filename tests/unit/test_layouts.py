"""Predicted step times: parts by hand, which layouts there are, and their order in clear cases."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megatron_specialm.base.accelerator import planned_machine
from megatron_specialm.base.errors import ConfigError, MachineError
from megatron_specialm.base.terminal import Table
from megatron_specialm.cli import app
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.config.model import ModelConfig, Projection
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.estimate.capabilities import violation
from megatron_specialm.estimate.hardware import Hardware, hardware_of
from megatron_specialm.estimate.layouts import Layouts, find_layouts, nodes_needed
from megatron_specialm.estimate.memory import stage_sizes
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.estimate.step_time import StepTime, step_time
from megatron_specialm.graph.lineage import setup_of
from megatron_specialm.report.layouts import layout_tables

MODEL = ModelConfig(family="llama", layers=8, hidden_size=512, ffn_hidden_size=1024, attention_heads=8)
LARGE = ModelConfig(family="llama", layers=8, hidden_size=16384, ffn_hidden_size=49152, attention_heads=64)
SETUP = Setup(
    MODEL, ParallelConfig(), "bf16",
    vocabulary_size=1024, context_length=256, global_batch_size=64, micro_batch_size=4,
)  # fmt: skip
# A second for each byte or FLOP, and four processes in a node.
UNIT = Hardware(
    products=1, attention=1, memory=1, link=1, fabric=0.25, host=1, per_node=4, launch=0, collective=0
)  # fmt: skip
VECTOR = 4 * 256 * 512 * 2  # bytes of a micro-batch's activations between layers
H100 = planned_machine("H100")


def _time(hardware: Hardware = UNIT, setup: Setup = SETUP, **parallel) -> StepTime:
    changed = replace(setup, parallel=ParallelConfig(**parallel))
    assert violation(changed) is None
    return step_time(changed, hardware, fused=True, checkpoint_every=10)


def test_one_process_computes_and_nothing_else() -> None:
    time = _time()
    assert {part.name for part in time.parts} == {
        "matrix products",
        "attention",
        "memory traffic",
        "optimizer",
        "checkpoint",
    }
    attention = 3 * 64 * 256 * 2 * 8 * 512 * 256
    assert time.seconds("attention") == attention == _time(replace(UNIT, attention=0.5)).seconds("attention") / 2
    assert time.seconds("matrix products") == SETUP.step_flops - attention
    assert time.total == sum(part.seconds for part in time.parts)
    weights = stage_sizes(SETUP, 0).trained
    assert time.seconds("checkpoint") == 12 * weights / 10, "weights and two moments in fp32, every ten steps"


def test_bytes_of_tensor_parallelism() -> None:
    """8 N H (t - 1) / t elements per layer (Narayanan et al. 2021, section 3.2), and two all-reduces beside the layers."""
    time = _time(tensor_parallel=4)
    layers = 8 * (8 * 4 * 256 * 512 * 3 / 4) * 2
    assert time.seconds("tensor parallel collectives") == 16 * (layers + 2 * 2 * 3 / 4 * VECTOR)
    assert time.seconds("matrix products") + time.seconds("attention") == SETUP.step_flops / 4
    again = _time(tensor_parallel=4, recompute="full")
    assert again.seconds("tensor parallel collectives") == 16 * (1.5 * layers + 2 * 2 * 3 / 4 * VECTOR)
    late = _time(replace(UNIT, collective=1), tensor_parallel=4)
    assert late.total - time.total == pytest.approx(16 * (4 * 8 + 2))


def test_share_of_the_pipeline_bubble() -> None:
    """(p - 1) / m of the passes of equal stages, or of a part of them where each has several chunks."""
    equal = replace(SETUP, vocabulary_size=1, model=MODEL.model_copy(update={"layers": 16}))
    fast = replace(UNIT, memory=1e9, link=1e9, fabric=1e9)
    for chunks in (1, 2):
        time = _time(fast, equal, pipeline_parallel=4, virtual_pipeline=chunks)
        passes = time.seconds("matrix products") + time.seconds("attention")
        assert time.seconds("pipeline bubble") == pytest.approx(passes * 3 / 16 / chunks, rel=0.01)
    messages = _time(setup=equal, pipeline_parallel=4).seconds("pipeline messages")
    assert messages == 16 * 2 * VECTOR, "stages of one process each, in one node"
    far = _time(setup=replace(equal, global_batch_size=128), pipeline_parallel=4, data_parallel=2)
    assert far.seconds("pipeline messages") == 4 * messages, "over the fabric"


def test_bytes_of_data_parallelism() -> None:
    weights = stage_sizes(SETUP, 0).trained
    plain = _time(data_parallel=4)
    assert plain.seconds("gradient reduction") == 2 * 3 / 4 * 4 * weights, "an all-reduce in fp32"
    shared = _time(data_parallel=4, distributed_optimizer=True)
    assert shared.seconds("gradient reduction") == 3 / 4 * 4 * weights
    assert shared.seconds("parameter gathering") == 3 / 4 * 2 * weights, "in bf16"
    assert shared.seconds("optimizer") < plain.seconds("optimizer") / 2
    nodes = _time(data_parallel=8)
    assert nodes.seconds("gradient reduction") == 2 * 7 / 8 * 4 * weights, "four network cards of a quarter each"
    apart = _time(tensor_parallel=4, data_parallel=4)
    own = stage_sizes(replace(SETUP, parallel=ParallelConfig(tensor_parallel=4)), 0).trained
    assert apart.seconds("gradient reduction") == 4 * 2 * 3 / 4 * 4 * own, "one member in each node"


def test_overlapped_reduction_is_hidden_but_for_a_bucket() -> None:
    large = replace(SETUP, model=LARGE)
    weights = stage_sizes(large, 0).trained
    slow = replace(UNIT, products=1e12, attention=1e12, memory=1e12, link=1e9)
    layout = {"data_parallel": 4, "distributed_optimizer": True}
    exposed = _time(slow, large, **layout)
    hidden = _time(slow, large, overlap_communication=True, **layout)
    backward = 2 / 3 * sum(map(exposed.seconds, ("matrix products", "attention", "memory traffic"))) / 4
    for part, by in (("gradient reduction", backward), ("parameter gathering", backward / 2)):
        whole = exposed.seconds(part)
        assert hidden.seconds(part) == pytest.approx(max(whole - by, whole * 40e6 / weights))
    small = _time(slow, overlap_communication=True, **layout)
    assert small.seconds("gradient reduction") == _time(slow, **layout).seconds("gradient reduction"), "one bucket"


def test_bytes_of_context_and_expert_parallelism() -> None:
    slow = replace(UNIT, attention=1e30)
    exchanged = _time(slow, context_parallel=2).seconds("context parallel exchange")
    assert exchanged == 16 * 3 * 8 * 2 * VECTOR / 2, "keys and values, and again with their gradients"
    assert not _time(replace(UNIT, link=1e30), context_parallel=2).seconds("context parallel exchange"), "hidden"
    experts = replace(SETUP, model=MODEL.model_copy(update={"moe": MixtureOfExperts(experts=4, every=2)}))
    split = _time(setup=experts, data_parallel=4, expert_parallel=4)
    assert split.seconds("expert all-to-all") == 4 * 4 * 4 * 2 * VECTOR * 3 / 4, "there and back, twice"


def _found(model: ModelConfig, nodes: int, *, batch: int = 128, gpu: str = "H100", **settings) -> Layouts:
    setup = Setup(model, ParallelConfig(), "bf16", 32_000, 2048, batch, 1)
    return find_layouts(replace(setup, **settings), planned_machine(gpu), nodes, checkpoint_every=500)


def test_a_small_model_wants_replicas() -> None:
    found = _found(MODEL, 1)
    first = found.fastest[0].setup
    assert first.parallel.describe() == "DP8 ZeRO-1" and first.parallel.overlap_communication
    assert found.too_large == 0 and found.fitting > len(found.fastest)
    times = [one.time.total for one in found.fastest]
    assert times == sorted(times) and len({one.sizes for one in found.fastest}) == len(times)


def test_a_large_model_is_split_in_nodes_before_it_is_split_over_them() -> None:
    found = _found(LARGE, 2, batch=32)
    assert found.too_large and not any(one.sizes[0] * one.sizes[2] == 1 for one in found.fastest), "too large for one"
    first = found.fastest[0].setup.parallel
    assert first.tensor_parallel > 1 and first.tensor_parallel > first.pipeline_parallel, first.describe()
    for one in found.fastest:
        parallel = one.setup.parallel
        assert parallel.world_size == 16 and parallel.tensor_parallel * parallel.context_parallel <= 8
        assert violation(one.setup) is None and one.memory <= H100.usable_bytes


def test_the_micro_batch_of_a_balanced_mixture_of_experts_stays() -> None:
    moe = MODEL.model_copy(update={"moe": MixtureOfExperts(experts=8)})
    found = _found(moe, 1, packing="none", micro_batch_size=2)
    assert {one.setup.micro_batch_size for one in found.fastest} == {2}
    assert {one.setup.parallel.expert_parallel for one in found.fastest} == {1, 2, 4, 8}


def test_a_packed_micro_batch_of_a_projected_network_has_one_mixture() -> None:
    projected = MODEL.model_copy(update={"projection": Projection(experts=32, capacity=4, code_size=8)})
    setup = replace(SETUP, model=projected, windows_per_expert=2, variants=32)
    times = {size: _time(setup=replace(setup, micro_batch_size=size, packing="packed")).total for size in (2, 8)}
    assert times[2] == times[8] == _time(setup=replace(setup, micro_batch_size=2)).total
    assert times[8] > _time(setup=replace(setup, micro_batch_size=8, windows_per_expert=8)).total


def test_fp32_has_no_tensor_cores() -> None:
    assert hardware_of("H100", "fp32").products < hardware_of("H100", "bf16").products / 10


def test_more_nodes_are_named_where_none_fits() -> None:
    setup = Setup(LARGE, ParallelConfig(), "bf16", 32_000, 2048, 16, 1)
    assert not find_layouts(setup, planned_machine("L40S"), 1, checkpoint_every=500).fastest
    needed = nodes_needed(setup, planned_machine("L40S"), 1)
    assert needed is not None and needed[0] > 1
    assert find_layouts(setup, planned_machine("L40S"), needed[0], checkpoint_every=500).fastest


def test_what_is_printed_can_be_pasted() -> None:
    config = configs_folder() / "pipelines" / "paper.yaml"
    pipeline = load_pipeline(config)
    printed = layout_tables(pipeline, H100, 1, "llm")
    layouts, parts, proposal, assumed = printed
    assert isinstance(layouts, Table) and isinstance(parts, Table) and isinstance(proposal, str)
    assert len(layouts.lines) == 10 and "more fit" in layouts.note
    assert any("CP" in line[0] for line in layouts.lines) and "with CP they are padded" in layouts.note
    assert str(assumed).startswith("assumed, not measured: 70% of peak")
    best = find_layouts(setup_of(pipeline, "llm"), H100, 1, checkpoint_every=500).fastest[0].setup
    overrides = proposal.removeprefix("llm: ").split()
    assert setup_of(load_pipeline(config, overrides), "llm") == best


def test_refusals() -> None:
    config = configs_folder() / "pipelines" / "paper.yaml"
    pipeline = load_pipeline(config)
    with pytest.raises(ConfigError, match="--stage nothing: no train stage of that name"):
        layout_tables(pipeline, H100, 1, "nothing")
    odd = load_pipeline(config, ["stages.llm.global_batch_size=7", "stages.llm.micro_batch_size=1"])
    with pytest.raises(
        MachineError, match=r"stages\.llm: no layout of 8 nodes of 8 H100 is allowed.*global_batch_size 7 "
    ):
        layout_tables(odd, H100, 8, "llm")
    layout = setup_of(pipeline, "llm").parallel.for_engine("deepspeed")
    engine = [f"stages.llm.parallel={json.dumps(layout)}"]
    with pytest.raises(MachineError, match="no layouts are predicted for engine deepspeed"):
        layout_tables(load_pipeline(config, engine), H100, 1, "llm")


def _check(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", str(configs_folder() / "pipelines" / "smoke.yaml"), *arguments])


def test_nodes_are_of_a_gpu_and_a_stage_is_of_nodes() -> None:
    without_gpu, without_nodes = _check("--nodes", "1"), _check("--gpu", "H100", "--stage", "slm")
    for refused, reason in ((without_gpu, "--nodes: .*add --gpu"), (without_nodes, "--stage: .*and --nodes")):
        assert isinstance(refused.exception, ConfigError) and re.match(reason, str(refused.exception))


def test_a_layout_that_does_not_fit_is_refused_and_beside_its_proposal_warned_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    shape = {"layers": 8, "hidden_size": 8192, "ffn_hidden_size": 32768, "attention_heads": 64}
    large, reason = f"stages.slm.model={json.dumps(shape)}", "stages.slm: a process needs "
    refused = _check(large, "--gpu", "H100")
    assert isinstance(refused.exception, MachineError) and str(refused.exception).startswith(reason)
    proposed = _check(large, "--gpu", "H100", "--nodes", "1", "--stage", "slm")
    assert proposed.exit_code == 0, proposed.output
    assert f"warning: `run` would refuse on H100: {reason}" in proposed.output
    assert "slm: stages.slm." in proposed.output, "the overrides of a layout that fits"
