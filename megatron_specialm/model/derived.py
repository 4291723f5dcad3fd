"""Linear weights that are computed from other parameters: projected networks (SLM-pn) and LoRA.

Per optimizer step, `materialize` computes the weights for all mixtures of experts in the step, in one pass. `bind` sets the
linears' `weight` to those of a micro-batch's mixture. `backward` propagates the gradients, which are summed over micro-batches
in fp32, to the parameters, in one pass.

In bf16, weights are computed in fp32 and rounded once. So a step computes with the same weights as a merged model in bf16. The
parameters that they are computed from stay in fp32: adapters and their base, codes and projections. Only the bases of a
projected network are bf16; they are large, and the optimizer has fp32 main weights for them.

A mixture of experts is a vector (K,) of coefficients of the experts' codes: one-hot for one expert, or a histogram for a
weighted average in weight space (arXiv 2502.01804). LoRA ignores the mixture.

Legend: J mixtures, K experts, M code size, H capacity, R rank.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import nn

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.model.merge import adapted
from megatron_specialm.model.weights import EXPERT_CODES, LINEAR_PLACES, PROJECTED, WeightSpec


class Place(NamedTuple):
    """An attribute of a linear whose value is computed: `weight` or `bias`."""

    linear: Any  # a module of Megatron-Core's or Transformer Engine's
    attribute: str


class DerivedWeights:
    """The computed weights of a process's model chunks.

    Args:
        places: per chunk, the attributes to set.
        compute: from mixtures (J, K) to the values of all places in order, each with J rows.
    """

    def __init__(
        self, places: Sequence[Sequence[Place]], compute: Callable[[torch.Tensor], Iterator[torch.Tensor]]
    ) -> None:
        self._places, self._compute = places, compute
        self._values: list[torch.Tensor] = []
        self._leaves: list[list[torch.Tensor]] = []  # per place, one leaf tensor per mixture
        self._gradients: list[torch.Tensor] = []

    def materialize(self, mixtures_JK: torch.Tensor) -> None:
        """Compute the weights for all mixtures of a step, and start summing their gradients if autograd is on."""
        self._release()
        self._values = list(self._compute(mixtures_JK))
        self._leaves = [list(value.detach().unbind()) for value in self._values]
        for place, value in zip(chain.from_iterable(self._places), self._values, strict=True):
            # This disables Transformer Engine's check that all parameters have the input's precision. The parameters that
            # the weight is computed from may have another one.
            place.linear.activation_dtype = value.dtype
        if torch.is_grad_enabled():
            for value, rows in zip(self._values, self._leaves, strict=True):
                total = torch.zeros_like(value, dtype=torch.float32)
                self._gradients.append(total)
                for row, part in zip(rows, total, strict=True):
                    row.requires_grad_().register_post_accumulate_grad_hook(_move_gradient_to(part))

    def bind(self, chunk: int, mixture: int) -> None:
        """Set the weights of a chunk's linears to those of a mixture, numbered as in `materialize`."""
        first = sum(len(places) for places in self._places[:chunk])
        for number, place in enumerate(self._places[chunk], start=first):
            setattr(place.linear, place.attribute, self._leaves[number][mixture])

    def backward(self, propagate: Callable[[torch.Tensor], object] | None = None) -> None:
        """Propagate the summed gradients of the weights to the parameters that they were computed from.

        Args:
            propagate: the engine's backward pass from a scalar, if not PyTorch's.
        """
        gradients = [gradient.to(value.dtype) for gradient, value in zip(self._gradients, self._values, strict=True)]
        if propagate is None:
            torch.autograd.backward(self._values, gradients)
        else:
            propagate(
                torch.stack([torch.sum(value * own) for value, own in zip(self._values, gradients, strict=True)]).sum()
            )
        self._release()

    def _release(self) -> None:
        """Free the computed weights, which are invalid once the parameters change."""
        for place in chain.from_iterable(self._places):
            setattr(place.linear, place.attribute, None)
        self._values, self._leaves, self._gradients = [], [], []


def _move_gradient_to(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def move(leaf: torch.Tensor) -> None:
        assert leaf.grad is not None
        total.add_(leaf.grad)
        leaf.grad = None

    return move


def derived_weights(
    chunks: Sequence[GPTModel], config: ModelConfig, specs: dict[str, WeightSpec]
) -> DerivedWeights | None:
    """Replace linears of the chunks by derived ones, if the model has any."""
    if config.projection is not None:
        return _project(chunks, config, specs)
    return _adapt(chunks, config, specs) if config.lora is not None else None


def _layers(chunk: GPTModel) -> Iterator[Any]:
    yield from chunk.decoder.layers


def _parameter(
    shape: Sequence[int], like: torch.Tensor, spec: WeightSpec, *, dtype: torch.dtype = torch.float32
) -> nn.Parameter:
    """An uninitialized parameter: this process's part of `spec`, with the attributes that tell Megatron-Core how to reduce and
    count its gradient. A parameter in fp32 stays in fp32 in a bf16 model."""
    parameter = nn.Parameter(torch.empty(*shape, dtype=dtype, device=like.device))
    parameter.keep_fp32 = dtype == torch.float32  # type: ignore[attr-defined]
    set_tensor_model_parallel_attributes(parameter, spec.cut is not None, -1 if spec.cut is None else spec.cut, 1)
    return parameter


# --- projected networks -----------------------------------------------------------------------------------------------


def _project(chunks: Sequence[GPTModel], config: ModelConfig, specs: dict[str, WeightSpec]) -> DerivedWeights:
    """Make the MLP linears of a projected network. The first chunk of every process holds the experts' codes; on all pipeline
    stages except the first they are a copy."""
    assert config.projection is not None
    places: list[list[Place]] = []
    for chunk in chunks:
        places.append([])
        for layer in _layers(chunk):
            own = [getattr(layer.mlp, LINEAR_PLACES[name].rpartition(".")[2]) for name in PROJECTED]
            example = own[0].weight
            layer.mlp.projection = _parameter(
                (config.projection.code_size, config.projection.capacity),
                example,
                specs["decoder.layers.0.mlp.projection"],
            )
            for name, linear in zip(PROJECTED, own, strict=True):
                places[-1] += _replace_by_basis(linear, LINEAR_PLACES[name], config, specs)
    codes = _parameter(specs[EXPERT_CODES].shape, example, specs[EXPERT_CODES])
    codes.shared = parallel_state.get_pipeline_model_parallel_rank() > 0  # type: ignore[attr-defined]
    chunks[0].register_parameter(EXPERT_CODES, codes)

    def compute(mixtures_JK: torch.Tensor) -> Iterator[torch.Tensor]:
        codes_JM = mixtures_JK.float() @ _SumOverStages.apply(codes)
        for chunk, own in zip(chunks, places, strict=True):
            coefficients = [codes_JM @ layer.mlp.projection for layer in _layers(chunk)]
            per_layer = len(own) // len(coefficients)
            for number, place in enumerate(own):
                basis = getattr(place.linear, f"{place.attribute}_basis")
                yield _combine(coefficients[number // per_layer], basis)

    return DerivedWeights(places, compute)


def _replace_by_basis(linear: Any, name: str, config: ModelConfig, specs: dict[str, WeightSpec]) -> Iterator[Place]:
    assert config.projection is not None
    for attribute in ("weight", "bias"):
        plain = getattr(linear, attribute, None)
        if plain is None or not plain.numel():
            continue
        spec = specs[f"decoder.layers.0.{name}.{attribute}_basis"]
        basis = _parameter((config.projection.capacity, *plain.shape), plain, spec, dtype=plain.dtype)
        # Under sequence parallelism each process sees the gradients of its own positions only.
        basis.sequence_parallel = getattr(plain, "sequence_parallel", False)  # type: ignore[attr-defined]
        delattr(linear, attribute)
        linear.register_parameter(f"{attribute}_basis", basis)
        yield Place(linear, attribute)


def _combine(coefficients_JH: torch.Tensor, basis: nn.Parameter) -> torch.Tensor:
    """(J, H) and (H, ...) -> (J, ...). If the basis or the sequence is sharded, the gradient of the coefficients is summed over
    the tensor-parallel group."""
    if basis.tensor_model_parallel or basis.sequence_parallel:  # type: ignore[attr-defined]
        coefficients_JH = copy_to_tensor_model_parallel_region(coefficients_JH)
    return _Product.apply(coefficients_JH, basis.flatten(1)).view(-1, *basis.shape[1:])


class _Product(torch.autograd.Function):
    """(J, H) in fp32 and (H, N) -> (J, N) in the precision of (H, N). Forward multiplies in fp32 and rounds once, because
    rounded coefficients would make similar experts equal. No fp32 copy of (H, N) is kept: backward multiplies in its
    precision, which is enough for gradients."""

    @staticmethod
    def forward(ctx: Any, left_JH: torch.Tensor, right_HN: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(left_JH, right_HN)
        return (left_JH @ right_HN.float()).to(right_HN.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_JN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        left_JH, right_HN = ctx.saved_tensors
        return (gradient_JN @ right_HN.t()).to(left_JH.dtype), left_JH.to(right_HN.dtype).t() @ gradient_JN


class _SumOverStages(torch.autograd.Function):
    """A tensor that all pipeline stages hold a copy of and use in their layers. Its gradient is the sum over the stages."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        group = parallel_state.get_pipeline_model_parallel_group()
        if group.size() > 1:
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=group)
        return gradient


# --- LoRA -------------------------------------------------------------------------------------------------------------


def _adapt(chunks: Sequence[GPTModel], config: ModelConfig, specs: dict[str, WeightSpec]) -> DerivedWeights:
    """Freeze all parameters and add `factor * B A` to the chosen linears. The base weight is kept as `base_weight`, in fp32.

    Updates are much smaller than the weights. Added to a bf16 base, those below half a unit in the last place would be lost.
    Added to an fp32 base, they move some sums across a rounding boundary and so take effect on average.
    """
    lora = config.lora
    assert lora is not None
    dtype = chunks[0].config.params_dtype
    places: list[list[Place]] = []
    for chunk in chunks:
        chunk.requires_grad_(False)
        if chunk.pre_process:
            # The embedding is frozen. Without this, the input of a recomputed layer needs no gradient, and recomputation
            # would record no graph.
            chunk.embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())
        places.append([])
        for layer in _layers(chunk):
            for name in lora.linears:
                linear = layer.get_submodule(LINEAR_PLACES[name])
                plain = linear.weight
                del linear.weight
                out, into = plain.shape
                for own, shape in (
                    ("weight", (out, into)),
                    ("lora_a", (lora.rank, into)),
                    ("lora_b", (out, lora.rank)),
                ):
                    spec = specs[f"decoder.layers.0.{LINEAR_PLACES[name]}.{own}"]
                    linear.register_parameter(own.replace("weight", "base_weight"), _parameter(shape, plain, spec))
                linear.base_weight.requires_grad_(False)
                places[-1].append(Place(linear, "weight"))

    def compute(mixtures_JK: torch.Tensor) -> Iterator[torch.Tensor]:
        for place in chain.from_iterable(places):
            linear = place.linear
            # A factor that is replicated gets only a part of its gradient on each process: sum it over the group.
            a, b = (
                factor if factor.tensor_model_parallel else copy_to_tensor_model_parallel_region(factor)
                for factor in (linear.lora_a, linear.lora_b)
            )
            weight = adapted(linear.base_weight, a, b, factor=lora.factor)
            yield weight.to(dtype).expand(len(mixtures_JK), -1, -1)

    return DerivedWeights(places, compute)
