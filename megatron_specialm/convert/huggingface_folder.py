"""Folders of Hugging Face Transformers: config.json, weights in one file or in shards with an index, and the tokenizer."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import read_json, seal_folder, write_json
from megatron_specialm.checkpoint.tensor_files import TensorFiles
from megatron_specialm.config.architectures import CONFIG, Model, read_config, refuse_given
from megatron_specialm.convert.families import (
    Row,
    from_huggingface_lazily,
    huggingface_shapes,
    is_buffer,
    rows,
    rows_in_files,
)
from megatron_specialm.convert.fingerprint import read_fingerprint
from megatron_specialm.convert.lazy import LazyTensor
from megatron_specialm.convert.llama_cpp import reads_sentencepiece
from megatron_specialm.convert.qwen2_moe import counted_zeros, without_zeros, zero_shapes
from megatron_specialm.convert.safe_pickle import COPY_AGAIN, opens
from megatron_specialm.convert.safetensors_writer import SafetensorsWriter
from megatron_specialm.convert.source import Source, TargetSpec
from megatron_specialm.convert.tokenizer_files import copy_tokenizer, find_tokenizer
from megatron_specialm.convert.torch_zip import read_state_dict
from megatron_specialm.model.weights import OUTPUT_LAYER, WORD_EMBEDDINGS

FORMAT = "huggingface"
SHARD_BYTES = 5 * 10**9
_WEIGHTS, _PICKLED = "model.safetensors", "pytorch_model.bin"
_INDEX = f"{_WEIGHTS}.index.json"


def recognize(path: Path) -> bool:
    """Whether a folder has a config.json, or weights under a name of Transformers."""
    files = (CONFIG, _WEIGHTS, _INDEX, _PICKLED, f"{_PICKLED}.index.json")
    return any((path / name).is_file() for name in files)


def stored_tensors(path: Path) -> Mapping[str, LazyTensor]:
    """The tensors in a folder's files, of any architecture."""
    return _stored(path, *_files(path))


@opens("a folder of Transformers")
def open_folder(path: Path, given: Model | None = None) -> Source:
    """Open a folder of Transformers.

    Raises:
        CheckpointError: its architecture is none of ours; or a tensor is missing, has no place or does not fit the config.
        ArtifactError: a file is missing or damaged.
    """
    refuse_given(path, given)
    model = read_config(path / CONFIG)
    files, places = _files(path)
    stored = _stored(path, files, places)
    model, zeros = without_zeros(stored, model)
    used, dropped = without_copies(path, {name: stored[name] for name in stored if name not in zeros}, model)
    found = from_huggingface_lazily(used, model.shape, vocabulary_size=model.vocabulary_size, where=path)
    return Source(
        path=path,
        format=FORMAT,
        model=model,
        weights=found,
        stored=stored,
        layout="one file" if len(files) == 1 else f"{len(files)} files",
        dropped={**dropped, **counted_zeros(zeros)},
        tokenizer=find_tokenizer(path),
        fingerprint=read_fingerprint(path),
    )


def _files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files with weights; and of each tensor its file's name, where an index says so."""
    for whole in (_WEIGHTS, _PICKLED):
        if (path / whole).is_file():
            return [path / whole], {}
        index = path / f"{whole}.index.json"
        if index.is_file():
            places = read_json(index, _Index, remedy=COPY_AGAIN).weight_map
            names = sorted(set(places.values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise CheckpointError(f"{index}: names {outside[0]!r}, which is no file of its folder")
            return [path / name for name in names], places
    raise CheckpointError(
        f"{path}: has neither {_WEIGHTS} nor {_INDEX}, nor {_PICKLED} nor its index: it is not complete"
    )


@dataclass(frozen=True)
class _Index:
    """What is read here of an index."""

    weight_map: dict[str, str]


def _stored(path: Path, files: list[Path], places: Mapping[str, str]) -> Mapping[str, LazyTensor]:
    is_pickled = files[0].suffix == ".bin"
    stored: Mapping[str, LazyTensor] = (
        _of_pickles(files) if is_pickled else TensorFiles(files, remedy=COPY_AGAIN).stored
    )
    if places and (missing := sorted(places.keys() ^ stored.keys())):
        raise CheckpointError(
            f"{path}: of its index {missing[0]} is {'in no file' if missing[0] not in stored else 'not listed'} "
            f"({len(missing)} such): the folder is not complete"
        )
    return stored


def _of_pickles(files: list[Path]) -> dict[str, LazyTensor]:
    stored: dict[str, LazyTensor] = {}
    for file in files:
        tensors = read_state_dict(file)
        if twice := sorted(stored.keys() & tensors.keys()):
            raise CheckpointError(f"{file}: has {twice[0]}, which another file of the folder has too: {COPY_AGAIN}")
        stored |= tensors
    return stored


def without_copies(
    path: Path, stored: Mapping[str, LazyTensor], model: Model
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The weights, and what is left out on purpose: buffers, and the copy of a tied embedding."""
    used, dropped = dict(stored), {name: "a buffer that follows from the config" for name in stored if is_buffer(name)}
    if model.shape.tie_embeddings:
        untied = model.shape.model_copy(update={"tie_embeddings": False})
        names = {row.ours: row.theirs[0] for row in rows(untied) if row.ours in (WORD_EMBEDDINGS, OUTPUT_LAYER)}
        own, copy = names[WORD_EMBEDDINGS], names[OUTPUT_LAYER]
        if copy in stored and own in stored:
            if not torch.equal(stored[own][()], stored[copy][()]):
                raise CheckpointError(f"{path}: {copy} differs from {own}, and the config ties them")
            dropped[copy] = f"equal to {own}, to which it is tied"
    for name in dropped:
        del used[name]
    return used, dropped


def write_folder(target: TargetSpec) -> None:
    """Write a folder that Transformers loads, in shards of at most `SHARD_BYTES`."""
    folder, source = target.folder, target.source
    table = {row.ours: row for row in rows_in_files(source.model.shape)}
    files, places = _planned(target, table.values())

    def write(name: str, tensor: LazyTensor) -> None:
        row = table[name]
        for theirs, part in zip(row.names, row.split(tensor[()], source.model.shape), strict=True):
            files[places[theirs]].write(theirs, part)

    target.for_each_weight(write)
    for name, shape in zero_shapes(source.model.shape).items():
        files[places[name]].write(name, torch.zeros(shape))
    for file in files.values():
        file.close()
    if len(files) > 1:
        size = sum((folder / file).stat().st_size for file in files)
        write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    write_config(source.model, folder, dtype=target.dtype)
    if source.tokenizer is not None:
        copy_tokenizer(
            source.tokenizer,
            folder,
            context_length=source.model.context_length,
            sentencepiece=reads_sentencepiece(source.model.shape),
        )
    target.fingerprint.save(folder)
    seal_folder(folder)


def _planned(target: TargetSpec, table: Iterable[Row]) -> tuple[dict[str, SafetensorsWriter], dict[str, str]]:
    """The files to write by name, and of each tensor its file's name."""
    model = target.source.model
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    room = SHARD_BYTES
    shapes = zero_shapes(model.shape)
    for row in table:
        shapes |= huggingface_shapes(row, model.shape, vocabulary_size=model.vocabulary_size)
    for name, shape in shapes.items():
        size = math.prod(shape) * target.dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = target.dtype, shape
        room -= size
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [_WEIGHTS]
    files = {name: SafetensorsWriter(target.folder / name, shard) for name, shard in zip(names, shards, strict=True)}
    return files, {name: file for file, shard in zip(names, shards, strict=True) for name in shard}


def write_config(model: Model, folder: Path, *, dtype: torch.dtype) -> None:
    """Write config.json, and generation_config.json where special ids are known."""
    from transformers import GenerationConfig  # slow to import

    from megatron_specialm.convert.huggingface import huggingface_config, save_config

    ids = dict(model.special_ids)
    config = huggingface_config(
        model.shape, vocabulary_size=model.vocabulary_size, context_length=model.context_length, eod=None
    )
    for name, value in ids.items():
        setattr(config, name, value)
    config.dtype = dtype
    save_config(config, folder)
    if ids:
        GenerationConfig(**ids).save_pretrained(folder)


def parameter_names(folder: Path) -> list[str]:
    """The names of the parameters of the model that a config.json describes, as its module has them, in the order of an
    optimizer's group. A tied one is there twice."""
    from transformers import AutoConfig, AutoModelForCausalLM  # slow to import

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]
