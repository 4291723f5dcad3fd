"""Cache a teacher's distributions for the training windows of a domain; `data/teacher.py` describes the files."""

import shutil
from pathlib import Path

from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.errors import MachineError
from megatron_specialm.checkpoint.merged import read_merged
from megatron_specialm.checkpoint.steps import find_final
from megatron_specialm.config.schema import TeachStage
from megatron_specialm.data.batches import count_windows
from megatron_specialm.data.teacher import CacheFormat, CacheWriter, TeacherCache
from megatron_specialm.data.training_data import open_store
from megatron_specialm.engine.open import single_process
from megatron_specialm.estimate.flops import reading_flops
from megatron_specialm.graph.context import Context
from megatron_specialm.graph.lineage import key_for
from megatron_specialm.train.teaching import teach


def run(stage: TeachStage, context: Context) -> Report:
    """Run the teacher once over the domain's training windows, on one process. flops: of its forward passes. For a sampled
    cache the report has `gradient_noise`, which is the same in every epoch of a student (`data/teacher.py`).

    Raises:
        ConfigError: more entries per token than the vocabulary has.
        MachineError: the cache does not fit on the disk.
    """
    teacher = (stage.teacher, key_for(context.pipeline, stage.teacher, context.key))
    merged = read_merged(find_final(context.artifact(*teacher)))
    store = open_store(stage.tokens, context, context.key)
    cache_format = CacheFormat(stage.keep, store.vocabulary_size, stage.temperature, stage.count or 0)
    _check_room(context.folder, cache_format, tokens=store.tokens)
    made_of = {
        "teacher": context.marker(*teacher).digest,
        "store": context.marker(stage.tokens, context.key).digest,
    }
    writer = CacheWriter(context.folder, cache_format, context_length=store.context_length, **made_of)
    with single_process(threads=context.threads):  # runs on rank 0 only
        tokens, slots, saved = teach(
            merged.build(), store, writer, batch_size=stage.batch_size, packing=stage.packing,
            seed=context.pipeline.seed_of_training,
            counted=lambda batches: context.counted(batches, unit="windows", of=len(store), size=count_windows),
        )  # fmt: skip
    sampled = cache_format.kind == "sampled"
    noise = {"gradient_noise": TeacherCache.open(context.folder, **made_of).noise()} if sampled else {}
    flops = reading_flops(merged.shape, store.vocabulary_size, store.context_length, slots=slots, saved=saved)
    size = sum(path.stat().st_size for path in context.folder.glob("*.bin"))
    values = {"windows": len(store), "bytes": size, **noise}
    return Report(tokens=tokens, slots=slots, flops=flops, values=values)


def _check_room(folder: Path, cache_format: CacheFormat, *, tokens: int) -> None:
    needed, free = tokens * cache_format.bytes_per_token, shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(
            f"{folder}: the cache of {tokens:,} tokens takes {needed / 2**30:,.1f} GiB ({cache_format.kind}), and "
            f"{free / 2**30:,.1f} GiB are free: use `keep: sampled`, or a smaller `count`"
        )
