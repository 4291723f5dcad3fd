"""Mixture-of-experts layers of a model. Nothing here depends on the engine that trains it (docs/moe.md)."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from megatron_specialm.config.base import Settings

MIN_CAPACITY = 4
LEAST_CAPACITY = 0.25  # times an even share
# What each setting is with `route: cluster`, which leaves nothing to choose or to balance. Selecting an expert must give an
# ordinary model, so nothing stands beside the experts and they have the model's size.
_BY_CLUSTER: dict[str, Any] = {
    "top_k": 1, "ffn_hidden_size": None, "capacity_factor": None, "min_capacity": MIN_CAPACITY, "aux_loss": 0.0, "z_loss": 0.0,
    "bias_update_rate": 0.0, "shared_expert": None, "residual": False,
}  # fmt: skip


class MixtureOfExperts(Settings):
    """Feed-forward parts that are sets of experts: a router sends each token to `top_k` of them, and sums their outputs,
    weighted by its scores.

    With top_k 1 the weight is the softmax probability of the chosen expert (Switch Transformer, arXiv 2101.03961); with more,
    the probabilities of the chosen experts are normalized to a sum of 1 (GShard, arXiv 2006.16668).

    With `route: cluster` there is no router: an expert per cluster computes all tokens of the cluster's windows, with weight 1.
    """

    experts: PositiveInt | list[PositiveInt] = Field(
        description="experts of each MoE layer; as a list, of each in turn: a pyramid as in PR-MoE (arXiv 2201.05596)"
    )
    every: PositiveInt = Field(
        default=1, description="the last of every so many layers is an MoE layer; others are dense"
    )
    route: Literal["token", "cluster"] = Field(
        default="token",
        description="what a token's experts are chosen by: a router, or the cluster of its window, as in `data: cluster`, but "
        "in one model that shares all other weights",
    )
    top_k: PositiveInt = Field(default=2, description="experts per token")
    ffn_hidden_size: PositiveInt | None = Field(default=None, description="of each expert; default: the model's")
    capacity_factor: PositiveFloat | None = Field(
        default=None,
        description="an expert takes at most this times tokens x top_k / experts of a micro-batch, and further tokens are "
        "dropped; default: none is dropped",
    )
    min_capacity: PositiveInt = Field(
        default=MIN_CAPACITY, description="with a capacity_factor: the least capacity of an expert"
    )
    bias_update_rate: NonNegativeFloat = Field(
        default=0.0,
        description="above 0: balancing by biases (arXiv 2408.15664): scores are sigmoids, and after each step the bias by "
        "which an expert is chosen moves by this",
    )
    aux_loss: NonNegativeFloat = Field(
        default=0.01, description="coefficient of the load-balancing loss; with a bias_update_rate the default is 0"
    )
    z_loss: NonNegativeFloat = Field(default=0.0, description="coefficient of the router z-loss (arXiv 2202.08906)")
    shared_expert: PositiveInt | None = Field(
        default=None, description="feed-forward size of an expert that all tokens use, scaled by a sigmoid gate"
    )
    residual: bool = Field(
        default=False, description="a dense feed-forward part beside the experts, mixed by a learned softmax (PR-MoE)"
    )

    @model_validator(mode="before")
    @classmethod
    def _settings_that_follow(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if value.get("route") != "cluster":
            return {"aux_loss": 0.0, **value} if value.get("bias_update_rate") else value
        for name, only in _BY_CLUSTER.items():
            if value.get(name, only) != only:
                raise ValueError(
                    f"{name} {value[name]} means nothing with route: cluster, which sends each window to its cluster's expert: "
                    "drop it, or set route: token"
                )
        if isinstance(value.get("experts"), list):
            raise ValueError(
                f"experts {value['experts']}: with route: cluster an expert is a cluster's: give one number"
            )
        return {**value, **_BY_CLUSTER}

    @model_validator(mode="after")
    def _check(self) -> Self:
        fewest = min(self.counts)
        if self.top_k > fewest:
            raise ValueError(f"top_k {self.top_k} is more than experts {fewest}: set top_k to at most {fewest}")
        if self.capacity_factor is not None and self.capacity_factor < LEAST_CAPACITY:
            raise ValueError(
                f"capacity_factor {self.capacity_factor} would drop {1 - self.capacity_factor:.0%} of the tokens' choices or "
                f"more: set it to {LEAST_CAPACITY} or more (usual: 1 to 2), or leave it out to drop none"
            )
        if self.capacity_factor is None and self.min_capacity != MIN_CAPACITY:
            raise ValueError(
                f"min_capacity {self.min_capacity} is of a capacity_factor, and there is none: drop it, or set both"
            )
        if self.shared_expert and self.residual:
            raise ValueError("shared_expert and residual both add a dense part: set one of them")
        return self

    @property
    def depends_on_micro_batch(self) -> bool:
        """Whether what is learned depends on which windows are in a micro-batch together."""
        return self.aux_loss > 0 or self.capacity_factor is not None

    @property
    def by_cluster(self) -> bool:
        """Whether the cluster of a window decides which expert computes it."""
        return self.route == "cluster"

    @property
    def counts(self) -> list[int]:
        """The numbers of experts: of each MoE layer, or one for all."""
        return self.experts if isinstance(self.experts, list) else [self.experts]

    def experts_of(self, layer: int) -> int:
        """The number of experts of a layer, counted from 0; 0 if the layer is dense."""
        number, rest = divmod(layer + 1, self.every)
        if rest:
            return 0
        return self.counts[number - 1] if isinstance(self.experts, list) else self.experts
