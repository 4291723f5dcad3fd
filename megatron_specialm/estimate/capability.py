"""What a row of the capability table is (`estimate/capabilities.py`)."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_specialm.base.accelerator import Accelerator
from megatron_specialm.estimate.setup import Setup

BOTH = ("megatron", "deepspeed")


@dataclass(frozen=True)
class Refusal:
    """Why a setup cannot be trained, and a change with which it can."""

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.remedy}"


@dataclass(frozen=True)
class Condition:
    """What must hold of a setup.

    Attributes:
        reason: why it is refused otherwise: a template over the setup `s`, its parallel settings `p` and its `fp8`.
        field: a setting with which it holds at another value; the nearest is proposed.
        remedy: a proposal, if another value of a single setting does not help.
    """

    holds: Callable[[Setup], bool]
    reason: str
    field: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Machine:
    """What a feature needs of the machine, in words, and why a given machine does not have it."""

    needs: str
    lacks: Callable[[Setup, Accelerator], Refusal | None]


ANY = Machine("any", lambda _, __: None)


@dataclass(frozen=True)
class Capability:
    """A feature of the engines named: when a setup asks for it, and its conditions, also in words (`terms`).

    Attributes:
        without: the setting that does without it, for an engine that does not offer it, and the reason (`why_not`).
    """

    feature: str
    asked: Callable[[Setup], bool]
    terms: str
    machine: Machine = ANY
    conditions: tuple[Condition, ...] = ()
    engines: tuple[str, ...] = ("megatron",)
    models: str = "neox, llama"
    without: str = ""
    why_not: str = ""

    def applies(self, setup: Setup) -> bool:
        """Whether a setup asks its engine for this."""
        return setup.parallel.engine in self.engines and self.asked(setup)
