"""A part in its own process: it prints each figure, and rewrites a file with all figures so far."""

import ctypes
import importlib
import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check.figures import Figure, row
from megatron_specialm.base.errors import SpecialmError
from megatron_specialm.base.files import write_json

NOT_POSSIBLE = 3  # exit code: the machine lacks something, which the last line of stderr names


@dataclass(frozen=True)
class Part:
    """`measure` is MODULE.FUNCTION of this package. In seconds: a part is started only if `needs` remain, and is ended after
    `limit`."""

    title: str
    measure: str
    needs: float
    limit: float


# By priority: the time may end before the last ones.
PARTS = {
    "machine": Part("what this machine is", "machine.describe", 5, 60),
    "gemm": Part("matrix products of Transformer Engine beside torch's", "gemm.products", 10, 75),
    "logits": Part("logits of GPU, CPU and export", "logits.compare", 15, 90),
    "tests": Part("tests/gpu", "suite.run", 30, 210),
    "mfu": Part("training steps beside Transformers with torch.compile", "speed.beside_transformers", 25, 120),
    "fp8": Part("FP8 beside bf16 on llm-771m", "speed.fp8_beside_bf16", 20, 75),
    "projected": Part("a projected network's step beside the SLM's", "projected.beside_slm", 20, 75),
    "moe": Part("a mixture of experts' step beside the dense model's", "moe.beside_dense", 20, 75),
    "packed": Part("packed and sorted windows beside padded ones", "packed.beside_padded", 20, 75),
    "memory": Part("peak memory against the estimate", "memory.against_estimate", 15, 75),
    "text": Part("300 steps on text: fp32, bf16, FP8", "text.loss_curves", 20, 75),
}


def be(name: str, path: Path, *, tiny: bool) -> int:
    """Measure one part into `path`.

    Returns:
        the exit code: 0 or NOT_POSSIBLE. Other errors are raised.
    """
    _die_with_parent()
    module, _, function = PARTS[name].measure.partition(".")
    found: list[dict[str, Any]] = []
    try:
        for figure in getattr(importlib.import_module(f"gpu_check.{module}"), function)(tiny=tiny):
            found.append(_plain(figure))
            print(row(figure), flush=True)
            write_json(path, found)
    except SpecialmError as error:
        reason = str(error)
    except ImportError as error:
        reason = f"a package is missing: {error}"
    else:
        return 0
    print(reason.replace("\n", " "), file=sys.stderr)
    return NOT_POSSIBLE


def _plain(figure: Figure) -> dict[str, Any]:
    """Replace NaN and infinity, which JSON does not have."""
    known = figure._asdict()
    if isinstance(figure.value, float) and not math.isfinite(figure.value):
        known["value"] = str(figure.value)
    return known


def _die_with_parent() -> None:
    """If the parent is killed, end this process too, so that it does not occupy the GPU (Linux)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
