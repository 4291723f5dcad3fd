"""The model: Megatron-Core's `GPTModel`, built from a `ModelConfig` through a layer spec.

The same definition runs on CPU and GPU and in every layout. It uses Transformer Engine's fused layers if possible. Otherwise,
and in fp32, it uses Megatron-Core's layers with PyTorch's fused attention. The layout determines which part of the canonical
weights (`model/weights.py`) a process holds.
"""

from megatron_specialm.model import cpu  # first: it imports Megatron-Core

# isort: split

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import Layout, ParallelConfig, padded_vocabulary, split_layers
from megatron_specialm.config.precision import LINEARS, Fp8Config, Precision, megatron_settings
from megatron_specialm.model import rotary
from megatron_specialm.model.attention import PackedWindows
from megatron_specialm.model.derived import derived_weights
from megatron_specialm.model.initial import first_weight
from megatron_specialm.model.layer_specs import layer_specs, use_transformer_engine
from megatron_specialm.model.layers import keep_in_bf16
from megatron_specialm.model.moe import MegatronExperts, MoeFeedForward, RoutedBuilder
from megatron_specialm.model.weights import (
    FUSED_NORMS,
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    Sliceable,
    WeightSpec,
    weight_specs,
)


def has_kernels() -> bool:
    """Whether fused kernels can run: there is a GPU."""
    return torch.cuda.is_available()


class LocalParameter(NamedTuple):
    """A parameter of this process, the name of its canonical weight, and how that weight is sharded."""

    name: str
    parameter: torch.nn.Parameter
    spec: WeightSpec


class Gpt:
    """The layers of a model on this process: one chunk, or several under an interleaved pipeline schedule.

    Weights are undefined before `initialize` or `load`.

    Args:
        experts: builds the routed experts of each MoE layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        vocabulary_size: int,
        context_length: int,
        precision: Precision = "fp32",
        fp8: Fp8Config | None = None,
        parallel: Layout = ParallelConfig(),  # noqa: B008 (frozen)
        experts: RoutedBuilder = MegatronExperts,
    ) -> None:
        cpu.install()
        rotary.install()
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.context_length = context_length
        self.specs = weight_specs(config, vocabulary_size=vocabulary_size, tensor_parallel=parallel.tensor_parallel)
        settings = transformer_config(config, vocabulary_size, precision=precision, fp8=fp8, parallel=parallel)
        self.chunks = [
            _Chunk(settings, config, stage, experts, vocabulary_size=vocabulary_size, context_length=context_length)
            for stage in range(parallel.virtual_pipeline)
        ]
        self.derived = derived_weights(self.chunks, config, self.specs)
        for chunk in self.chunks:
            if torch.cuda.is_available():
                chunk.cuda()
            if fp8 is not None:
                keep_in_bf16(chunk, [name for name in LINEARS if name not in fp8.linears])

    def weights(self) -> Iterator[LocalParameter]:
        """This process's parameters. A tied output layer on another pipeline stage than the embedding is listed as a copy."""
        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                canonical, expert = chunk.place(name)
                spec = self.specs[canonical]
                yield LocalParameter(canonical, parameter, spec if expert is None else replace(spec, expert=expert))

    def initialize(self, *, seed: int) -> None:
        """Draw the first weights (`model/initial.py`). They do not depend on the layout."""
        self._fill(lambda name: first_weight(name, self.specs[name], self.config, seed=seed))

    def load(self, tensors: Mapping[str, Sliceable]) -> None:
        """Load canonical weights. From files, each process reads only its part.

        Raises:
            CheckpointError: a weight is missing, unexpected, or of another shape.
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

    def logits(self, tokens_BT: torch.Tensor, *, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """(B, T) token ids -> (B, T, V) logits over the vocabulary without padding. Only for a complete model on this process.

        The result is a view; in memory positions come first. Reduce it in that order to avoid a copy.

        Args:
            lengths: see `forward`.
        """
        (whole,) = self.chunks
        return forward(whole, tokens_BT, lengths=lengths).transpose(0, 1)

    def train(self, mode: bool = True) -> "Gpt":
        """Set training or evaluation mode."""
        for chunk in self.chunks:
            chunk.train(mode)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.chunks[0].parameters()).device


def local_pieces(
    flat: torch.Tensor, spec: WeightSpec, *, first: int = 0
) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """`WeightSpec.pieces` for this process."""
    group = tensor_parallel_group(spec)
    return spec.pieces(flat, rank=group.rank(), size=group.size(), first=first)


def tensor_parallel_group(spec: WeightSpec) -> dist.ProcessGroup:
    """The processes over which a weight is sharded by tensor parallelism."""
    if spec.is_expert:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


@torch.no_grad()
def fill(flat: torch.Tensor, spec: WeightSpec, whole: Sliceable, *, first: int = 0) -> None:
    """Copy this process's part of a canonical tensor into `flat`, from element `first` of the flattened part on. Padding is set
    to zero."""
    if spec.padded:
        flat.zero_()
    for index, piece in local_pieces(flat, spec, first=first):
        piece.copy_(whole[index])


def forward(
    chunk: torch.nn.Module,
    tokens_BT: torch.Tensor,
    routing: torch.Tensor | None = None,
    *,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """The forward pass of a chunk, which may be wrapped. The last chunk returns logits (T, B, V) of this process's vocabulary
    shard without padding; other chunks return hidden states.

    Args:
        routing: for an MoE model (B, T), True for tokens that no expert computes; they must not precede others in a window. For
            one that routes by cluster (B, T, E), True for the expert of each token.
        lengths: of the windows of a packed sequence (B = 1), T in all. Each is attended to alone, from position 0.
    """
    positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    windows = None if lengths is None else packed_windows(lengths, device=tokens_BT.device)
    return chunk(tokens_BT, positions_BT, None, labels=tokens_BT, padding_mask=routing, packed_seq_params=windows)


def packed_windows(lengths: Sequence[int], *, device: torch.device) -> PackedWindows:
    """The windows of a packed sequence for Megatron-Core.

    The longest length must be the true one: where it is the number of all tokens, Megatron-Core lets positions run on from
    window to window.
    """
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    longest = max(lengths)
    return PackedWindows("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest, lengths=lengths)


class _Chunk(GPTModel):
    """A GPTModel, or a chunk of its layers, that has canonical names and returns logits without transposing them.

    When Megatron-Core returns logits, it transposes them and their gradient, which takes 20% of a small model's step. When it
    computes a loss, it passes them unchanged to `compute_language_model_loss`; so that method returns the logits here.
    """

    def __init__(
        self,
        settings: TransformerConfig,
        config: ModelConfig,
        stage: int,
        experts: RoutedBuilder,
        *,
        vocabulary_size: int,
        context_length: int,
    ) -> None:
        size = parallel_state.get_tensor_model_parallel_world_size()
        padded = padded_vocabulary(vocabulary_size, tensor_parallel=size)
        rows = padded // size
        first = parallel_state.get_tensor_model_parallel_rank() * rows
        self._real_columns = min(max(vocabulary_size - first, 0), rows)
        # Megatron-Core numbers chunks only in an interleaved schedule; otherwise the number is None.
        vp_stage = stage if settings.virtual_pipeline_model_parallel_size else None
        super().__init__(
            config=settings,
            transformer_layer_spec=layer_specs(settings, vp_stage, config, experts),
            vocab_size=padded,
            max_sequence_length=context_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=config.tie_embeddings,
            position_embedding_type="rope",
            rotary_percent=1.0,
            rotary_base=config.rotary_base,
            rope_scaling=config.rotary_scaling is not None,
            rope_scaling_factor=config.rotary_scaling or 1.0,
            vp_stage=vp_stage,
        )

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """(T, B, V with padding) -> (T, B, V): remove the vocabulary padding."""
        return logits[..., : self._real_columns]

    def bfloat16(self) -> "_Chunk":
        """Convert all weights to bf16 except those that stay in fp32 (`model/derived.py`)."""

        def rounded(tensor: torch.Tensor) -> torch.Tensor:
            keep = getattr(tensor, "keep_fp32", False) or not tensor.is_floating_point()
            return tensor if keep else tensor.bfloat16()

        return self._apply(rounded)

    def _is_in_embd_group(self) -> bool:
        """False: Megatron-Core would copy tied embeddings from the first stage to the last through a GPU. Here both stages
        load the same canonical weight."""
        return False

    def _preprocess(self, *args: Any, padding_mask: torch.Tensor | None = None, **kwargs: Any) -> tuple:
        """As Megatron-Core's, but sequence parallelism cuts the padding mask on every pipeline stage, not on the first only."""
        *found, _ = super()._preprocess(*args, **kwargs)
        if padding_mask is not None and self.config.sequence_parallel:
            group = parallel_state.get_tensor_model_parallel_group()
            padding_mask = padding_mask.chunk(group.size(), dim=1)[group.rank()].contiguous()
        return (*found, padding_mask)

    def place(self, name: str) -> tuple[str, int | None]:
        """The canonical name of one of this chunk's parameters, and the index of the expert that it is of, if of one."""
        for fused, plain in FUSED_NORMS.items():
            name = name.replace(fused, plain)
        name = name.replace(".base_weight", ".weight")  # a linear with LoRA
        if name == OUTPUT_LAYER and self.share_embeddings_and_output_weights:
            return WORD_EMBEDDINGS, None
        if not name.startswith("decoder.layers."):
            return name, None
        own, _, rest = name.removeprefix("decoder.layers.").partition(".")
        layer, expert = self.decoder.layers[int(own)], None
        if isinstance(layer.mlp, MoeFeedForward) and rest.startswith("mlp."):
            place, expert = layer.mlp.place(rest.removeprefix("mlp."))
            rest = f"mlp.{place}"
        return f"decoder.layers.{layer.layer_number - 1}.{rest}", expert


def transformer_config(
    config: ModelConfig,
    vocabulary_size: int,
    *,
    precision: Precision,
    parallel: Layout,
    fp8: Fp8Config | None = None,
) -> TransformerConfig:
    """Megatron-Core's config for a model and a layout. Fused kernels are on only if there is a GPU and if they compute the same
    function as the CPU."""
    llama = config.family == "llama"
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.attention_heads,
        num_query_groups=config.kv_heads,
        kv_channels=config.head_size,
        qk_layernorm=config.qk_norm,
        normalization="RMSNorm" if llama else "LayerNorm",
        layernorm_epsilon=config.norm_epsilon,
        gated_linear_unit=llama,
        add_bias_linear=not llama,
        add_qkv_bias=config.qkv_bias or not llama,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # `Gpt.initialize` draws weights by name on the CPU, so that they depend on neither device nor layout. An
        # initialization by Megatron-Core would be wasted time.
        use_cpu_initialization=True,
        init_method=_undrawn,
        output_layer_init_method=_undrawn,
        # Losses are summed over tokens; gradients are divided once by the global number of tokens. Exact in any layout.
        calculate_per_token_loss=True,
        bias_dropout_fusion=has_kernels(),
        apply_rope_fusion=use_transformer_engine(bf16=precision != "fp32"),
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        # With caching, all micro-batches would use the FP8 weight of the first one; derived weights differ between them.
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
    """The activation and its fusion. Megatron-Core selects its fused GELU kernel by PyTorch's exact GELU, but that kernel
    computes the tanh approximation. So the fused kernel is used for `gelu_tanh` only."""
    if config.family == "llama":
        return {"activation_func": functional.silu, "bias_activation_fusion": has_kernels()}
    if config.activation == "gelu_tanh" and not has_kernels():
        return {"activation_func": partial(functional.gelu, approximate="tanh")}
    return {"activation_func": functional.gelu, "bias_activation_fusion": config.activation == "gelu_tanh"}


def _pipeline(config: ModelConfig, vocabulary_size: int, parallel: Layout) -> dict:
    """The layers of each pipeline stage. Megatron-Core expects the chunks in the order of the forward pass."""
    if parallel.pipeline_parallel == 1:
        return {}
    chunks = [["decoder"] * count for count in split_layers(config, vocabulary_size, parallel.chunks)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return {
        "pipeline_model_parallel_size": parallel.pipeline_parallel,
        "pipeline_model_parallel_layout": chunks,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        # Two interleaved stages send each other two tensors at a time. A batched call could swap the two.
        "batch_p2p_comm": parallel.virtual_pipeline == 1,
        "overlap_p2p_comm": parallel.virtual_pipeline > 1,
    }


def _undrawn(weight: torch.Tensor) -> torch.Tensor:
    return weight


# Attention is fused: its activations grow linearly with the context. So "selective" recomputes the MLP, whose activations are
# the largest.
_RECOMPUTE: dict[str, dict] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
