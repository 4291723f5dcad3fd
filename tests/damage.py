"""Files of a finished run, damaged one at a time, and what its readers make of it."""

import contextlib
import ctypes
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from typer.testing import CliRunner

from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.errors import SpecialmError
from megatron_specialm.base.lifeline import Lifeline
from megatron_specialm.cli import app
from megatron_specialm.config.graph import TaskId
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.launch.plan import PlannedTask, make_plan
from megatron_specialm.launch.worker import execute

Damage = Literal["flip", "cut", "empty", "delete", "extra"]
DAMAGES: tuple[Damage, ...] = ("flip", "cut", "empty", "delete", "extra")
# What a reader did: said so, naming the file; said so without the name; let an error through that is none of ours; read the
# damaged file and said nothing; never opened it, and came to the same.
Verdict = Literal["noticed", "unnamed", "traceback", "silent", "harmless"]


@contextlib.contextmanager
def damaged(path: Path, damage: Damage) -> Iterator[Path]:
    """Damage a file while the block runs; the path that a reader is to name, or not to open."""
    content = path.read_bytes()
    changed = neighbour(path) if damage == "extra" else path
    assert damage != "extra" or not changed.exists()
    try:
        if damage == "delete":
            path.unlink()
        else:
            changed.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(damage, _flipped(content)))
        yield changed
    finally:
        path.write_bytes(content)
        if damage == "extra":
            changed.unlink(missing_ok=True)


def neighbour(path: Path) -> Path:
    """A file that a careless reader may take for one of those it wants: the next number, or the same name and more."""
    if numbered := re.fullmatch(r"(.*?)(\d+)(\D*)", path.name):
        return path.with_name(f"{numbered[1]}{int(numbered[2]) + 1:0{len(numbered[2])}}{numbered[3]}")
    return path.with_name(f"{path.stem}-1{path.suffix}")


def _flipped(content: bytes) -> bytes:
    """One bit in the middle; of text, of a digit behind it, so that it stays readable."""
    place = len(content) // 2
    with contextlib.suppress(UnicodeDecodeError):
        content.decode()
        digits = [found.start() for found in re.finditer(rb"\d", content)]
        place = min(digits, key=lambda at: abs(at - len(content) // 2), default=place)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@dataclass
class Finished:
    """A finished run in its working directory."""

    folder: Path
    scratch: Path
    plan: dict[TaskId, PlannedTask] = field(init=False)
    usual: dict[str, object] = field(default_factory=dict)  # what readers come to where nothing is damaged

    def __post_init__(self) -> None:
        os.chdir(self.folder)
        self.pipeline = load_pipeline(Path("page.yaml"))
        self.root = Path(self.pipeline.root)
        self.plan = make_plan(self.pipeline, self.root)

    def files(self, artifact: str) -> list[Path]:
        """The files of an artifact (STAGE/KEY) that count, with its marker; of a training, those of its last step."""
        stage, key = artifact.split("/")
        folder = self.root / stage / key
        steps = sorted(folder.glob("step_*"))[:-1]
        found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not set(path.parents) & set(steps)]
        return [*found, self.root / stage / "done" / f"{key}.json"]

    def read(self, reader: str) -> object:
        """Have a reader work: a command line, or a task, which is made anew elsewhere. What it comes to, to be compared."""
        return self._made(TaskId(*reader.split("/"))) if "/" in reader.partition(" ")[0] else self._said(reader)

    def _made(self, name: TaskId) -> object:
        shutil.rmtree(self.scratch, ignore_errors=True)
        for stage in {other.stage for other in self.plan}:
            (self.scratch / stage / "done").mkdir(parents=True)
        for other in self.plan.keys() - {name}:
            (self.scratch / other.stage / other.key).symlink_to((self.root / other.stage / other.key).resolve())
            marker = f"{other.stage}/done/{other.key}.json"
            if (self.root / marker).exists():
                (self.scratch / marker).symlink_to((self.root / marker).resolve())
        planned = self.plan[name]
        execute(self.pipeline, self.scratch, planned.task, planned.digest, ALONE, Lifeline())
        return different_artifact(self.root / name.stage / name.key, self.scratch / name.stage / name.key)

    def _said(self, command: str) -> str:
        done = CliRunner().invoke(app, command.split())
        if done.exception is not None:
            raise done.exception
        return done.stdout

    def judge(self, path: Path, damage: Damage, reader: str) -> tuple[Verdict, str]:
        """A cell of the matrix: what a reader makes of a damaged file, and what it said."""
        if reader not in self.usual:
            self.usual[reader] = self.read(reader)
        with damaged(path, damage) as changed, opened(changed) as was_opened:
            try:
                outcome = self.read(reader)
            except SpecialmError as error:
                return ("noticed" if changed.name in str(error) else "unnamed"), str(error)
            except BaseException as error:
                return "traceback", repr(error)
            if outcome != self.usual[reader]:
                named = isinstance(outcome, str) and changed.name in outcome
                return ("noticed" if named else "silent"), f"{outcome}"
            return ("silent" if was_opened() else "harmless"), "as if nothing were"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Callable[[], bool]]:
    """Watch the folder of a file (inotify); whether anything has opened the file since, in whatever language."""
    libc, open_event = ctypes.CDLL(None, use_errno=True), 0x20
    queue = libc.inotify_init1(os.O_NONBLOCK)
    assert queue >= 0 and libc.inotify_add_watch(queue, os.fsencode(path.parent), open_event) >= 0

    def asked() -> bool:
        events = b""
        with contextlib.suppress(BlockingIOError):
            while block := os.read(queue, 1 << 16):
                events += block
        return os.fsencode(path.name) + b"\0" in events

    try:
        yield asked
    finally:
        os.close(queue)


sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from disturbed.compare import different_artifact  # noqa: E402
from disturbed.page import write_page  # noqa: E402, F401
