"""What a training's loop does beside its steps: profiles, garbage collection, timeouts. It changes nothing that is computed,
so it is in no digest."""

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_specialm.config.base import Settings


class Runtime(Settings):
    """What the training loop does beside the steps themselves."""

    profile_steps: list[PositiveInt] = Field(
        default=[],
        description="steps, counted from 1, of which each rank writes a `torch.profiler` trace, profile/step_N-rank_R.json.gz "
        "in the task's folder, for ui.perfetto.dev",
    )
    memory_snapshot_steps: list[PositiveInt] = Field(
        default=[],
        description="steps, counted from 1, of which each rank writes its GPU's allocations, profile/step_N-rank_R.pickle, for "
        "pytorch.org/memory_viz",
    )
    collect_garbage_every: PositiveInt = Field(
        default=100,
        description="steps between two runs of Python's garbage collector, which does not run by itself in between",
    )
    collective_timeout_seconds: PositiveFloat = Field(
        default=300, description="how long a collective may take after the first step; up to then it is 600"
    )
