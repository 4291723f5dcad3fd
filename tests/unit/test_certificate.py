"""The certificate of `specialm parity` that a training's checkpoints carry: that of what is trained."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_specialm.base.files import write_json
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.graph.lineage import train_stage
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.stages.train import _certificate

SMOKE = configs_folder() / "pipelines" / "smoke.yaml"  # its trainings have packing: none


@pytest.mark.parametrize(
    ("change", "override", "carried"),
    [
        ({}, [], True),
        ({"packing": "none"}, [], True),
        ({}, ["stages.slm.packing=packed"], False),  # of an earlier version, which did not pack
        ({"packing": "none"}, ["stages.slm.packing=packed"], False),
        ({"packing": "packed"}, ["stages.slm.packing=packed"], True),
        ({"packing": "packed"}, [], False),
        ({"precision": "bf16"}, [], False),
        ({"versions": {"torch": "1.0"}}, [], False),
        ({"layout": {"tensor_parallel": 2}}, [], False),
    ],
)
def test_a_certificate_of_something_else_is_not_carried(
    tmp_path: Path, change: dict, override: list[str], carried: bool
) -> None:
    pipeline = load_pipeline(SMOKE, override)
    stage = train_stage(pipeline, "slm")
    written = {
        "layout": stage.parallel.model_dump(mode="json"), "precision": "fp32", "versions": {"torch": torch.__version__}
    } | change  # fmt: skip
    (tmp_path / "parity").mkdir()
    write_json(tmp_path / "parity" / "slm.json", written)
    context = SimpleNamespace(root=tmp_path, pipeline=pipeline, task=SimpleNamespace(id=TaskId("slm", "generic")))
    assert _certificate(stage, context) == (written if carried else None)
