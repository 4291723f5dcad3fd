"""How each method's fine-tuned model continues a held-out document."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_specialm.base.artifacts import artifact_folder, read_marker
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.text import GENERIC
from megatron_specialm.graph.lineage import finetuned_models, tokenize_stage, train_stage
from megatron_specialm.graph.plan import make_plan
from megatron_specialm.graph.tasks import TaskId


@dataclass(frozen=True)
class Samples:
    """The folders of the first domain: models by method, tokenized documents, and the tokenizer."""

    domain: str
    models: Mapping[str, Path]
    tokens: Path
    tokenizer: Path


def find_samples(pipeline: Pipeline) -> Samples | None:
    """Find the methods' models that are fine-tuned on the first domain; None where there is none yet."""
    root, domain = Path(pipeline.root), next(iter(pipeline.text.domains))
    plan = make_plan(pipeline, root, keep_hashes=False)
    folders = {name: artifact_folder(root, *name, planned.digest) for name, planned in plan.items()}
    stages = {
        method: stage
        for method, stage in finetuned_models(pipeline).items()
        if read_marker(folders[TaskId(stage, domain)]) is not None
    }
    if not stages:
        return None
    store = train_stage(pipeline, next(iter(stages.values()))).tokens
    return Samples(
        domain=domain,
        models={method: folders[TaskId(stage, domain)] for method, stage in stages.items()},
        tokens=folders[TaskId(store, domain)],
        tokenizer=folders[TaskId(tokenize_stage(pipeline, store).tokenizer, GENERIC)],
    )
