"""Files of a finished run, damaged one at a time, and what its readers make of it."""

import contextlib
import ctypes
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from typer.testing import CliRunner

from megatron_specialm.base.artifacts import artifact_folder
from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.errors import SpecialmError
from megatron_specialm.base.integrity import CHECKED
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.cli import app
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.graph.plan import PlannedTask, make_plan
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.run.worker import execute
from tools.disturbed.compare import different_artifact

Damage = Literal["flip", "cut", "empty", "delete", "extra"]
# What a reader did: said so, naming the file; said so without the name; let an error through that is none of ours; came to
# something else and said nothing; came to the same, although it opened the file; came to the same and did not.
Verdict = Literal["noticed", "unnamed", "traceback", "other", "silent", "harmless"]


@contextlib.contextmanager
def damaged(paths: list[Path], damage: Damage) -> Iterator[list[Path]]:
    """Damage files while the block runs, or put another beside each; the paths that a reader is to name, or not to open."""
    contents = {path: path.read_bytes() for path in paths}
    changed = [neighbour(path) for path in paths] if damage == "extra" else paths
    try:
        for path, content in zip(changed, contents.values(), strict=True):
            if damage == "delete":
                path.unlink()
            else:
                path.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(damage, _flipped(content)))
        yield changed
    finally:
        for path in set(changed) - contents.keys():
            path.unlink(missing_ok=True)
        for path, content in contents.items():
            path.write_bytes(content)


def neighbour(path: Path) -> Path:
    """A file that a careless reader may take for one of those it wants: the next number, or the same name and more."""
    while path.exists():
        numbered = re.fullmatch(r"(.*?)(\d+)(\D*)", path.name)
        start, number, end = numbered.groups() if numbered else (f"{path.stem}-", "0", path.suffix)
        path = path.with_name(f"{start}{int(number) + 1:0{len(number)}}{end}")
    return path


def _flipped(content: bytes) -> bytes:
    """One bit in the middle; of text, of a digit near it, so that it stays readable, and the first of a number: the 17th digit
    of a float may change nothing."""
    place = len(content) // 2
    with contextlib.suppress(UnicodeDecodeError):
        content.decode()
        digits = [found.start() for found in re.finditer(rb"(?<![\d.])\d", content)]
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
        self.pipeline = load_pipeline(Path("config.yaml"))
        self.root = Path(self.pipeline.root)
        self.plan = make_plan(self.pipeline, self.root)

    def folder_of(self, artifact: str) -> Path:
        """Where the files of an artifact (STAGE/KEY) stand."""
        name = TaskId(*artifact.split("/"))
        return artifact_folder(self.root, *name, self.plan[name].digest)

    def files(self, artifact: str) -> list[Path]:
        """The files of an artifact, with label and marker; of a training, those of its last step."""
        folder = self.folder_of(artifact)
        steps = sorted(folder.glob("step_*"))[:-1]
        found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CHECKED)
        return [path for path in found if not set(path.parents) & set(steps)]

    def read(self, reader: str) -> object:
        """Have a reader work: a command line, or a task, which is redone elsewhere. What it comes to, to be compared."""
        return self._made(TaskId(*reader.split("/"))) if "/" in reader.partition(" ")[0] else self._said(reader)

    def _made(self, name: TaskId) -> list[str]:
        shutil.rmtree(self.scratch, ignore_errors=True)
        for other in self.plan.keys() - {name}:
            place = artifact_folder(self.scratch, *other, self.plan[other].digest)
            place.parent.mkdir(parents=True)
            place.symlink_to(self.folder_of(str(other)).resolve())
        planned = self.plan[name]
        execute(self.pipeline, self.scratch, planned, ALONE, ProcessStatus())
        return different_artifact(self.folder_of(str(name)), artifact_folder(self.scratch, *name, planned.digest))

    def _said(self, command: str) -> str:
        done = CliRunner().invoke(app, command.split())
        if isinstance(done.exception, SpecialmError):
            raise SpecialmError(f"{done.output}{done.exception}")
        if isinstance(done.exception, SystemExit):  # a command that has said what is wrong
            raise SpecialmError(done.output)
        if done.exception is not None:
            raise done.exception
        return re.sub(r"in [\d.]+ s", "in no time", done.output)

    def judge(self, paths: list[Path], damage: Damage, reader: str) -> tuple[Verdict, str]:
        """What a reader makes of damaged files, and what it said."""
        if reader not in self.usual:
            self.usual[reader] = self.read(reader)
        with damaged(paths, damage) as changed, opened(changed) as were_opened:
            try:
                outcome = self.read(reader)
            except SpecialmError as error:
                return ("noticed" if _names(changed, str(error)) else "unnamed"), str(error)
            except BaseException as error:
                return "traceback", repr(error)
            if outcome != self.usual[reader]:
                return ("noticed" if _names(changed, str(outcome)) else "other"), str(outcome)
            return ("silent" if were_opened() else "harmless"), "as if nothing were"

    def judge_each(self, paths: list[Path], damage: Damage, reader: str) -> tuple[dict[Path, Verdict], str]:
        """What a reader that names all that it finds makes of each of several files damaged at once, and what it said."""
        with contextlib.ExitStack() as stack:
            changed = stack.enter_context(damaged(paths, damage))
            were_opened = [stack.enter_context(opened([path])) for path in changed]
            try:
                said = str(self.read(reader))
            except SpecialmError as error:
                said = str(error)
            verdicts: dict[Path, Verdict] = {}
            for path, place, was_opened in zip(paths, changed, were_opened, strict=True):
                named = re.search(rf"{re.escape(str(place))}(?![\w.-])", said)
                verdicts[path] = "noticed" if named else "silent" if was_opened() else "harmless"
            return verdicts, said


def _names(paths: list[Path], text: str) -> bool:
    return any(path.name in text for path in paths)


@contextlib.contextmanager
def opened(paths: list[Path]) -> Iterator[Callable[[], bool]]:
    """Watch the folders of files (inotify); whether anything has opened one of the files since, in whatever language."""
    libc, open_event, event = ctypes.CDLL(None, use_errno=True), 0x20, struct.Struct("iIII")
    queue = libc.inotify_init1(os.O_NONBLOCK)
    watched = {libc.inotify_add_watch(queue, os.fsencode(path), open_event): path for path in {p.parent for p in paths}}
    assert queue >= 0 and min(watched) >= 0, os.strerror(ctypes.get_errno())

    def asked() -> bool:
        found: set[Path] = set()
        with contextlib.suppress(BlockingIOError):
            while block := os.read(queue, 1 << 16):
                while block:
                    watch, _, _, size = event.unpack_from(block)
                    name, block = block[event.size :][:size].rstrip(b"\0"), block[event.size + size :]
                    found.add(watched[watch] / os.fsdecode(name))
        return not found.isdisjoint(paths)

    try:
        yield asked
    finally:
        os.close(queue)
