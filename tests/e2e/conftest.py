"""What the tests of whole pipelines share."""

import re
from pathlib import Path

import pytest

from tests.texts import write_sets


@pytest.fixture(scope="module")
def workplace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the test file's `CONFIG` as config.yaml, and text for the sets that it names: documents of
    `DOCUMENT_WORDS` words, or 100."""
    config: str = request.module.CONFIG
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "config.yaml").write_text(config)
    sets = re.findall(r"(\w+)\.train\.jsonl", config)
    write_sets(folder, *sets, words=getattr(request.module, "DOCUMENT_WORDS", 100))
    return folder
