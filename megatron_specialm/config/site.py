"""A site profile: how the jobs of any pipeline are submitted and run on one cluster. Not part of any digest.

Text for a `#SBATCH` line is a `Word`, which cannot end the line or be read as another option; all other text is quoted when the
script is rendered. A type has one pattern only: of two nested ones pydantic keeps the outer one.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, ValidationInfo, field_validator

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.base import PathText, Settings
from megatron_specialm.config.explain import did_you_mean, explain
from megatron_specialm.config.load import KINDS, read_config, settings_classes, shipped_folder
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.yaml_file import dump_yaml

TEMPLATE = "stage.sbatch.template"
Launcher = Literal["srun", "torchrun", "mpi"]
_WORD = r"[A-Za-z0-9_.,:+&|*()\[\]@/=-]"
Word = Annotated[str, Field(pattern=f"^{_WORD}+$", max_length=200)]
Option = Annotated[str, Field(pattern=f"^--{_WORD}+$", max_length=200)]
Duration = Annotated[
    str, Field(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$", description="minutes, hours:minutes:seconds or days-hours")
]


def seconds_of(duration: str) -> int:
    """A duration as Slurm reads it, in seconds: `5` is minutes, `5:30` minutes and seconds, `1-12` days and hours. 0: no
    limit."""
    days, dash, clock = duration.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class Resources(Settings):
    """The resources that a stage's jobs request from Slurm. Values that are not given are those of `default`."""

    time: Duration = "04:00:00"
    cpus_per_process: PositiveInt = 1
    gpus_per_process: NonNegativeInt = 0
    processes_per_node: PositiveInt = Field(default=8, description="ranks of a training per node")
    memory: Annotated[str, Field(pattern=r"^\d+[KMGT]?$")] | None = Field(default=None, description="per node, as 64G")
    concurrency: PositiveInt = Field(default=16, description="tasks of an array that run at the same time")
    tasks_per_job: PositiveInt = Field(default=1, description="short tasks that one job runs one after the other")
    account: Word | None = None
    partition: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    options: list[Option] = Field(default=[], description="other options of sbatch")


class Container(Settings):
    """The image that ranks run in. The job's supervisor runs on the node itself."""

    runtime: Literal["pyxis", "apptainer"]
    image: PathText
    python: str = Field(default="python3", description="the interpreter inside")
    mounts: list[Annotated[PathText, Field(pattern=r"^[^,]+$")]] = Field(
        default=[], description="FROM:TO, in addition to the working directory and the run folder"
    )


class Limits(Settings):
    """When a job is considered stalled or failed, and how often it may be queued again."""

    warning_seconds: PositiveInt = Field(default=300, description="before the time limit: save and queue again")
    heartbeat_seconds: PositiveFloat = 5
    silent_seconds: PositiveFloat = Field(
        default=60, description="without a heartbeat: the process or its node is lost"
    )
    hang_seconds: PositiveFloat = Field(default=900, description="without a step, after the first one")
    startup_seconds: PositiveFloat = Field(
        default=1800, description="until the first heartbeat of all ranks, and until the first step"
    )
    stop_seconds: PositiveFloat = Field(
        default=240, description="for ranks to save a checkpoint after a request to stop"
    )
    timeouts: NonNegativeInt = Field(default=50, description="time limits that a job may reach")
    failures: NonNegativeInt = Field(
        default=5, description="failures without progress since the one before; three at the same step always end a job"
    )


class Preflight(Settings):
    """The check of each node before ranks start there. A node that fails is excluded, and the job is queued again."""

    enabled: bool = True
    seconds: PositiveFloat = Field(
        default=300, description="for a node to answer; torch may be read from a cold filesystem"
    )
    slower_than: PositiveFloat = Field(default=2.0, description="times the median of the other nodes is a slow node")
    free_disk: PositiveInt = Field(default=1 << 30, description="bytes free in the run folder")
    clock_seconds: PositiveFloat = Field(
        default=5.0, description="that a node's clock may differ from the first node's"
    )


class Site(Settings):
    """The profile of a cluster."""

    template: PathText | None = Field(
        default=None,
        description="of the job script, relative to the profile's folder; default: slurm/stage.sbatch.template",
    )
    launcher: Launcher = "srun"
    python: PathText | None = Field(default=None, description="the interpreter in jobs; default: the one that submits")
    gpu: str | None = Field(default=None, description="name of the GPUs, as H100: to estimate hours")
    modules: list[str] = Field(default=[], description="for `module load`")
    environment: dict[str, str] = Field(default={}, description="variables of all jobs, as those of the network fabric")
    container: Container | None = None
    exclude: list[Word] = Field(default=[], description="nodes not to use")
    jobs: dict[str, Resources] = Field(default={}, description="`default`, a stage's kind or a stage's name")
    limits: Limits = Field(default=Limits(), validate_default=True)
    preflight: Preflight = Preflight()

    @field_validator("environment")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is not a name for an environment variable")
        return value

    @field_validator("limits")
    @classmethod
    def _in_order(cls, value: Limits, info: ValidationInfo) -> Limits:
        if value.silent_seconds <= value.heartbeat_seconds:
            raise ValueError(
                f"silent_seconds {value.silent_seconds:g} must be several times heartbeat_seconds {value.heartbeat_seconds:g}"
            )
        for name, resources in info.data.get("jobs", {}).items():
            if 0 < seconds_of(resources.time) <= value.warning_seconds:
                raise ValueError(
                    f"warning_seconds {value.warning_seconds} must be less than jobs.{name}.time {resources.time} "
                    f"({seconds_of(resources.time)} s): the warning would come when a job begins"
                )
        return value

    def resources(self, stage: str, kind: str) -> Resources:
        """The resources of a stage's jobs: its own settings over those of its kind over the default."""
        merged = Resources()
        for layer in (self.jobs[name] for name in ("default", kind, stage) if name in self.jobs):
            merged = merged.model_copy(update={field: getattr(layer, field) for field in layer.model_fields_set})
        return merged


def find_profile(named: Path | None) -> Path:
    """The profile that is named, or `slurm/site.yaml` where it exists, or the shipped one."""
    here = Path("slurm/site.yaml")
    return named or (here if here.is_file() else shipped_folder("slurm") / here.name)


def template_of(site: Site, profile: Path) -> Path:
    """The template of the job script: the site's own, or the shipped one."""
    return shipped_folder("slurm") / TEMPLATE if site.template is None else profile.parent / site.template


def load_site(path: Path) -> Site:
    """Read a profile.

    Raises:
        ConfigError: naming the file, the key, the value and the fix.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such site profile: copy {shipped_folder('slurm') / 'site.yaml'}, fit it to your cluster, name it "
            "with --site"
        )
    config = read_config(path)
    try:
        return Site.model_validate(config)
    except ValidationError as error:
        lines = explain(error, key_of=lambda location: ".".join(map(str, location)), valid_keys=_valid_keys)
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from None


def unknown_names(site: Site, pipeline: Pipeline) -> list[str]:
    """A warning for each entry of `jobs` that does not apply to a config: meant for another one, or mistyped."""
    known = ["default", *KINDS, *pipeline.stages]
    return [
        f"jobs.{name}: neither a kind of stage nor a stage of this config{did_you_mean(name, known)}"
        for name in site.jobs
        if name not in known
    ]


def dump_site(site: Site) -> str:
    """The profile as YAML, as a submission keeps it and its jobs read it."""
    return dump_yaml(site.model_dump(mode="json", exclude_unset=True))


def _valid_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys that are valid beside the last part of a location: of the profile, of one of its fields, or of `jobs.NAME`."""
    if len(location) == 1:
        return list(Site.model_fields)
    (inside,) = settings_classes(Site.model_fields[str(location[0])].annotation)
    return list(inside.model_fields)
