"""What Slurm 22.05 printed on a real cluster, read; and commands that do not answer."""

from pathlib import Path

import pytest

from megatron_specialm.base.errors import MachineError
from megatron_specialm.slurm import commands
from megatron_specialm.slurm.commands import (
    Element,
    elements,
    find_by_comment,
    live_elements,
    parse_sacct,
    parse_squeue,
)

# squeue --array --states=all --noheader --Format=..., of an array with a limit of 3: one element had failed, one had been
# queued again, one again and held; and of its dependent.
SQUEUE = """\
4|0|COMPLETED|0|365-00:00:00|node1|None|
1|1|FAILED|0|365-00:00:00|node1|NonZeroExitCode|
1|2|PENDING|1|UNLIMITED||JobArrayTaskLimit|
1|3|PENDING|1|UNLIMITED||job requeued in held state|
1|6|PENDING|0|UNLIMITED||JobArrayTaskLimit|
2|0|CANCELLED|0|UNLIMITED||DependencyNeverSatisfied|
1|0|RUNNING|0|9:42|node1|None|
1|4|RUNNING|0|364-23:59:58|node[1-2]|None|
1|5|COMPLETING|0|9:42|node2|None|
9|N/A|RUNNING|0|UNLIMITED|node1|None|
"""

# sacct --noheader --parsable2 --allocations --format=JobID,State,NodeList: 27 waited for 26 and never ran.
SACCT = """\
26_0|COMPLETED|node1
26_1|FAILED|node1
26_2|CANCELLED by 0|node1
26_4|CANCELLED by 0|node[1-2]
27_[0-1,4%2]|CANCELLED|None assigned
28|COMPLETED|node1
"""


def test_squeue_is_read() -> None:
    found = dict(parse_squeue(SQUEUE))
    assert len(found) == 9, "a job that is no array is not ours"
    assert found["1", 0] == Element("RUNNING", "", "node1", 0, 582)
    assert found["1", 4].seconds_left == 365 * 86400 - 2 and found["1", 4].nodes == "node[1-2]"
    assert found["1", 1] == Element("FAILED", "NonZeroExitCode", "node1", 0, None)
    assert found["1", 3] == Element("PENDING", "job requeued in held state", "", 1, None)
    assert found["2", 0] == Element("CANCELLED", "DependencyNeverSatisfied", "", 0, None)
    assert {name for name, element in found.items() if element.is_live} == {("1", n) for n in (0, 2, 3, 4, 5, 6)}


def test_a_reason_may_hold_anything() -> None:
    line = "1|0|PENDING|0|UNLIMITED||ReqNodeNotAvail, UnavailableNodes:node[1-2]|why, not|"
    assert dict(parse_squeue(line))["1", 0].reason == "ReqNodeNotAvail, UnavailableNodes:node[1-2]|why, not"


def test_sacct_is_read() -> None:
    found = dict(parse_sacct(SACCT))
    assert list(found) == [("26", 0), ("26", 1), ("26", 2), ("26", 4), ("27", 0), ("27", 1), ("27", 4)]
    assert found["26", 4] == Element("CANCELLED", "by 0", "node[1-2]", 0, None)
    assert found["27", 4] == Element("CANCELLED", "", "", 0, None)


def say(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Put shell scripts before everything else on PATH, in place of Slurm's commands."""
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_what_squeue_has_forgotten_is_asked_of_sacct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "squeue.txt").write_text(SQUEUE)
    (tmp_path / "sacct.txt").write_text(SACCT)
    say(tmp_path, monkeypatch, squeue=f"cat {tmp_path}/squeue.txt",
        sacct=f'case "$*" in *--jobs=26,27*) cat {tmp_path}/sacct.txt;; *) exit 9;; esac')  # fmt: skip
    found = elements(["1", "2", "4", "26", "27"])
    assert found["26", 1].state == "FAILED" and found["1", 0].state == "RUNNING"
    assert live_elements(["1", "26"]) == {("1", n) for n in (0, 2, 3, 4, 5, 6)}


def test_a_cluster_without_accounting_has_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    say(tmp_path, monkeypatch, squeue=unknown, sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert elements(["1"]) == {} and live_elements(["1"]) == set()
    (tmp_path / "sacct").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert elements(["1"]) == {}, "sacct is not installed"


def test_nothing_submitted_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert elements([]) == {} and live_elements([]) == set()


def test_a_job_is_found_by_its_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(tmp_path, monkeypatch, squeue="printf '12|(null)\\n13|specialm-1f\\n13|specialm-1f\\n'")
    assert find_by_comment("specialm-1f") == "13" and find_by_comment("specialm-1") is None


def test_the_users_own_filters_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    say(tmp_path, monkeypatch, squeue='echo "7|0|RUNNING|0|UNLIMITED|node1|$SQUEUE_PARTITION$SLURM_BITSTR_LEN|"')
    assert elements(["7"])["7", 0].reason == "0"


SILENT = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


def test_a_controller_that_is_restarted_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent_once = f"if mkdir {tmp_path}/once 2>/dev/null; then echo '{SILENT}' >&2; exit 1; fi"
    say(tmp_path, monkeypatch, squeue=f"{silent_once}; echo '7|0|RUNNING|0|UNLIMITED|node1|None|'")
    assert live_elements(["7"]) == {("7", 0)}


def test_a_controller_that_stays_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "RETRY_SECONDS", 0)
    say(tmp_path, monkeypatch, squeue=f"echo '{SILENT}' >&2; exit 1")
    with pytest.raises(MachineError, match=r"squeue: .*Unable to contact.*try later"):
        live_elements(["7"])


def test_a_command_that_refuses_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(tmp_path, monkeypatch, scancel="echo 'scancel: error: Kill job error on job id 7: Access denied' >&2; exit 1")
    with pytest.raises(MachineError, match=r"scancel 7 8: .*Access denied"):
        commands.cancel_jobs(["7", "8"])


def test_a_machine_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="squeue: not found"):
        live_elements(["7"])
