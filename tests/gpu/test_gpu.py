"""What only a GPU can show. Written without one at hand: `pytest -m gpu` on a machine that has one is their first run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_specialm.base.accelerator import find_accelerator
from megatron_specialm.base.environment import ALONE
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.config.model import LowRank, ModelConfig, Projection
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.precision import LINEARS, Fp8Config
from megatron_specialm.config.training import Optimizer
from megatron_specialm.data.store import MIXTURE, Batch
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.engine.process_groups import process_group
from megatron_specialm.estimate.capabilities import lacking
from megatron_specialm.estimate.memory import memory_of
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.model import gpt
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.merge import project
from tests.adamw import Follower
from tests.logits import SHAPES, TOLERANCES, difference, logits, logits_of_export, logits_on_cpu, trained

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONTEXT, VOCABULARY = 1024, 32_000


def _preset(name: str) -> ModelConfig:
    config = configs_folder() / "pipelines" / "smoke.yaml"
    return load_pipeline(config, [f"stages.slm.model={name}"]).stages["slm"].model  # type: ignore[union-attr,return-value]


def _shallow(model: ModelConfig, layers: int) -> ModelConfig:
    """The same model with fewer layers."""
    return model.model_copy(update={"layers": layers})


def _setup(model: ModelConfig, precision: str, fp8: Fp8Config | None = None, recompute: str = "none") -> Setup:
    parallel = ParallelConfig(recompute=recompute)
    return Setup(model, parallel, precision, VOCABULARY, CONTEXT, 8, 8, fp8)  # type: ignore[arg-type]


def _losses(setup: Setup, *, steps: int) -> list[float]:
    """Train on a few fixed windows of a skewed vocabulary."""
    engine = _engine(setup)
    generator = np.random.default_rng(0)
    windows = generator.zipf(1.3, (setup.global_batch_size, CONTEXT + 1)).clip(max=VOCABULARY - 1)
    batch = Batch(windows[:, :-1], windows[:, 1:], np.ones((len(windows), CONTEXT), np.float32))
    return [engine.train_step(batch, learning_rate=1e-4).loss.mean for _ in range(steps)]


def _engine(setup: Setup, optimizer: Optimizer = Optimizer()) -> MegatronEngine:  # noqa: B008 (frozen)
    model = Gpt(
        setup.model, vocabulary_size=VOCABULARY, context_length=CONTEXT, precision=setup.precision, fp8=setup.fp8,
        parallel=setup.parallel,
    )  # fmt: skip
    model.initialize(seed=0)
    return MegatronEngine(
        model,
        parallel=setup.parallel,
        optimizer=optimizer,
        micro_batch_size=setup.micro_batch_size,
        packing=setup.packing,
    )


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("preset", ["slm-126m", "llm-771m"])
def test_memory_is_as_estimated(preset: str, recompute: str) -> None:
    setup = _setup(_preset(preset), "bf16", recompute=recompute)
    with process_group(ALONE, parallel=setup.parallel):
        torch.cuda.reset_peak_memory_stats()
        _losses(setup, steps=3)
        peak = torch.cuda.max_memory_allocated()
    assert memory_of(setup, fused=find_accelerator().has_fused_layers).total == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_are_those_of_a_cpu_and_of_the_export(shape: ModelConfig, precision: str, tmp_path: Path) -> None:
    """Trained here, so that what training and evaluation compute is one function too."""
    with process_group(ALONE):
        weights = trained(shape)
        ours = logits(shape, weights, precision)  # type: ignore[arg-type]
    exported = logits_of_export(shape, weights, tmp_path)
    on_cpu = logits_on_cpu(shape, weights, precision, tmp_path)  # type: ignore[arg-type]
    assert difference(ours, exported, precision) < TOLERANCES[precision]  # type: ignore[arg-type, index]
    assert difference(ours, on_cpu, precision) < TOLERANCES[precision]  # type: ignore[arg-type, index]


def _packed_and_padded(setup: Setup) -> tuple[float, float]:
    """How far loss and gradients of a packing are from those of padded windows, relative to these."""
    generator, found = np.random.default_rng(0), []
    windows = generator.integers(0, VOCABULARY, (8, CONTEXT + 1))
    mask = (np.arange(CONTEXT) < generator.integers(1, CONTEXT + 1, 8)[:, None]).astype(np.float32)
    with process_group(ALONE, parallel=setup.parallel):
        for one in (replace(setup, packing="none"), setup):
            engine = _engine(one)
            loss = engine.accumulate_gradients(Batch(windows[:, :-1], windows[:, 1:], mask))
            found.append((loss.mean, torch.cat([gradient.flatten() for gradient in engine.gradients().values()])))
    (padded, expected), (loss, gradients) = found
    return abs(loss - padded) / padded, float((gradients - expected).norm() / expected.norm())


def _packed(precision: str, packing: str = "packed", recompute: str = "none", model: str = "slm-126m") -> Setup:
    setup = _setup(_shallow(_preset(model), 4), precision, recompute=recompute)
    return replace(setup, micro_batch_size=2, packing=packing)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setup", "tolerance"),
    [
        pytest.param(("fp32", "sorted"), 1e-5, id="fp32-sorted"),
        pytest.param(("fp32",), 1e-5, id="fp32"),
        pytest.param(("bf16", "sorted"), 2e-2, id="bf16-sorted"),
        pytest.param(("bf16",), 2e-2, id="bf16"),
        pytest.param(("bf16", "packed", "selective"), 2e-2, id="bf16-selective"),
        pytest.param(("bf16", "packed", "full"), 2e-2, id="bf16-full"),
        pytest.param(("bf16", "packed", "none", "llama-130m"), 2e-2, id="bf16-llama"),
    ],
)
def test_packing_changes_nothing(setup: tuple[str, ...], tolerance: float) -> None:
    """In bf16 the attention is Transformer Engine's over windows of variable length."""
    loss, gradients = _packed_and_padded(_packed(*setup))
    assert loss < tolerance and gradients < tolerance


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_windows_that_are_not_kept_apart_are_found(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would see attention that leaks into the next window."""
    healthy = gpt.packed_windows
    monkeypatch.setattr(gpt, "packed_windows", lambda lengths, **device: healthy([sum(lengths)], **device))
    _, gradients = _packed_and_padded(_packed(precision))
    assert gradients > 5e-2


def test_bf16_follows_fp32() -> None:
    shape = _shallow(_preset("slm-126m"), 4)
    with process_group(ALONE):
        half = _losses(_setup(shape, "bf16"), steps=20)
        full = _losses(_setup(shape, "fp32"), steps=20)
    assert half == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize(
    "fp8",
    [
        Fp8Config(recipe=recipe, format=number_format)  # type: ignore[arg-type]
        for recipe in ("delayed", "tensorwise", "blockwise")
        for number_format in ("hybrid", "e4m3")
    ]
    + [Fp8Config(bf16_first_layers=1, bf16_last_layers=1), Fp8Config(linears=("fc1", "fc2"))],
    ids=lambda fp8: f"{fp8.recipe}-{fp8.format}-{fp8.bf16_layers}-{len(fp8.linears)}",
)
def test_fp8_follows_bf16(fp8: Fp8Config) -> None:
    shape = _shallow(_preset("llm-771m"), 4)
    setup = _setup(shape, "fp8", fp8)
    if reason := lacking(setup, find_accelerator()):
        pytest.skip(str(reason))
    with process_group(ALONE):
        low = _losses(setup, steps=20)
        half = _losses(_setup(shape, "bf16"), steps=20)
    assert low == pytest.approx(half, rel=0.01)
    assert low != half, "FP8 was not used"


def test_linears_kept_in_bf16_are() -> None:
    """With a linear in FP8, its result differs from bf16's; kept out, not by a bit."""
    shape = _shallow(_preset("slm-126m"), 2)
    if reason := lacking(_setup(shape, "fp8", Fp8Config()), find_accelerator()):
        pytest.skip(str(reason))
    with process_group(ALONE):
        first = {linear: _losses(_setup(shape, "fp8", Fp8Config(linears=(linear,))), steps=1)[0] for linear in LINEARS}
        half = _losses(_setup(shape, "bf16"), steps=1)[0]
    assert all(loss != half for loss in first.values()) and len(set(first.values())) == len(LINEARS)


def test_tune_precision_times_every_linear() -> None:
    from megatron_specialm.model.tune_precision import advice, measure

    setup = _setup(_preset("llm-771m"), "fp8", Fp8Config())
    if reason := lacking(setup, find_accelerator()):
        pytest.skip(str(reason))
    timings = measure(setup)
    assert [timing.shape.name for timing in timings] == list(LINEARS)
    assert "set `precision:" in advice(timings)


def test_going_on_from_a_checkpoint_of_the_cpu_layout() -> None:
    """Weights and moments read back into fused optimizers continue as if nothing had been."""
    setup = _setup(_shallow(_preset("slm-126m"), 2), "bf16")
    windows = np.random.default_rng(1).integers(0, VOCABULARY, (8, CONTEXT + 1))
    batch = Batch(windows[:, :-1], windows[:, 1:], np.ones((8, CONTEXT), np.float32))
    with process_group(ALONE):
        straight = _engine(setup)
        for _ in range(2):
            straight.train_step(batch, learning_rate=1e-3)
        again = _engine(setup)
        again.load(straight.weights(), straight.optimizer_state())
        ours, theirs = (engine.train_step(batch, learning_rate=1e-3).loss.mean for engine in (again, straight))
        assert ours == pytest.approx(theirs, rel=1e-4)
        last = [engine.train_step(batch, learning_rate=1e-3).loss.mean for engine in (again, straight)]
        counts = [float(engine.optimizer_state()["step"]) for engine in (again, straight)]
    assert last[0] == pytest.approx(last[1], rel=1e-3)
    assert counts == [4, 4]


@pytest.mark.parametrize("recipe", [None, "delayed", "tensorwise", "blockwise"])
def test_a_projected_expert_is_a_plain_model(recipe: str | None) -> None:
    """In Transformer Engine's layers too, and with FP8 copies of weights that differ between micro-batches."""
    fp8 = None if recipe is None else Fp8Config(recipe=recipe)  # type: ignore[arg-type]
    shape = _shallow(_preset("slm-126m"), 2).model_copy(
        update={"projection": Projection(experts=4, capacity=3, code_size=4)}
    )
    setup = _setup(shape, "bf16" if fp8 is None else "fp8", fp8)
    if reason := lacking(setup, find_accelerator()):
        pytest.skip(str(reason))
    windows = np.random.default_rng(0).integers(0, VOCABULARY, (32, CONTEXT + 1))
    experts = np.arange(4).repeat(8)  # a micro-batch of each
    notes = {MIXTURE: np.eye(4, dtype=np.float32)[experts]}
    batch = Batch(windows[:, :-1], windows[:, 1:], np.ones((32, CONTEXT), np.float32), notes)
    with process_group(ALONE, parallel=setup.parallel):
        engine = _engine(setup)
        for _ in range(3):
            engine.train_step(batch, learning_rate=1e-3)
        whole, weights, expected = engine.evaluate([batch]), engine.weights(), 0.0
        plain = _engine(replace(setup, model=shape.base_config))
        for expert in range(4):
            plain.load(project(weights, shape, torch.eye(4)[expert]), None)
            expected += plain.evaluate([batch.rows(slice(8 * expert, 8 * expert + 8))._replace(extra_inputs={})]).total
    assert whole.total == pytest.approx(expected, rel=1e-3 if fp8 is None else 1e-2)


def test_weight_decay_reaches_matrices_alone() -> None:
    """Transformer Engine's norms are parts of its linears, and its Adam has groups of its own."""
    setup = _setup(_shallow(_preset("slm-126m"), 2), "bf16")
    settings = Optimizer(weight_decay=0.3, epsilon=1e-3)
    windows = np.random.default_rng(0).integers(0, VOCABULARY, (8, CONTEXT + 1))
    batch = Batch(windows[:, :-1], windows[:, 1:], np.ones((8, CONTEXT), np.float32))
    with process_group(ALONE, parallel=setup.parallel):
        engine = _engine(setup, settings)
        follower = Follower(engine, settings)
        for _ in range(2):
            loss, gradients = engine.accumulate_gradients(batch), engine.gradients()
            stats = engine.apply_gradients(loss, learning_rate=1e-2)
            follower.follow(gradients, stats, learning_rate=1e-2)
            follower.check(engine)


def test_adapters_train_in_transformer_engines_linears() -> None:
    shape = _shallow(_preset("slm-126m"), 2).model_copy(update={"lora": LowRank(rank=8)})
    setup = _setup(shape, "bf16")
    windows = np.random.default_rng(0).zipf(1.3, (8, CONTEXT + 1)).clip(max=VOCABULARY - 1)
    batch = Batch(windows[:, :-1], windows[:, 1:], np.ones((8, CONTEXT), np.float32))
    with process_group(ALONE, parallel=setup.parallel):
        engine = _engine(setup)
        losses = [engine.train_step(batch, learning_rate=1e-2).loss.mean for _ in range(5)]
    assert losses[-1] < losses[0] - 0.1
