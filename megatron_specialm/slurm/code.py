"""The code that jobs run: a copy in the run folder, so that an edit after `submit` changes nothing that was submitted."""

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import megatron_specialm

PACKAGE = Path(megatron_specialm.__file__).parent
GIT_SECONDS = 10


@dataclass(frozen=True)
class Code:
    """This package as it is now. `folder`: where its copy is to stand, for PYTHONPATH. `commit` is None outside a checkout;
    `modified`: it has changes that are not committed."""

    folder: Path
    version: str
    sha256: str
    commit: str | None
    modified: bool


def this_code(jobs: Path) -> Code:
    """The package that is running, and its place below a run's folder of jobs."""
    digest = hashlib.sha256()
    for path in _files():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\0{len(content)}\0".encode() + content)
    sha256 = digest.hexdigest()
    return Code(jobs / f"code-{sha256[:12]}", megatron_specialm.__version__, sha256, *_commit())


def freeze_code(code: Code) -> None:
    """Copy the package to its place, unless it stands there already."""
    if code.folder.exists():
        return
    aside = code.folder.with_name(f".{code.folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    for path in _files():
        copy = aside / PACKAGE.name / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    aside.rename(code.folder)


def _files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _commit() -> tuple[str | None, bool]:
    """The commit of the checkout that the package stands in, and whether it has been changed since."""
    if not (PACKAGE.parent / ".git").exists():
        return None, False
    try:
        commit = _git("rev-parse", "HEAD")
        return commit, bool(_git("status", "--porcelain", "--", PACKAGE.name))
    except (OSError, subprocess.SubprocessError):
        return None, False


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PACKAGE.parent), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=True, timeout=GIT_SECONDS
    ).stdout.strip()
