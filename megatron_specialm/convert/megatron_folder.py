"""Checkpoints of Megatron-LM and Megatron-Core in the format `torch_dist`, as canonical weights."""

from collections.abc import Mapping
from pathlib import Path

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert import torch_dist
from megatron_specialm.convert.architectures import Model
from megatron_specialm.convert.fingerprint import read_fingerprint
from megatron_specialm.convert.lazy import LazyTensor
from megatron_specialm.convert.megatron_names import EXTRA_STATE, from_megatron, read_settings
from megatron_specialm.convert.source import Source
from megatron_specialm.convert.tokenizer_files import TOKENIZER
from megatron_specialm.model.weights import WORD_EMBEDDINGS

FORMAT = "megatron"
OPTIMIZER = "the optimizer's state: weights are converted, trainings start anew from them"


def open_torch_dist(path: Path, given: Model | None) -> Source:
    """Open a checkpoint of `torch_dist`.

    Args:
        given: the model, if not the one that the settings in the checkpoint describe.

    Raises:
        CheckpointError: it is damaged or incomplete, or of a model that we do not have.
    """
    opened = torch_dist.open_torch_dist(path)
    stored = opened.tensors
    model = given or read_settings(opened.settings, where=opened.folder, rows=embedding_rows(stored, opened.folder))
    stacked = any(name.startswith("decoder.layers.") and not name[len("decoder.layers.")].isdigit() for name in stored)
    objects = [name for name in opened.objects if not name.startswith("optimizer")]
    states = [name for name in objects if name.split("/")[0].endswith(EXTRA_STATE)]
    folder = opened.folder.parent / TOKENIZER
    return Source(
        path=opened.folder,
        format=FORMAT,
        model=model,
        weights=from_megatron(stored, model, where=opened.folder),
        stored=stored,
        layout=f"torch_dist, {'all layers in one tensor' if stacked else 'a tensor per layer'}",
        step=opened.step or 0,
        dropped=counted({
            "optimizer": (len(opened.optimizer) + len(opened.others), OPTIMIZER),
            EXTRA_STATE: (len(states), "FP8 scales of Transformer Engine, which it finds again"),
            "other objects": (len(objects) - len(states), "random states and the like"),
        }),
        tokenizer=folder if folder.is_dir() else None,
        fingerprint=read_fingerprint(opened.folder),
    )  # fmt: skip


def counted(found: Mapping[str, tuple[int, str]]) -> dict[str, str]:
    """What is left out, with its number."""
    return {f"{name} ({count})": reason for name, (count, reason) in found.items() if count}


def embedding_rows(stored: Mapping[str, LazyTensor], where: Path) -> int:
    """Rows of the embedding, with its padding."""
    if WORD_EMBEDDINGS not in stored:
        raise CheckpointError(f"{where}: has no {WORD_EMBEDDINGS}: it is not complete, or of no GPT model")
    return stored[WORD_EMBEDDINGS].shape[0]
