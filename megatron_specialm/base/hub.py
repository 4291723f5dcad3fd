"""Models on the Hugging Face hub: downloaded once, into the cache of `huggingface_hub`."""

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_specialm.base.errors import MachineError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_name(path: str) -> bool:
    """Whether a path that is no folder may be a name on the hub: `NAME` or `OWNER/NAME`."""
    return _NAME.fullmatch(path) is not None


def download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of a model's files, from the cache or the hub. Its name is the commit.

    Args:
        revision: a commit, tag or branch; default: the branch `main`.
        patterns: of the names of the files.

    Raises:
        MachineError: there is no such model or revision, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download  # slow to import

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # of the hub, the library's checks, or its HTTP client, which depends on the version
        pinned = f" --revision {revision}" if revision else ""
        raise MachineError(
            f"{name}: no such folder, and the Hugging Face hub does not give a model of this name "
            f"({' '.join(str(error).split())[:200]}): correct `path` or `revision`; without a network, run `hf download "
            f"{name}{pinned}` on a machine that has one and shares its cache (HF_HOME), or name a folder"
        ) from None
