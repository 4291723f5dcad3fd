"""One line of the report."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from megatron_specialm.base.errors import SpecialmError

State = Literal["ok", "missing", "broken"]
_LONGEST_REASON = 200


@dataclass(frozen=True)
class Finding:
    """The state of a part of the machine. `detail` is one line; `remedy`: how to install or repair the part. Training is
    impossible without a `needed` part."""

    name: str
    state: State
    version: str = ""
    detail: str = ""
    remedy: str = ""
    needed: bool = False


def guarded(name: str, probe: Callable[[], Finding], *, remedy: str = "", needed: bool = False) -> Finding:
    """The probe's finding, or `broken` with the reason if it raises anything."""
    try:
        return replace(probe(), needed=needed)
    except SpecialmError as error:
        reason = str(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    return Finding(name, "broken", detail=one_line(reason), remedy=remedy, needed=needed)


def can_train(findings: Iterable[Finding]) -> bool:
    """Whether every needed part is ok."""
    return all(finding.state == "ok" for finding in findings if finding.needed)


def one_line(text: str) -> str:
    """A text without line breaks, cut at 200 characters."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 3] + "..."
