"""Time and peak memory of a conversion, beside `cp` and `sync` of the same bytes (a conversion
syncs its files too): a random Llama of 1.3B parameters to Megatron's
torch_dist at TP2 x PP2.

    python tools/bench_convert.py FOLDER [--layers 24] [--to megatron] [--dtype fp32]

FOLDER needs room for three times the model. The source is made first, once; every figure is of a process of its own.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_specialm.config.architectures import Model
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.convert.families import huggingface_shapes, rows
from megatron_specialm.convert.huggingface_folder import write_config
from megatron_specialm.convert.safetensors_writer import SafetensorsWriter
from megatron_specialm.estimate.parameters import count_parameters

VOCABULARY = 32_000


def main() -> None:
    """Make the source, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--to", default="megatron")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="of the source")
    asked = parser.parse_args()
    source, target = asked.folder / f"source-{asked.layers}-{asked.dtype}", asked.folder / "target"
    shape = ModelConfig(
        family="llama",
        layers=asked.layers,
        hidden_size=2048,
        ffn_hidden_size=5632,
        attention_heads=16,
        tie_embeddings=False,
    )
    if not source.exists():
        _make(Model(shape, VOCABULARY, 2048, {}), source, torch.float32 if asked.dtype == "fp32" else torch.bfloat16)
    size = sum(path.stat().st_size for path in source.iterdir())
    parameters = count_parameters(shape, VOCABULARY) / 1e9
    print(f"{parameters:.2f}B parameters, {size / 2**30:.2f} GiB in {asked.dtype}, {os.cpu_count()} cores")
    copying = _measured(["sh", "-c", 'cp -r "$1" "$2" && sync -f "$2"/*', "cp", str(source), str(target)], target)
    layout = ["--tensor-parallel", "2", "--pipeline-parallel", "2"] if asked.to.startswith("megatron") else []
    command = [
        sys.executable,
        "-m",
        "megatron_specialm",
        "convert",
        str(source),
        str(target),
        "--to",
        asked.to,
        *layout,
    ]
    converting = _measured(command, target)
    print(json.dumps({"cp": copying._asdict(), "convert": converting._asdict()}, indent=1))


def _make(model: Model, folder: Path, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True)
    shapes = {
        name: (dtype, shape)
        for row in rows(model.shape)
        for name, shape in huggingface_shapes(row, model.shape, vocabulary_size=model.vocabulary_size).items()
    }
    file = SafetensorsWriter(folder / "model.safetensors", shapes)
    for name, (_, shape) in shapes.items():
        file.write(name, torch.randn(shape) * 0.02)
    file.close()
    write_config(model, folder, dtype=dtype)


class _Figures(NamedTuple):
    """`peak_gib` is without pages of files that are only mapped."""

    seconds: float
    cpu_seconds: float
    peak_gib: float


def _measured(command: list[str], target: Path) -> _Figures:
    shutil.rmtree(target, ignore_errors=True)
    started, used = time.monotonic(), _used()
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.02)
    process.wait()
    figures = _Figures(time.monotonic() - started, _used() - used, peak / 2**20)
    assert process.returncode == 0, command
    shutil.rmtree(target, ignore_errors=True)
    return figures


def _used() -> float:
    """CPU seconds of all processes that have ended."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


if __name__ == "__main__":
    main()
