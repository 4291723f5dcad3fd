"""DeepSpeed's checkpoints as canonical weights and back. They have the names of the module that was trained: of Transformers or
of Megatron-Core; and do not say which model it is."""

from pathlib import Path

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert.architectures import CONFIG, Model, read_config
from megatron_specialm.convert.deepspeed_folder import ParameterGroup, open_deepspeed
from megatron_specialm.convert.deepspeed_writing import DeepSpeedState, write_universal
from megatron_specialm.convert.expert_names import table_names
from megatron_specialm.convert.families import from_huggingface_lazily, rows, to_huggingface_lazily
from megatron_specialm.convert.fingerprint import read_fingerprint
from megatron_specialm.convert.huggingface_folder import without_copies, write_config
from megatron_specialm.convert.megatron_folder import OPTIMIZER, counted
from megatron_specialm.convert.megatron_names import canonical_names, from_megatron
from megatron_specialm.convert.source import Source, TargetSpec
from megatron_specialm.convert.tokenizer_files import copy_tokenizer, find_tokenizer
from megatron_specialm.model.weights import OUTPUT_LAYER, WORD_EMBEDDINGS

FORMAT = "deepspeed"


def open_folder(path: Path, given: Model | None) -> Source:
    """Open a checkpoint of ZeRO 1 to 3, or a universal one.

    Args:
        given: the model; without it, a config.json beside the checkpoint says it.

    Raises:
        CheckpointError: it is damaged or incomplete, nothing says which model it is of, or tensors do not fit that.
    """
    opened = open_deepspeed(path)
    beside = [folder for folder in (opened.folder, opened.folder.parent) if (folder / CONFIG).is_file()]
    if given is None and not beside:
        raise CheckpointError(
            f"{opened.folder}: DeepSpeed's checkpoints do not say which model they are of: name its config.json by --config"
        )
    model = given or read_config(beside[0] / CONFIG)
    stored = {name.removeprefix("module."): tensor for name, tensor in opened.tensors.items()}
    if any(name.startswith("decoder.") for name in stored):
        named = {name.replace(".mlp.gate.", ".mlp.router."): tensor for name, tensor in table_names(stored).items()}
        weights = from_megatron(canonical_names(named, opened.folder), model, where=opened.folder)
        dropped: dict[str, str] = {}
    else:
        model, used, dropped = without_copies(opened.folder, stored, model)
        weights = from_huggingface_lazily(used, model.shape, vocabulary_size=model.vocabulary_size)
    stage = opened.settings.get("zero_optimization", {}).get("stage", 0)
    tokenizers = (find_tokenizer(folder) for folder in (opened.folder, opened.folder.parent))
    return Source(
        path=opened.folder,
        format=FORMAT,
        model=model,
        weights=weights,
        stored=stored,
        layout="universal" if opened.universal else f"ZeRO {stage}",
        step=opened.step or 0,
        dropped={**dropped, **counted({"optimizer": (len(opened.optimizer), OPTIMIZER)})},
        tokenizer=next((found for found in tokenizers if found is not None), None),
        fingerprint=read_fingerprint(opened.folder),
    )


def write_folder(target: TargetSpec) -> None:
    """Write a universal checkpoint of a Transformers model, which any ZeRO stage and number of ranks loads, with its
    config.json. Adam's moments are zeros, and all weights are in one parameter group."""
    model, layout = target.source.model, target.layout
    if (layout.tensor_parallel, layout.pipeline_parallel, layout.expert_parallel) != (1, 1, 1):
        raise CheckpointError(f"a DeepSpeed target has no {layout}: it is loaded by any number of data-parallel ranks")
    names = to_huggingface_lazily(target.weights, model.shape, vocabulary_size=model.vocabulary_size)
    shared = {}
    if model.shape.tie_embeddings:
        untied = {row.ours: row.theirs[0] for row in rows(model.shape.model_copy(update={"tie_embeddings": False}))}
        shared[untied[OUTPUT_LAYER]] = untied[WORD_EMBEDDINGS]
    state = DeepSpeedState(
        tensors=names,
        groups=[ParameterGroup(_ADAM, list(names))],
        optimizer={},
        optimizer_step=0,
        step=0,
        dtype=target.dtype,
        shared=shared,
    )
    folder = write_universal(target.folder, state)
    write_config(model, target.folder, dtype=target.dtype)
    if target.source.tokenizer is not None:
        copy_tokenizer(target.source.tokenizer, target.folder, context_length=model.context_length)
    target.fingerprint.save(folder)


# Of torch.optim.AdamW. DeepSpeed takes a group's settings from the checkpoint.
_ADAM = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
