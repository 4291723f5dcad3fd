"""DeepSpeed's checkpoints as canonical weights. They have the names of the module that was trained: of Transformers or of
Megatron-Core; and do not say which model it is."""

from pathlib import Path

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert.architectures import CONFIG, Model, read_config
from megatron_specialm.convert.deepspeed_folder import open_deepspeed
from megatron_specialm.convert.families import from_huggingface_lazily
from megatron_specialm.convert.fingerprint import read_fingerprint
from megatron_specialm.convert.huggingface_folder import without_copies
from megatron_specialm.convert.megatron_folder import OPTIMIZER, counted
from megatron_specialm.convert.megatron_names import canonical_names, from_megatron
from megatron_specialm.convert.source import Source
from megatron_specialm.convert.tokenizer_files import find_tokenizer

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
        weights = from_megatron(canonical_names(stored, opened.folder), model, where=opened.folder)
        dropped: dict[str, str] = {}
    else:
        used, dropped = without_copies(opened.folder, stored, model)
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
