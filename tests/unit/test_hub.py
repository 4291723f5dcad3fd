"""Models on a hub: `huggingface_hub` downloads from a server in this process that answers as the hub does."""

import hashlib
import importlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_specialm.base.artifacts import Report, begin_artifact
from megatron_specialm.base.errors import MachineError
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.plan import make_plan
from megatron_specialm.graph.tasks import TaskId
from tests.contexts import make_context
from tests.existing_models import save_existing_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE = TaskId("base", "generic")


class _Hub(BaseHTTPRequestHandler):
    """The requests by which a model is downloaded: its files at a revision, and each file."""

    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:4] == ["api", "models", "owner", "small"] and parts[-1] in ("v1", COMMIT):
            files = [{"rfilename": path.name} for path in self.folder.iterdir()]
            entries = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0"}
                for path in self.folder.iterdir()
            ]  # newer versions ask for the tree
            info = {"id": "owner/small", "sha": COMMIT, "siblings": files}
            self._answer(json.dumps(entries if parts[4] == "tree" else info).encode())
        elif parts[:3] == ["owner", "small", "resolve"] and (self.folder / parts[-1]).is_file():
            self._answer((self.folder / parts[-1]).read_bytes())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound" if "small" in parts else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A hub with the model `owner/small`, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    folder = save_existing_model(tmp_path / "hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    address = f"http://127.0.0.1:{server.server_port}"  # as HF_ENDPOINT sets it when the library is imported
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    files = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def _load(**base: Any) -> Pipeline:
    config = {
        "name": "hub", "root": "run",
        "text": {"generic": {"train": "a", "test": "b"}, "domains": {"law": {"train": "c", "test": "d"}}},
        "stages": {"base": {"kind": "import", "path": "owner/small", "revision": "v1", **base}},
    }  # fmt: skip
    Path("config.json").write_text(json.dumps(config))
    return load_pipeline(Path("config.json"))


def _import(pipeline: Pipeline) -> Report:
    planned = make_plan(pipeline, Path("run"))[BASE]
    folder = begin_artifact(Path("run"), *BASE, digest=planned.digest)
    stage = importlib.import_module("megatron_specialm.stages.import")
    report: Report = stage.run(pipeline.stages["base"], make_context(pipeline, planned.task, Path("run"), folder))
    return report


def test_a_model_is_downloaded_once_and_its_commit_recorded(
    hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = _load()
    assert pipeline.stages["base"].model.layers == 2, "from its config.json alone"
    assert not list(Path("cache").rglob("*.safetensors"))
    assert _import(pipeline).values["source"] == {
        "path": "owner/small@v1", "format": "huggingface", "folder": COMMIT, "step": 0,
    }  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert _import(_load()).values["source"]["folder"] == COMMIT, "from the cache"
    pinned = _load(revision=COMMIT)
    assert make_plan(pinned, Path("run"))[BASE].digest != make_plan(pipeline, Path("run"))[BASE].digest


def test_what_the_hub_does_not_have_is_named(hub: ThreadingHTTPServer) -> None:
    with pytest.raises(MachineError, match=r"owner/small: no such folder, .* `hf download owner/small --revision v2`"):
        _load(revision="v2")
    with pytest.raises(MachineError, match="owner/other: no such folder"):
        _load(path="owner/other")
