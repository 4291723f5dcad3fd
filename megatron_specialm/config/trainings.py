"""Train stages by their `data`: a class for each value of it, with the settings that go with that value alone."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from megatron_specialm.config.model import Projection
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.training import ExpertNetwork, Soup, TrainStage


class _OfOneData(TrainStage):
    """A train stage whose `data` is known."""

    @model_validator(mode="before")
    @classmethod
    def _without_settings_of_other_data(cls, value: Any) -> Any:
        """Refuse settings that go with another `data`; leave them out where they are at their defaults, as in the resolved
        configs of earlier versions."""
        if not isinstance(value, dict):
            return value
        for name in [name for name in value if name in settings_of_other_data(value.get("data"))]:
            homes = {data: home.model_fields[name] for data, home in TRAININGS.items() if name in home.model_fields}
            if all(value[name] != field.get_default() for field in homes.values()):
                wanted = " or ".join(f"`data: {data}`" for data in homes)
                raise ValueError(
                    f"`{name}` goes with {wanted}, and this is `data: {value['data']}`: drop it, or change `data`"
                )
            value = {key: one for key, one in value.items() if key != name}
        return value


class _WithDomainText(_OfOneData):
    """A training on the generic set that may mix in the domain's text."""

    domain_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="the domain's fraction of each batch, repeated from the start (arXiv 2603.16177); the training is then "
        "per domain",
    )

    @property
    def mixed_fraction(self) -> float:
        return self.domain_fraction


class _Clustered(_OfOneData):
    """A training on windows of the generic set that are chosen by their clusters."""

    assignment: str = Field(description="the assign stage that has the clusters")

    @model_validator(mode="before")
    @classmethod
    def _needs_clusters(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("assignment") is None:
            raise ValueError(f"`data: {value.get('data')}` needs `assignment`: name an assign stage")
        return value

    @property
    def clustering(self) -> str:
        return self.assignment


class GenericTraining(_WithDomainText):
    """On the generic set: one model for all domains, or with `domain_fraction` one per domain. With a `projection` (SLM-pn), or
    with an MoE that routes by cluster, each window trains the expert of its cluster."""

    data: Literal["generic"]
    assignment: str | None = Field(
        default=None, description="SLM-pn, `moe.route: cluster`: the assign stage that has the clusters"
    )
    projection: Projection | None = Field(default=None, description="SLM-pn: one large model of many experts")
    windows_per_expert: PositiveInt | None = Field(
        default=None,
        description="SLM-pn: consecutive windows of a batch that one expert computes; few, so that a batch trains many "
        "experts; unless windows are packed a multiple of micro_batch_size",
    )
    soup: Soup | None = Field(default=None, description="SLM-pn: train mixtures of experts too")

    @property
    def clustering(self) -> str | None:
        return self.assignment

    @property
    def network(self) -> ExpertNetwork | None:
        if self.assignment is None:
            return None
        if self._moe_by_cluster is not None:
            return ExpertNetwork(self.assignment, self._moe_by_cluster.counts[0], "model.moe.experts")
        assert self.projection is not None and self.windows_per_expert is not None
        return ExpertNetwork(
            self.assignment, self.projection.experts, "projection.experts", self.projection, self.windows_per_expert,
            self.soup,
        )  # fmt: skip

    @property
    def _moe_by_cluster(self) -> MixtureOfExperts | None:
        moe = None if self.model is None else self.model.moe
        return moe if moe is not None and moe.by_cluster else None

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        projected, routed = self.projection is not None, self._moe_by_cluster is not None
        yield (
            projected and self.model is not None and self.model.moe is not None,
            "`projection` and `model.moe` both replace the feed-forward parts: drop one of them",
        )
        yield (
            (projected or routed) != (self.assignment is not None),
            "`assignment` goes with `data: importance`, `data: cluster`, `projection` and `moe.route: cluster`, which need it: "
            + ("name an assign stage" if projected or routed else "drop it"),
        )
        yield (
            routed and self.domain_fraction > 0,
            "`domain_fraction` does not go with `moe.route: cluster`: drop one of them",
        )
        yield (
            routed and self.distill is not None,
            "`distill` does not go with `moe.route: cluster`: distill into an expert after it was selected",
        )
        yield (
            projected and self.model is None,
            "`projection` goes with a `model`: all experts are trained together, once for all domains",
        )
        yield (
            projected and self.domain_fraction > 0,
            "`domain_fraction` does not go with `projection`: drop one of them",
        )
        yield (
            projected != (self.windows_per_expert is not None),
            "`windows_per_expert` goes with `projection`, which needs it: how many consecutive windows one expert computes",
        )
        yield self.soup is not None and not projected, "`soup` goes with `projection`"
        yield (
            self.distill is not None and projected,
            "`distill` does not go with `projection`: distill into an expert after it was selected",
        )
        yield from super()._contradictions()


class ClusterTraining(_Clustered):
    """SLM-mix: one model per cluster, on its windows of the generic set."""

    data: Literal["cluster"]
    clusters: list[NonNegativeInt] | None = Field(
        default=None, min_length=1, description="train these experts; default: one per cluster"
    )
    budget: Literal["equal", "proportional"] = Field(
        default="equal",
        description="`steps` for each expert, or in proportion to the size of its cluster (mean: `steps`)",
    )

    @property
    def steps_follow_data(self) -> bool:
        return self.budget != "equal"

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        repeated = self.clusters is not None and len(set(self.clusters)) < len(self.clusters)
        yield repeated, f"`clusters` {self.clusters}: one is there twice"
        yield from super()._contradictions()


class ImportanceTraining(_WithDomainText, _Clustered):
    """SLM-is: one model per domain, on the generic set resampled to the domain's cluster histogram."""

    data: Literal["importance"]


class DomainTraining(_OfOneData):
    """One model per domain, on the domain's own text."""

    data: Literal["domain"]
    replay_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="the generic set's fraction of each batch (arXiv 2502.06042)"
    )
    recipe: Literal["paper"] | None = Field(
        default=None,
        description="the paper's fine-tuning by the size of the set: up to 1M tokens a third of the learning rate and at most "
        "2,000 steps, up to 8M 4,000 steps, beyond 30,000",
    )

    @property
    def mixed_fraction(self) -> float:
        return self.replay_fraction

    @property
    def size_recipe(self) -> Literal["paper"] | None:
        return self.recipe


AnyTrainStage = Annotated[
    GenericTraining | ClusterTraining | ImportanceTraining | DomainTraining, Field(discriminator="data")
]
TRAININGS: dict[str, type[TrainStage]] = {
    get_args(cls.model_fields["data"].annotation)[0]: cls for cls in get_args(get_args(AnyTrainStage)[0])
}


_ALL_SETTINGS = {name for cls in TRAININGS.values() for name in cls.model_fields}
_OF_OTHER_DATA = {data: _ALL_SETTINGS - cls.model_fields.keys() for data, cls in TRAININGS.items()}


def settings_of_other_data(data: Any) -> set[str]:
    """The settings that exist with other values of `data` and not with this one; none where the value is not known."""
    return _OF_OTHER_DATA.get(data, set()) if isinstance(data, str) else set()
