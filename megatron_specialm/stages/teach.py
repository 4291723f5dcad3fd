"""What a teacher says of every training window of a domain, for its students: see `data/teacher.py` for the files."""

import shutil
from pathlib import Path

from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.errors import MachineError
from megatron_specialm.checkpoint.checkpoint import find_final
from megatron_specialm.checkpoint.merged import read_merged
from megatron_specialm.config.schema import TeachStage
from megatron_specialm.data.batches import count_windows
from megatron_specialm.data.teacher import CacheFormat, CacheWriter, TeacherCache
from megatron_specialm.engine.megatron.process_groups import process_group
from megatron_specialm.estimate.flops import forward_flops
from megatron_specialm.graph.lineage import key_for
from megatron_specialm.stages.context import Context
from megatron_specialm.stages.reading import open_store
from megatron_specialm.train.teaching import teach


def run(stage: TeachStage, context: Context) -> Report:
    """Run the teacher over the domain's training windows once, on one process. flops: its forward passes. Of draws the
    values have `gradient_noise`, which stays the same in every epoch that a student reads (`data/teacher.py`).

    Raises:
        ConfigError: more entries per token than the vocabulary has.
        MachineError: the cache does not fit on the disk.
    """
    teacher = (stage.teacher, key_for(context.pipeline, stage.teacher, context.key))
    served = read_merged(find_final(context.artifact(*teacher)))
    store = open_store(stage.tokens, context, context.key)
    kept = CacheFormat(stage.keep, store.vocabulary_size, stage.temperature, stage.count or 0)
    _check_room(context.folder, kept, tokens=store.tokens)
    made_of = {
        "teacher": context.marker(*teacher).digest,
        "store": context.marker(stage.tokens, context.key).digest,
    }
    writer = CacheWriter(context.folder, kept, context_length=store.context_length, **made_of)
    with process_group(ALONE, threads=context.threads):  # the first rank's work, however many there are
        tokens = teach(
            served.build(), store, writer, batch_size=stage.batch_size, seed=context.pipeline.seed_of_training,
            counted=lambda batches: context.counted(batches, unit="windows", of=len(store), size=count_windows),
        )  # fmt: skip
    noise = {"gradient_noise": TeacherCache.open(context.folder, **made_of).noise()} if kept.kind == "sampled" else {}
    positions = len(store) * store.context_length
    flops = positions * forward_flops(served.shape, store.vocabulary_size, store.context_length)
    size = sum(path.stat().st_size for path in context.folder.glob("*.bin"))
    values = {"windows": len(store), "bytes": size, **noise}
    return Report(tokens=tokens, slots=positions, flops=flops, values=values)


def _check_room(folder: Path, kept: CacheFormat, *, tokens: int) -> None:
    needed, free = tokens * kept.bytes_per_token, shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(
            f"{folder}: the cache of {tokens:,} tokens takes {needed / 2**30:,.1f} GiB ({kept.kind}), and {free / 2**30:,.1f} "
            "GiB are free: use `keep: sampled`, or a smaller `count`"
        )
