"""Run the parts one after the other, and keep a JSON file and a table of all results so far. Imports no torch."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from gpu_check.figures import Figure, row
from gpu_check.part import NOT_POSSIBLE, PARTS
from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import read_json, write_json, write_text

GRACE = 5.0  # seconds from SIGTERM to SIGKILL
STDERR_LINES = 15
FINE = ("done", "not possible here")


@dataclass
class Record:
    """The record of a part. Times are UTC; `exit_code` is negative for a signal."""

    name: str
    title: str
    status: str = "not run"
    reason: str = ""
    started: str | None = None
    ended: str | None = None
    seconds: float = 0.0
    limit: float = 0.0
    exit_code: int | None = None
    stderr: list[str] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)


class Book:
    """All records, and their files. Every `write` replaces both files."""

    def __init__(self, out: Path, names: Iterable[str], *, budget: float, tiny: bool) -> None:
        self._out = out
        self._head: dict[str, Any] = {"started": _now(), "ended": None, "budget": budget, "tiny": tiny}
        self.records = {name: Record(name, PARTS[name].title) for name in names}

    def write(self) -> None:
        """Write the current records."""
        parts = [asdict(record) for record in self.records.values()]
        write_json(self._out / "gpu_check.json", {**self._head, "parts": parts})
        write_text(self._out / "gpu_check.txt", "\n".join(self._lines()) + "\n")

    def close(self) -> None:
        """Write for the last time."""
        self._head["ended"] = _now()
        self.write()

    def summary(self) -> Iterator[str]:
        """A line per part."""
        for record in self.records.values():
            yield f"{record.name:<10} {record.seconds:7.1f} s  {record.status}{record.reason and f': {record.reason}'}"

    def _lines(self) -> Iterator[str]:
        yield f"gpu_check{' --tiny' * self._head['tiny']}, {self._head['started']}"
        yield from self.summary()
        for record in self.records.values():
            yield f"\n{record.name}: {record.title}"
            yield from (row(Figure(**figure)) for figure in record.figures)

    @property
    def exit_code(self) -> int:
        """0 where every part ran as far as this machine lets it, and every figure is as expected."""
        fine = all(record.status in FINE for record in self.records.values())
        figures = [figure for record in self.records.values() for figure in record.figures]
        return int(not fine or any(figure["good"] is False for figure in figures))


def run(out: Path, *, names: Iterable[str], budget: float, limits: Mapping[str, float], tiny: bool) -> int:
    """Run parts in the order of PARTS within a budget of seconds.

    Returns:
        the exit code.
    """
    end = time.monotonic() + budget
    out.mkdir(parents=True, exist_ok=True)
    book = Book(out, [name for name in PARTS if name in names], budget=budget, tiny=tiny)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # like Ctrl-C: also ends the part
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as scratch, (out / "gpu_check.log").open("ab") as log:
        for record in book.records.values():
            left = end - time.monotonic()
            if left < PARTS[record.name].needs:
                record.status, record.reason = "not run", f"no time: {left:.0f} s left"
                continue
            record.limit = min(limits.get(record.name, PARTS[record.name].limit), left)
            print(f"== {record.name}: {record.title} (limit {record.limit:.0f} s, {left:.0f} s left)", flush=True)
            _run_part(record, book, Path(scratch), log, tiny=tiny)
            print(f"-- {record.name}: {record.status}{record.reason and f': {record.reason}'}", flush=True)
        book.close()
    print("", *book.summary(), f"figures: {out / 'gpu_check.txt'}, {out / 'gpu_check.json'}", sep="\n", flush=True)
    return book.exit_code


def _run_part(record: Record, book: Book, scratch: Path, log: BinaryIO, *, tiny: bool) -> None:
    figures = scratch / f"{record.name}.json"
    record.status, record.started = "running", _now()
    book.write()
    log.write(f"== {record.name}\n".encode())
    log.flush()
    before, start = log.tell(), time.monotonic()
    command = [sys.executable, "-m", "gpu_check", "--part", record.name, *["--tiny"] * tiny, str(figures)]
    # Its own process group in this session: ending the session ends it too.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=log, env=_environment(scratch), process_group=0
    )
    try:
        while process.poll() is None and time.monotonic() < start + record.limit:
            time.sleep(0.1)
            if (latest := _read(figures)) != record.figures:
                record.figures = latest
                book.write()
        in_time = process.poll() is not None
    finally:
        _end(process)
    record.seconds, record.ended, record.exit_code = round(time.monotonic() - start, 1), _now(), process.poll()
    record.figures, record.stderr = _read(figures), _tail(Path(log.name), before)
    record.status, record.reason = _outcome(record, in_time=in_time)
    book.write()


def _outcome(record: Record, *, in_time: bool) -> tuple[str, str]:
    last = record.stderr[-1] if record.stderr else ""
    if not in_time:
        return "out of time", f"ended after {record.limit:.0f} s"
    if record.exit_code == 0:
        return "done", ""
    return ("not possible here", last) if record.exit_code == NOT_POSSIBLE else ("failed", last)


def _end(process: subprocess.Popen) -> None:
    """End the part and its descendants. One that hangs in the driver may survive SIGKILL, so this does not wait for it."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _environment(scratch: Path) -> dict[str, str]:
    """Nothing is downloaded, a missing home folder does no harm, and Transformer Engine does not import jax."""
    folders = {name: str(scratch) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HOME")}
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "NVTE_FRAMEWORK": "pytorch",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    usual = {"HOME": str(scratch), "USER": "gpu_check", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    return {**usual, **os.environ, **folders, **fixed}


def _read(figures: Path) -> list[dict[str, Any]]:
    try:
        return read_json(figures, list[dict[str, Any]])
    except ArtifactError:  # not written yet
        return []


def _tail(log: Path, start: int) -> list[str]:
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").strip().splitlines()[-STDERR_LINES:]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
