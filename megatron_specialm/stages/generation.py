"""Generate text with a model of a run folder, an exported folder, or any checkpoint that can be converted.

Transformers generates in all cases: a checkpoint's weights are converted in memory, as by the export.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from megatron_specialm.base.artifacts import LABEL, MARKER, artifact_folder, artifact_link, check_artifact, read_label
from megatron_specialm.base.errors import ArtifactError, ConfigError
from megatron_specialm.base.files import MANIFEST, reading, verify_folder
from megatron_specialm.checkpoint.merged import read_merged
from megatron_specialm.checkpoint.steps import STATE, find_final
from megatron_specialm.config.architectures import CONFIG
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.convert.fingerprint import FINGERPRINT
from megatron_specialm.convert.formats import FORMATS
from megatron_specialm.convert.huggingface import huggingface_config, to_huggingface
from megatron_specialm.convert.run import open_convertible
from megatron_specialm.convert.tokenizer_files import is_ours
from megatron_specialm.data.store import TokenStore
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.graph.lineage import tokenizer_of
from megatron_specialm.graph.plan import RESOLVED
from megatron_specialm.graph.stage_kind import kind_of
from megatron_specialm.graph.tasks import TaskId

PROMPT_TOKENS = 12  # of a held-out document, if no prompt is given


@dataclass(frozen=True)
class Writer:
    """A Transformers model with its tokenizer.

    Attributes:
        start: the id of the token that begins every text.
        ends: the ids of the tokens that end one.
    """

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    start: int
    ends: tuple[int, ...]

    @torch.no_grad()
    def write(self, prompt: str, *, tokens: int, temperature: float, top_k: int, seed: int) -> str:
        """The prompt and its continuation: at most `tokens` tokens, or up to the end of the document.

        Args:
            temperature: of the softmax; 0 always takes the likeliest token.
            top_k: sample among this number of likeliest tokens.
            seed: the same seed gives the same text on the same machine.

        Raises:
            ConfigError: the prompt leaves no room in the model's context.
        """
        ids = [self.start, *self.encode(prompt)]
        room = self.model.config.max_position_embeddings - len(ids)
        if room < 1:
            raise ConfigError(
                f"the prompt has {len(ids) - 1} tokens, and the model's context {room + len(ids)}: give a shorter one"
            )
        drawn = (
            {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature > 0 else {"do_sample": False}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            written = self.model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), pad_token_id=self.start,
                eos_token_id=list(self.ends) or None, max_new_tokens=min(tokens, room), **drawn,
            )  # fmt: skip
        return self.decode([token for token in written[0].tolist() if token not in (self.start, *self.ends)])


def open_model(folder: Path) -> Writer:
    """Open the model of a folder: RUN/STAGE/KEY of a finished training, import or selection, an export, or a checkpoint that
    `specialm convert` reads.

    Raises:
        ConfigError: the folder is none of these, or the checkpoint has no tokenizer.
        ArtifactError: a file is missing or damaged, or the tokenizer is not the model's.
        CheckpointError: it has an expert per cluster, and so holds many models.
    """
    for exported in (folder, folder / "model"):
        if _is_export(exported):
            return _exported(exported)
    artifact = folder.resolve()  # RUN/artifacts/STAGE/KEY/DIGEST
    is_labelled = (artifact / LABEL).is_file() or (artifact / MARKER).is_file()
    if is_labelled and (artifact / "../../../.." / RESOLVED).is_file():  # not of a copy
        root, stage_name = artifact.parents[3], artifact.parents[1].name
        pipeline = load_pipeline(root / RESOLVED)
        stage: Any = pipeline.stages.get(stage_name)
        if stage is not None and kind_of(stage).makes == "model":
            tokenizer, label = tokenizer_of(pipeline, stage_name), read_label(artifact)
            own = {str(TaskId(stage_name, artifact.parent.name)): label["digest"]}
            digest = {**label["made_from"].get("inputs", {}), **own}.get(str(tokenizer))
            # Artifacts of earlier versions do not record their tokenizer.
            tokenizer_folder = artifact_folder(root, *tokenizer, digest) if digest else artifact_link(root, *tokenizer)
            for read in (artifact, tokenizer_folder):
                check_artifact(read)
            return _trained(artifact, tokenizer_folder)
    if any(known.recognize(folder) for known in FORMATS):
        return _converted(folder)
    raise ConfigError(
        f"{folder}: no model: name the folder of a training that has ended, RUN/STAGE/KEY, an exported one, "
        "RUN/export/STAGE.KEY/model, or a checkpoint that `specialm inspect` knows"
    )


def held_out_words(tokens: Path, tokenizer: Path) -> str:
    """The beginning of a set's first test document, up to the end of a word.

    Args:
        tokens: the set's folder, RUN/STAGE/KEY of a tokenize stage.
        tokenizer: the folder of its tokenizer.
    """
    begun = Tokenizer.load(tokenizer).decode(TokenStore.open(tokens, "test").window(0)[:PROMPT_TOKENS])
    return begun.rpartition(" ")[0] or begun


def _is_export(folder: Path) -> bool:
    """Whether a folder is an export of ours, even a damaged one. A step has a manifest too, but also a state file."""
    found = {name for name in (MANIFEST, FINGERPRINT, CONFIG, STATE) if (folder / name).is_file()}
    return STATE not in found and (MANIFEST in found or {FINGERPRINT, CONFIG} <= found)


def _exported(folder: Path) -> Writer:
    verify_folder(folder, alone=True)  # Transformers may read any file in the folder
    logging.disable_progress_bar()
    with reading(folder, form="a model that this version of Transformers loads", remedy="run its export again"):
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True).float().eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    ids = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    return _with_transformers(model, tokenizer, *_start_and_ends(folder, ids))


def _converted(folder: Path) -> Writer:
    source = open_convertible(folder)
    if source.tokenizer is None:
        raise ConfigError(
            f"{folder}: has no tokenizer to read the prompt with: add one by `specialm convert {folder} FOLDER --to "
            "huggingface --tokenizer TOKENIZER`, and name that folder"
        )
    start, ends = _start_and_ends(folder, source.model.special_ids)
    weights = {name: tensor[()].float() for name, tensor in source.weights.items()}
    model = transformers_model(
        source.model.shape, weights, vocabulary_size=source.model.vocabulary_size,
        context_length=source.model.context_length,
    )  # fmt: skip
    if is_ours(source.tokenizer):
        ours = Tokenizer.load(source.tokenizer)
        return Writer(model, lambda text: ours.encode([text])[0].tolist(), ours.decode, start, ends)
    with reading(source.tokenizer, form="a tokenizer that this version of Transformers loads"):
        tokenizer = AutoTokenizer.from_pretrained(source.tokenizer, local_files_only=True)
    return _with_transformers(model, tokenizer, start, ends)


def _start_and_ends(folder: Path, ids: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    """The id that begins a text, and those that end one: config.json may list several. A model without bos_token_id (Qwen)
    begins texts with its first end token."""
    begins, ends = (
        tuple(number for number in (found if isinstance(found, list) else [found]) if isinstance(number, int))
        for found in (ids.get("bos_token_id"), ids.get("eos_token_id"))
    )
    if not begins + ends:
        raise ConfigError(f"{folder}: config.json names no bos_token_id or eos_token_id: give the model its tokenizer")
    return (begins + ends)[0], ends


def _with_transformers(model: Any, tokenizer: Any, start: int, ends: tuple[int, ...]) -> Writer:
    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    return Writer(model, encode, lambda ids: str(tokenizer.decode(ids)), start, ends)


def _trained(folder: Path, tokenizer_folder: Path) -> Writer:
    merged, tokenizer = read_merged(find_final(folder)), Tokenizer.load(tokenizer_folder)
    if tokenizer.fingerprint != merged.state["tokenizer"]:
        raise ArtifactError(f"{folder}: trained with another tokenizer than {tokenizer_folder}: run the config again")
    model = transformers_model(
        merged.shape, merged.weights, vocabulary_size=merged.vocabulary_size, context_length=merged.context_length
    )
    encode, ends = lambda text: tokenizer.encode([text])[0].tolist(), (tokenizer.eod,)
    return Writer(model, encode, tokenizer.decode, tokenizer.bos, ends)


def transformers_model(
    shape: ModelConfig,
    weights: Mapping[str, torch.Tensor],
    *,
    vocabulary_size: int,
    context_length: int,
) -> Any:
    """An ordinary model's canonical weights as a model of Transformers, in fp32."""
    config = huggingface_config(shape, vocabulary_size=vocabulary_size, context_length=context_length, eod=None)
    logging.disable_progress_bar()
    assert config.architectures is not None
    # Not `load_state_dict`: some versions of Transformers rename weights as they load them.
    model, report = getattr(transformers, config.architectures[0]).from_pretrained(
        None, config=config, state_dict=to_huggingface(weights, shape), output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.float().eval()
