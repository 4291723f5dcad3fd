"""The objective against plain torch, its cached forms against the exact one, and the cache on disk."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from megatron_specialm.base.errors import ArtifactError, ConfigError
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.packing import Packing, WholePacking
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Optimizer
from megatron_specialm.data.store import Batch, StoreWriter, TokenStore, describe_store
from megatron_specialm.data.teacher import (
    ENTROPY,
    IDS,
    LOG_PROBABILITIES,
    TAIL,
    CacheFormat,
    CacheWriter,
    TeacherCache,
    noise_of_draws,
)
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.engine.objective import TEACHER_LOGITS, DeviceBatch, cross_entropy
from megatron_specialm.model import gpt
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.train.distillation import Distillation, Teacher
from megatron_specialm.train.teaching import compress, teach

VOCABULARY, CONTEXT = 23, 12
TEMPERATURE = 2.5
# Of different shapes. Tied embeddings would say again what was read, and leave nothing to any other token.
STUDENT = ModelConfig(layers=2, hidden_size=32, ffn_hidden_size=64, attention_heads=4, tie_embeddings=False)
TEACHER = ModelConfig(
    family="llama",
    layers=1,
    hidden_size=48,
    ffn_hidden_size=64,
    attention_heads=4,
    query_groups=2,
    tie_embeddings=False,
)


# The objective alone: (T, B, V) logits, a quarter of the tokens padding.


def _logits(seed: int, positions: int = 7, rows: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(positions, rows, VOCABULARY, generator=generator)


def _batch(positions: int = 7, rows: int = 3, **extra_inputs: torch.Tensor) -> DeviceBatch:
    """Three windows, over and over."""
    generator = torch.Generator().manual_seed(9)
    tokens, targets = torch.randint(VOCABULARY, (2, 3, positions), generator=generator).repeat(1, rows // 3, 1)
    mask = (torch.rand(3, positions, generator=generator) > 0.25).float().repeat(rows // 3, 1)
    return DeviceBatch(tokens, targets, mask, extra_inputs=extra_inputs)


def _kept(teacher_TBV: torch.Tensor, kept: CacheFormat, seed: int = 0) -> dict[str, torch.Tensor]:
    """The extra inputs (B, T, ...) that a cache of these logits gives."""
    found = compress(
        torch.log_softmax(teacher_TBV.transpose(0, 1).flatten(0, 1) / kept.temperature, 1),
        kept,
        np.random.default_rng(seed),
    )
    positions, rows, _ = teacher_TBV.shape
    return {name: value.view(rows, positions, *value.shape[1:]) for name, value in found.items()}


def _online(teacher_TBV: torch.Tensor) -> dict[str, torch.Tensor]:
    return {TEACHER_LOGITS: teacher_TBV.transpose(0, 1)}


def _loss(
    student_TBV: torch.Tensor,
    extra_inputs: dict[str, torch.Tensor],
    *,
    alpha: float = 1.0,
    temperature: float = TEMPERATURE,
    teacher: Teacher = "online",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, and its gradient by the logits."""
    leaf = student_TBV.clone().requires_grad_()
    objective = Distillation(alpha=alpha, temperature=temperature, teacher=teacher)
    loss = objective(leaf, _batch(*student_TBV.shape[:2], **extra_inputs))
    return loss.detach(), *torch.autograd.grad(loss, leaf)


@pytest.mark.parametrize("teacher", ["online", "exact", "top-k", "sampled"])
def test_without_weight_it_is_cross_entropy_and_needs_no_teacher(teacher: Teacher) -> None:
    leaf = _logits(0).requires_grad_()
    plain = cross_entropy(leaf, _batch())
    (gradient,) = torch.autograd.grad(plain, leaf)
    loss, own = _loss(_logits(0), {}, alpha=0.0, teacher=teacher)
    assert torch.equal(loss, plain) and torch.equal(own, gradient)


@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_it_is_the_closed_form(alpha: float, temperature: float) -> None:
    teacher, batch = _logits(1), _batch()
    leaf = _logits(0).double().requires_grad_()
    student_BTV, teacher_BTV = leaf.transpose(0, 1), teacher.transpose(0, 1).double()
    divergence = functional.kl_div(
        torch.log_softmax(student_BTV / temperature, -1), torch.softmax(teacher_BTV / temperature, -1), reduction="none"
    ).sum(-1)
    from_text = functional.cross_entropy(student_BTV.transpose(1, 2), batch.targets, reduction="none")
    expected = (((1 - alpha) * from_text + alpha * temperature**2 * divergence) * batch.mask).sum()
    (gradient,) = torch.autograd.grad(expected, leaf)
    loss, own = _loss(_logits(0), _online(teacher), alpha=alpha, temperature=temperature)
    torch.testing.assert_close(loss, expected.detach().float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(own, gradient.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kept",
    [None, CacheFormat("exact", VOCABULARY, TEMPERATURE), CacheFormat("top-k", VOCABULARY, TEMPERATURE, 5)],
    ids=str,
)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kept: CacheFormat | None) -> None:
    logits = _logits(0)
    extra_inputs = _online(logits) if kept is None else _kept(logits, kept)
    loss, gradient = _loss(logits, extra_inputs, teacher="online" if kept is None else kept.kind)
    # Rounding of twenty tokens' entropies, some nats each, times temperature squared.
    assert abs(float(loss)) < 2e-4 and float(gradient.abs().max()) < 2e-6
    if kept is None:
        assert float(loss) == 0 and float(gradient.abs().max()) == 0


@pytest.mark.parametrize(
    "kept",
    [CacheFormat("exact", VOCABULARY, TEMPERATURE), CacheFormat("top-k", VOCABULARY, TEMPERATURE, VOCABULARY)],
    ids=str,
)
def test_a_cache_of_the_whole_vocabulary_is_the_teacher(kept: CacheFormat) -> None:
    student, teacher = _logits(0), _logits(1)
    online, cached = _loss(student, _online(teacher)), _loss(student, _kept(teacher, kept), teacher=kept.kind)
    torch.testing.assert_close(cached[0], online[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(cached[1], online[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 5, VOCABULARY - 1])
def test_top_k_is_the_divergence_of_merged_events(count: int) -> None:
    student, teacher = _logits(0), _logits(1)
    extra_inputs = _kept(teacher, CacheFormat("top-k", VOCABULARY, TEMPERATURE, count))
    leaf = student.double().requires_grad_()

    def merged(logits_TBV: torch.Tensor) -> torch.Tensor:
        probabilities = torch.softmax(logits_TBV.transpose(0, 1).double() / TEMPERATURE, -1)
        top = probabilities.gather(-1, extra_inputs[IDS].long())
        return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)

    divergence = functional.kl_div(merged(leaf).log(), merged(teacher), reduction="none").sum(-1)
    expected = TEMPERATURE**2 * (divergence * _batch().mask).sum()
    (gradient,) = torch.autograd.grad(expected, leaf)
    loss, own = _loss(student, extra_inputs, teacher="top-k")
    torch.testing.assert_close(loss, expected.detach().float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(own, gradient.float(), rtol=1e-4, atol=2e-6)


def test_a_rest_too_small_for_one_less_the_others_is_not_lost() -> None:
    """The student puts 1e-20 where the teacher puts a tenth: 1 - sum would be 0, and the divergence infinite."""
    teacher, student = torch.zeros(1, 1, VOCABULARY), torch.zeros(1, 1, VOCABULARY)
    teacher[..., 0], student[..., 0] = np.log(9 * (VOCABULARY - 1)), 46 + np.log(VOCABULARY - 1)
    extra_inputs = _kept(teacher, CacheFormat("top-k", VOCABULARY, 1.0, 1))
    batch = DeviceBatch(*torch.zeros(2, 1, 1, dtype=torch.long), torch.ones(1, 1), extra_inputs=extra_inputs)
    loss = Distillation(alpha=1.0, temperature=1.0, teacher="top-k")(student, batch)
    assert float(loss) == pytest.approx(0.9 * np.log(0.9) + 0.1 * (np.log(0.1) + 46), rel=1e-5)


def test_top_k_is_biased_downwards() -> None:
    """Merging events hides divergence (the data processing inequality), at every token: more events, less hidden."""
    student, teacher = _logits(0, 40, 6), _logits(1, 40, 6)
    exact = float(_loss(student, _online(teacher))[0])
    found = []
    for count in (1, 4, 16):
        extra_inputs = _kept(teacher, CacheFormat("top-k", VOCABULARY, TEMPERATURE, count))
        found.append(float(_loss(student, extra_inputs, teacher="top-k")[0]))
    assert found == sorted(found)
    assert found[0] < 0.5 * exact and found[1] < 0.9 * exact and found[-1] < 0.999 * exact


def test_sampled_is_unbiased_in_loss_and_gradient() -> None:
    """25 caches of 40 times the same windows, 12 draws per token: within 4 standard errors, and those small."""
    caches, times, kept = 25, 40, CacheFormat("sampled", VOCABULARY, TEMPERATURE, 12)
    student, teacher = _logits(0), _logits(1)
    exact, exact_gradient = _loss(student, _online(teacher))
    many, many_teachers = student.repeat(1, times, 1), teacher.repeat(1, times, 1)
    found = [_loss(many, _kept(many_teachers, kept, seed), teacher="sampled") for seed in range(caches)]
    losses = torch.stack([loss for loss, _ in found]).double() / times
    error = losses.std() / caches**0.5
    assert error < 0.005 * exact
    assert abs(losses.mean() - exact) < 4 * error
    # Of the gradient the error is known: temperature times that of a binomial count over the number of draws.
    draws = caches * times * kept.count
    gradient = torch.stack([gradient for _, gradient in found]).view(caches, -1, times, 3, VOCABULARY).mean((0, 2))
    probabilities = torch.softmax(teacher.double() / TEMPERATURE, -1)
    errors = TEMPERATURE * (probabilities * (1 - probabilities) / draws).sqrt()
    assert errors.max() < 0.02 * exact_gradient.abs().max()
    off = (gradient - exact_gradient) / errors
    often = (exact_gradient != 0) & (probabilities * draws > 50)  # where counts are nearly normal
    assert often.sum() > 200
    # The largest of some hundred is beyond 5 errors once in thousands of such tests; the mean square is 1.
    assert float(off[often].abs().max()) < 5
    assert 0.7 < float(off[often].square().mean()) < 1.3


def test_the_noise_of_draws_stays_in_every_epoch() -> None:
    """A student of scores that are free for every token goes to the draws' own distribution, however often it reads them:
    its distance from the teacher is the noise that the cache tells. Fresh draws for every epoch would average out."""
    tokens, epochs, kept = 2_000, 16, CacheFormat("sampled", VOCABULARY, TEMPERATURE, 8)
    teacher = torch.softmax(3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(5)), 0)
    caches = [
        compress(teacher.log().expand(tokens, -1), kept, np.random.default_rng((seed, 0)))[IDS]
        for seed in range(epochs)
    ]
    drawn = torch.stack([functional.one_hot(ids, VOCABULARY).double().mean(1) for ids in caches])
    expected = float(1 - (teacher**2).sum()) / kept.count

    def distance(read: torch.Tensor) -> float:
        return float(((read - teacher) ** 2).sum(1).mean())

    assert distance(drawn[:1].expand(epochs, -1, -1).mean(0)) == pytest.approx(expected, rel=0.05)
    assert distance(drawn.mean(0)) == pytest.approx(expected / epochs, rel=0.05)
    assert noise_of_draws(caches[0].numpy()) == pytest.approx(expected, rel=0.05)
    assert noise_of_draws(caches[0].numpy()[:, :1]) is None


@pytest.mark.parametrize("teacher", ["online", "exact", "top-k", "sampled"])
def test_padding_does_not_count(teacher: Teacher) -> None:
    student, logits = _logits(0), _logits(1)
    extra_inputs = _online(logits) if teacher == "online" else _kept(logits, _some(teacher))
    loss, gradient = _loss(student, extra_inputs, alpha=0.5, teacher=teacher)
    padding = _batch().mask == 0
    assert padding.any() and not gradient.transpose(0, 1)[padding].any()
    zeroed = {
        name: value.masked_fill(padding.view(*padding.shape, *[1] * (value.ndim - 2)), 0)
        for name, value in extra_inputs.items()
    }
    again, gradient_again = _loss(student, zeroed, alpha=0.5, teacher=teacher)
    assert torch.equal(again, loss) and torch.equal(gradient_again, gradient)


def _some(kind: Teacher) -> CacheFormat:
    assert kind != "online"
    return CacheFormat(kind, VOCABULARY, TEMPERATURE, 0 if kind == "exact" else 6)


@pytest.mark.parametrize("settings", [{"alpha": 1.1}, {"alpha": -0.1}, {"temperature": 0.0}])
def test_weights_and_temperatures_that_mean_nothing_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Distillation(**{"alpha": 0.5, "temperature": 1.0, **settings}, teacher="online")


# The cache: a store on disk, a teacher that reads it, and engines that learn from either.


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    """20 documents of uneven length, some of them several windows."""
    generator = np.random.default_rng(0)
    (tmp_path / "tokens").mkdir()
    writer = StoreWriter(tmp_path / "tokens", "train", context_length=CONTEXT, vocabulary_size=VOCABULARY)
    for length in generator.integers(2, 30, 20):
        writer.add_document(np.append(generator.integers(1, VOCABULARY, length), 0))
    describe_store(
        tmp_path / "tokens", splits={"train": writer.finish()}, tokenizer="a" * 64, context_length=CONTEXT,
        vocabulary_size=VOCABULARY, eod=0,
    )  # fmt: skip
    return TokenStore.open(tmp_path / "tokens", "train")


def _model(shape: ModelConfig, *, seed: int) -> Gpt:
    model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    model.initialize(seed=seed)
    # First weights are small and all distributions nearly uniform: sharper ones have something to say.
    model.load({weight.name: 6 * weight.parameter.detach()[: weight.spec.shape[0]] for weight in model.weights()})
    return model


def _with_teacher_logits(
    folder: Path,
    store: TokenStore,
    kept: CacheFormat,
    *,
    batch_size: int = 5,
    packing: WholePacking = "none",
    seed: int = 0,
) -> TeacherCache:
    writer = CacheWriter(folder, kept, context_length=CONTEXT, teacher="t", store="s")
    tokens, slots, _ = teach(_model(TEACHER, seed=1), store, writer, batch_size=batch_size, packing=packing, seed=seed)
    assert (tokens, slots) == (store.tokens, store.tokens if packing == "packed" else len(store) * CONTEXT)
    return TeacherCache.open(folder, teacher="t", store="s")


def _gradients(
    batch: Batch, *, kind: Teacher, micro_batch_size: int = 4, packing: Packing = "none"
) -> tuple[float, dict[str, torch.Tensor]]:
    engine = MegatronEngine(
        _model(STUDENT, seed=0),
        parallel=ParallelConfig(),
        optimizer=Optimizer(),
        micro_batch_size=micro_batch_size,
        packing=packing,
        objective=Distillation(alpha=0.7, temperature=TEMPERATURE, teacher=kind),
        teacher=_model(TEACHER, seed=1) if kind == "online" else None,
    )
    loss = engine.accumulate_gradients(batch)
    return loss.mean, engine.gradients()


def _assert_same(
    one: tuple[float, dict[str, torch.Tensor]],
    other: tuple[float, dict[str, torch.Tensor]],
    *,
    tolerance: float = 1e-5,
) -> None:
    assert other[0] == pytest.approx(one[0], rel=1e-5)
    for name, gradient in one[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(other[1][name], gradient, rtol=0, atol=tolerance * scale)


@pytest.mark.usefixtures("alone")
def test_the_exact_cache_is_the_teacher_online(tmp_path: Path, store: TokenStore) -> None:
    """Written batch by batch in the order of ids, read in another order and other batches."""
    cache = _with_teacher_logits(tmp_path / "cache", store, CacheFormat("exact", VOCABULARY, TEMPERATURE), batch_size=7)
    assert len(cache) == len(store)
    ids = np.random.default_rng(1).permutation(len(store))[:16]
    online = _gradients(store.batch(ids), kind="online")
    for order, micro_batch_size in ((ids, 4), (ids[::-1], 8), (ids, 1), (ids, 3)):
        batch = store.batch(order)._replace(extra_inputs=cache.extra_inputs(order))
        _assert_same(online, _gradients(batch, kind="exact", micro_batch_size=micro_batch_size))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("packing", ["sorted", "packed"])
@pytest.mark.parametrize("kind", ["online", "exact", "top-k", "sampled"])
def test_packing_changes_nothing(tmp_path: Path, store: TokenStore, kind: Teacher, packing: Packing) -> None:
    ids = np.random.default_rng(1).permutation(len(store))[:16]
    batch = store.batch(ids)
    if kind != "online":
        cache = _with_teacher_logits(tmp_path / "cache", store, _some(kind), packing="packed")
        batch = batch._replace(extra_inputs=cache.extra_inputs(ids))
    padded, without_padding = (_gradients(batch, kind=kind, packing=value) for value in ("none", packing))
    _assert_same(
        padded, without_padding, tolerance=3e-5
    )  # of sharp distributions; of usual ones see test_packed_parity.py


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", ["online", "exact"])
def test_windows_that_are_not_kept_apart_are_found(
    tmp_path: Path, store: TokenStore, kind: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that leaks into the next window, of the student or of both."""
    ids = np.random.default_rng(1).permutation(len(store))[:16]
    batch = store.batch(ids)
    if kind == "exact":
        cache = _with_teacher_logits(tmp_path / "cache", store, _some(kind), packing="packed")
        batch = batch._replace(extra_inputs=cache.extra_inputs(ids))
    padded, healthy = _gradients(batch, kind=kind), gpt.packed_windows
    monkeypatch.setattr(gpt, "packed_windows", lambda lengths, **device: healthy([sum(lengths)], **device))
    with pytest.raises(AssertionError):
        _assert_same(padded, _gradients(batch, kind=kind, packing="packed"), tolerance=1e-2)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", ["top-k", "sampled"])
def test_accumulation_changes_nothing(tmp_path: Path, store: TokenStore, kind: Teacher) -> None:
    cache = _with_teacher_logits(tmp_path / "cache", store, _some(kind))
    ids = np.arange(8)
    batch = store.batch(ids)._replace(extra_inputs=cache.extra_inputs(ids))
    whole, parts = (_gradients(batch, kind=kind, micro_batch_size=size) for size in (8, 2))
    _assert_same(whole, parts)


@pytest.mark.usefixtures("alone")
def test_a_teacher_is_asked_in_training_only_and_never_trained(store: TokenStore) -> None:
    teacher = _model(TEACHER, seed=1)
    before = {weight.name: weight.parameter.detach().clone() for weight in teacher.weights()}
    batch = store.batch(np.arange(8))
    settings = {"parallel": ParallelConfig(), "optimizer": Optimizer(), "micro_batch_size": 4}
    objective = Distillation(alpha=1.0, temperature=1.0, teacher="online")
    engine = MegatronEngine(_model(STUDENT, seed=0), **settings, objective=objective, teacher=teacher)
    plain = MegatronEngine(_model(STUDENT, seed=0), **settings)
    assert engine.evaluate([batch]) == plain.evaluate([batch])
    first, *_, last = (engine.train_step(batch, learning_rate=1e-2).loss.mean for _ in range(20))
    assert last < 0.5 * first
    assert all(torch.equal(weight.parameter, before[weight.name]) for weight in teacher.weights())


@pytest.mark.usefixtures("alone")
def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    teacher = Gpt(TEACHER, vocabulary_size=VOCABULARY + 1, context_length=CONTEXT)
    with pytest.raises(ConfigError, match="vocabulary has 24 tokens, the student's 23"):
        MegatronEngine(
            _model(STUDENT, seed=0),
            parallel=ParallelConfig(),
            optimizer=Optimizer(),
            micro_batch_size=4,
            teacher=teacher,
        )


@pytest.mark.usefixtures("alone")
def test_draws_depend_on_seed_and_window_alone(tmp_path: Path, store: TokenStore) -> None:
    kept, ids = _some("sampled"), np.arange(len(store))
    one, other, packed, another = (
        _with_teacher_logits(
            tmp_path / f"{size}-{packing}-{seed}", store, kept, batch_size=size, packing=packing, seed=seed
        ).extra_inputs(ids)[IDS]
        for size, packing, seed in ((4, "none", 0), (9, "none", 0), (4, "packed", 0), (4, "none", 1))
    )
    # Other batches may round a probability otherwise, and a draw that falls between the two is another id.
    assert max((one != other).mean(), (one != packed).mean()) < 0.01 and (one != another).mean() > 0.1


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", ["exact", "top-k", "sampled"])
def test_notes_are_what_the_teacher_says_and_zero_behind_a_window(
    tmp_path: Path, store: TokenStore, kind: Teacher
) -> None:
    cache = _with_teacher_logits(tmp_path / "cache", store, _some(kind))
    ids = np.array([5, 2, 11, 2])
    batch, extra_inputs = store.batch(ids), cache.extra_inputs(ids)
    expected = torch.log_softmax(_model(TEACHER, seed=1).logits(torch.from_numpy(batch.tokens)) / TEMPERATURE, -1)
    shapes = {IDS: (6,), LOG_PROBABILITIES: (VOCABULARY,) if kind == "exact" else (6,), TAIL: (), ENTROPY: ()}
    for name, value in extra_inputs.items():
        assert value.shape == (4, CONTEXT, *shapes[name])
        assert not value[batch.mask == 0].any()
    if LOG_PROBABILITIES in extra_inputs:
        found = torch.from_numpy(extra_inputs[LOG_PROBABILITIES])
        wanted = expected.gather(-1, torch.from_numpy(extra_inputs[IDS]).long()) if kind == "top-k" else expected
        counts = torch.from_numpy(batch.mask) > 0
        torch.testing.assert_close(found[counts], wanted[counts], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("alone")
def test_a_cache_of_something_else_or_cut_short_is_refused(tmp_path: Path, store: TokenStore) -> None:
    folder = tmp_path / "cache"
    _with_teacher_logits(folder, store, _some("sampled"))
    for wanted, said in (
        ({"teacher": "other", "store": "s"}, "with the teacher t, not other: teach again"),
        ({"teacher": "t", "store": "other"}, "with the store s, not other: teach again"),
    ):
        with pytest.raises(ArtifactError, match=said) as caught:
            TeacherCache.open(folder, **wanted)
        assert str(folder) in str(caught.value)
    for name in ("ids.bin", "entropy.bin", "lengths.bin"):
        cut = tmp_path / f"cut-{name}"
        shutil.copytree(folder, cut)
        content = (cut / name).read_bytes()
        (cut / name).write_bytes(content[:-4])
        with pytest.raises(ArtifactError, match=rf"{name}: {len(content) - 4} bytes, cache.json says {len(content)}"):
            TeacherCache.open(cut, teacher="t", store="s")
        (cut / name).unlink()
        with pytest.raises(ArtifactError, match=rf"{name}: 0 bytes"):
            TeacherCache.open(cut, teacher="t", store="s")
    # Writing anew: from the start of that on, the old description is gone.
    CacheWriter(folder, _some("sampled"), context_length=CONTEXT, teacher="t", store="s")
    with pytest.raises(ArtifactError, match=r"cache.json: no such file"):
        TeacherCache.open(folder, teacher="t", store="s")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"kind": "top-k", "count": VOCABULARY + 1},
            f"count 24: the vocabulary has {VOCABULARY}.*at most {VOCABULARY}",
        ),
        ({"kind": "top-k"}, "count 0"),
        ({"kind": "exact", "count": 3}, "leave count out"),
        ({"kind": "sampled", "count": 3, "temperature": 0.0}, "temperature 0.0"),
    ],
)
def test_what_cannot_be_kept_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CacheFormat(vocabulary_size=VOCABULARY, **settings)


@pytest.mark.parametrize(("vocabulary", "size"), [(2**16, 2), (2**16 + 1, 4)])
def test_ids_take_as_many_bytes_as_they_need(vocabulary: int, size: int) -> None:
    dtype, _ = CacheFormat("sampled", vocabulary, count=1).arrays()[IDS]
    assert dtype.itemsize == size and np.iinfo(dtype).max >= vocabulary - 1


@pytest.mark.usefixtures("alone")
def test_a_cache_tells_the_noise_of_its_draws(tmp_path: Path, store: TokenStore) -> None:
    cache, ids = _with_teacher_logits(tmp_path / "sampled", store, _some("sampled")), np.arange(len(store))
    assert np.array_equal(cache.extra_inputs(ids)[IDS], cache.extra_inputs(ids)[IDS])  # in another epoch the same draws
    assert 0 < (cache.noise() or 0) < 1 / cache.format.count
    assert _with_teacher_logits(tmp_path / "exact", store, _some("exact")).noise() is None
