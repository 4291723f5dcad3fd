"""The one model: Megatron-Core's `GPTModel`, built from a `ModelConfig` through a layer spec.

The same definition runs on CPU and GPU, and in every layout. With Transformer Engine its fused layers are used; without
it, and in fp32, Megatron-Core's own with PyTorch's fused attention. Which part of the canonical weights (`model/weights.py`) a
process holds follows from the layout.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import ParallelConfig, padded_vocabulary, split_layers
from megatron_specialm.config.precision import LINEARS, Fp8Config, Precision, megatron_settings
from megatron_specialm.model import cpu
from megatron_specialm.model.attention import FusedCoreAttention
from megatron_specialm.model.derived import derived_weights
from megatron_specialm.model.initial import first_value
from megatron_specialm.model.layers import FeedForward, TorchNorm, keep_in_bf16
from megatron_specialm.model.weights import (
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    Sliceable,
    WeightSpec,
    weight_specs,
)

# Transformer Engine fuses a norm into the linear behind it, and calls its parameters so.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def use_transformer_engine(settings: TransformerConfig) -> bool:
    """Whether layers come from Transformer Engine: it is installed, there is a GPU for it, and the numbers are not fp32,
    which it would multiply in TF32, by ten of their bits."""
    return HAVE_TE and torch.cuda.is_available() and settings.bf16


def has_kernels() -> bool:
    """Whether there is a GPU, and so kernels to fuse."""
    return torch.cuda.is_available()


class LocalParameter(NamedTuple):
    """A parameter of this process, the canonical weight that it is (a part of), and how it is cut."""

    name: str
    parameter: torch.nn.Parameter
    spec: WeightSpec


class Gpt:
    """What this process holds of a model: one run of layers, or several under an interleaved pipeline.

    Weights are not meaningful before `initialize` or `load`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        vocabulary_size: int,
        context_length: int,
        precision: Precision = "fp32",
        fp8: Fp8Config | None = None,
        parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 (frozen)
    ) -> None:
        cpu.install()
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.specs = weight_specs(config, vocabulary_size=vocabulary_size, tensor_parallel=parallel.tensor_parallel)
        settings = transformer_config(config, vocabulary_size, precision=precision, fp8=fp8, parallel=parallel)
        self.chunks = [
            _Chunk(settings, config, stage, vocabulary_size=vocabulary_size, context_length=context_length)
            for stage in range(parallel.virtual_pipeline)
        ]
        self.derived = derived_weights(self.chunks, config, self.specs)
        for chunk in self.chunks:
            if torch.cuda.is_available():
                chunk.cuda()
            if fp8 is not None:
                keep_in_bf16(chunk, [name for name in LINEARS if name not in fp8.linears])

    def weights(self) -> Iterator[LocalParameter]:
        """This process's parameters. A tied output layer on another pipeline stage than the embedding is a copy of it."""
        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                canonical = chunk.canonical_name(name)
                yield LocalParameter(canonical, parameter, self.specs[canonical])

    def initialize(self, *, seed: int) -> None:
        """Draw first weights (`model/initial.py`). No layout changes them."""
        self._fill(lambda name: first_value(name, self.specs[name].shape, self.config, seed=seed))

    def load(self, tensors: Mapping[str, Sliceable]) -> None:
        """Take canonical weights; of those in files, each process reads its part.

        Raises:
            CheckpointError: naming a weight that is missing, left over, or of another shape.
        """
        if missing := sorted(set(self.specs) - set(tensors)):
            raise CheckpointError(f"the checkpoint lacks {missing[0]} ({len(missing)} missing): it is of another model")
        if unused := sorted(set(tensors) - set(self.specs)):
            raise CheckpointError(
                f"the model has no place for {unused[0]} ({len(unused)} unused): it is of another model"
            )
        for name, spec in self.specs.items():
            if tensors[name].shape != spec.shape:
                raise CheckpointError(
                    f"{name}: the checkpoint has shape {tuple(tensors[name].shape)}, the model {spec.shape}: "
                    "model preset and tokenizer must be those it was trained with"
                )
        self._fill(tensors.__getitem__)

    @torch.no_grad()
    def _fill(self, value: Callable[[str], Sliceable]) -> None:
        for name, parameter, spec in self.weights():
            fill(parameter.view(-1), spec, value(name))

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """(B, T) token ids -> (B, T, V) logits over the real vocabulary. For a model that is whole on this process.

        The result is a view with positions first in memory: reduce it in that order, or pay for a copy.
        """
        (whole,) = self.chunks
        return forward(whole, tokens_BT).transpose(0, 1)

    def train(self, mode: bool = True) -> "Gpt":
        """Training or evaluation mode."""
        for chunk in self.chunks:
            chunk.train(mode)
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.chunks[0].parameters()).device


def local_pieces(
    flat: torch.Tensor, spec: WeightSpec, *, first: int = 0
) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """`WeightSpec.pieces` for this process."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    return spec.pieces(flat, rank=rank, size=parallel_state.get_tensor_model_parallel_world_size(), first=first)


@torch.no_grad()
def fill(flat: torch.Tensor, spec: WeightSpec, whole: Sliceable, *, first: int = 0) -> None:
    """Copy into `flat` what this process holds of a canonical tensor: of its flattened part, the elements from `first` on.
    Padding is zeros."""
    if spec.padded:
        flat.zero_()
    for index, piece in local_pieces(flat, spec, first=first):
        piece.copy_(whole[index])


def forward(chunk: torch.nn.Module, tokens_BT: torch.Tensor) -> torch.Tensor:
    """One chunk's forward pass, wrapped or not: to (T, B, V) logits of this process's share of the real vocabulary, or
    from a chunk that is not the last to hidden states for the next."""
    positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    return chunk(tokens_BT, positions_BT, None, labels=tokens_BT)


class _Chunk(GPTModel):
    """A GPTModel, or a run of its layers, that knows canonical names and hands out its logits as they lie in memory.

    Asked for logits, Megatron-Core copies them to sequences first, and their gradient back: at a small model's size a
    fifth of a training step. Asked for a loss, it passes them to `compute_language_model_loss` as they are.
    """

    def __init__(
        self, settings: TransformerConfig, config: ModelConfig, stage: int, *, vocabulary_size: int, context_length: int
    ) -> None:
        size = parallel_state.get_tensor_model_parallel_world_size()
        padded = padded_vocabulary(vocabulary_size, tensor_parallel=size)
        rows = padded // size
        first = parallel_state.get_tensor_model_parallel_rank() * rows
        self._real_columns = min(max(vocabulary_size - first, 0), rows)
        # Megatron-Core numbers the chunks of an interleaved pipeline only; None is its word for a plain one.
        vp_stage = stage if settings.virtual_pipeline_model_parallel_size else None
        super().__init__(
            config=settings,
            transformer_layer_spec=_block(settings, vp_stage),
            vocab_size=padded,
            max_sequence_length=context_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=config.tie_embeddings,
            position_embedding_type="rope",
            rotary_percent=1.0,
            rotary_base=config.rotary_base,
            vp_stage=vp_stage,
        )

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """(T, B, V with padding) -> (T, B, V): padding is cut off here, for all that follows."""
        return logits[..., : self._real_columns]

    def bfloat16(self) -> "_Chunk":
        """Round all weights to bf16 but those that are kept in fp32 (`model/derived.py`)."""

        def rounded(tensor: torch.Tensor) -> torch.Tensor:
            keep = getattr(tensor, "keep_fp32", False) or not tensor.is_floating_point()
            return tensor if keep else tensor.bfloat16()

        return self._apply(rounded)

    def _is_in_embd_group(self) -> bool:
        """Megatron-Core asks before it copies tied embeddings from the first stage to the last, by way of a GPU. Both
        are filled from the same canonical weight here."""
        return False

    def canonical_name(self, name: str) -> str:
        """The canonical name of one of this chunk's parameters."""
        for fused, plain in _FUSED_NORMS.items():
            name = name.replace(fused, plain)
        name = name.replace(".base_weight", ".weight")  # of a linear with LoRA
        if name == OUTPUT_LAYER and self.share_embeddings_and_output_weights:
            return WORD_EMBEDDINGS
        if name.startswith("decoder.layers."):
            own, _, rest = name.removeprefix("decoder.layers.").partition(".")
            return f"decoder.layers.{self.decoder.layers[int(own)].layer_number - 1}.{rest}"
        return name


def transformer_config(
    config: ModelConfig,
    vocabulary_size: int,
    *,
    precision: Precision,
    parallel: ParallelConfig,
    fp8: Fp8Config | None = None,
) -> TransformerConfig:
    """Megatron-Core's settings for a shape and a layout. Fused kernels stand where there is a GPU for them, and where they
    compute what the CPU computes."""
    llama = config.family == "llama"
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.attention_heads,
        num_query_groups=config.kv_heads,
        normalization="RMSNorm" if llama else "LayerNorm",
        layernorm_epsilon=config.norm_epsilon,
        gated_linear_unit=llama,
        add_bias_linear=not llama,
        add_qkv_bias=not llama,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # Weights are drawn by name in `Gpt.initialize`, on the CPU: they depend on neither device nor layout. Megatron-Core
        # draws none, which would take as long again.
        use_cpu_initialization=True,
        init_method=_undrawn,
        output_layer_init_method=_undrawn,
        # Losses are sums over tokens; gradients are divided once by the global number of tokens. Exact for any layout.
        calculate_per_token_loss=True,
        bias_dropout_fusion=has_kernels(),
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        # A step's micro-batches would share the FP8 copy of the first one's weight; these have weights of their own.
        disable_parameter_transpose_cache=config.projection is not None,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tensor_parallel,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel,
        **_activation(config),
        **megatron_settings(precision, fp8),
        **_pipeline(config, vocabulary_size, parallel),
        **_RECOMPUTE[parallel.recompute],
    )


def _activation(config: ModelConfig) -> dict:
    """Megatron-Core knows its fused kernel by PyTorch's exact GELU, but what it computes is the tanh approximation: it
    stands for that, and the exact one goes without."""
    if config.family == "llama":
        return {"activation_func": functional.silu, "bias_activation_fusion": has_kernels()}
    if config.activation == "gelu_tanh" and not has_kernels():
        return {"activation_func": partial(functional.gelu, approximate="tanh")}
    return {"activation_func": functional.gelu, "bias_activation_fusion": config.activation == "gelu_tanh"}


def _pipeline(config: ModelConfig, vocabulary_size: int, parallel: ParallelConfig) -> dict:
    """Which layers stand on which stage. Megatron-Core wants chunks in the order of the forward pass."""
    if parallel.pipeline_parallel == 1:
        return {}
    chunks = [["decoder"] * count for count in split_layers(config, vocabulary_size, parallel.chunks)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return {
        "pipeline_model_parallel_size": parallel.pipeline_parallel,
        "pipeline_model_parallel_layout": chunks,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        # Two interleaved stages send each other two tensors at a time. In one batch they would be taken for one another.
        "batch_p2p_comm": parallel.virtual_pipeline == 1,
        "overlap_p2p_comm": parallel.virtual_pipeline > 1,
    }


def _undrawn(weight: torch.Tensor) -> torch.Tensor:
    return weight


# Attention is fused and keeps nothing that grows with the square of the context: what is worth recomputing before whole
# layers is the feed-forward part, the widest.
_RECOMPUTE: dict[str, dict] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _block(settings: TransformerConfig, vp_stage: int | None) -> ModuleSpec | TransformerBlockSubmodules:
    """The modules of a chunk's layers."""
    fused = use_transformer_engine(settings)
    layer = (
        get_gpt_layer_with_transformer_engine_spec()
        if fused
        else get_gpt_layer_local_spec(normalization=settings.normalization)
    )
    if settings.recompute_granularity == "selective":
        layer.submodules.mlp.module = FeedForward
    if fused:
        return layer
    layer.submodules.self_attention.submodules.core_attention = FusedCoreAttention
    norm = layer.submodules.input_layernorm
    if norm is WrappedTorchNorm or not torch.cuda.is_available():  # otherwise apex's fused one
        norm = layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = TorchNorm
    layers = [layer] * get_num_layers_to_build(settings, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
