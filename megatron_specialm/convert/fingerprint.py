"""The fingerprint of a model: what it computes, in a form that every format can carry and two can be compared by.

It has the SHA-256 of each canonical tensor (in fp32, C order), the logits on fixed tokens, and all settings that decide what is
computed. A tensor that was swapped, transposed or changed on the way is named.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import read_json, write_json
from megatron_specialm.config.architectures import Model
from megatron_specialm.convert.probe import Probe
from megatron_specialm.convert.safe_pickle import COPY_AGAIN
from megatron_specialm.convert.safetensors_writer import elements

FINGERPRINT = "fingerprint.json"
HASHED_ELEMENTS = 2**18  # converted to fp32 at a time: they stay in the processor's cache
TOLERANCE = 1e-4  # of logits, relative to the largest: other machines add in another order


@dataclass(frozen=True)
class Fingerprint:
    """`weights` has the SHA-256 of each canonical tensor. `logits` are rows over `tokens`, columns over `places`; None where
    they are not finite. `moments` has the SHA-256 of each of Adam's moments, where the checkpoint has them."""

    model: dict[str, Any]
    weights: dict[str, str]
    tokens: list[int]
    places: list[int]
    logits: list[list[float | None]]
    moments: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `fingerprint.json`."""
        content = asdict(self)
        write_json(folder / FINGERPRINT, {name: value for name, value in content.items() if value or name != "moments"})


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """A folder's fingerprint; None where it has none."""
    path = folder / FINGERPRINT
    return read_json(path, Fingerprint, remedy=COPY_AGAIN) if path.is_file() else None


def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's elements in fp32, C order."""
    digest = hashlib.sha256()
    for part in tensor.contiguous().view(-1).split(HASHED_ELEMENTS):
        digest.update(elements(part.float()))
    return digest.hexdigest()


def make_fingerprint(model: Model, hashes: Mapping[str, str], probe: Probe) -> Fingerprint:
    """Of all weights' hashes, and a probe that has taken all weights."""
    logits = [[value if math.isfinite(value) else None for value in row] for row in probe.finish().tolist()]
    return Fingerprint(model.computes, dict(hashes), probe.tokens, probe.places, logits)


def compare(recorded: Fingerprint, found: Fingerprint, *, where: Path) -> None:
    """Compare what was recorded of a model with what is found.

    Raises:
        CheckpointError: naming the setting, or the tensors that differ.
    """
    compare_weights(recorded, found.model, found.weights, where=where)
    ours, theirs = (np.array(one.logits, float) for one in (recorded, found))  # None becomes NaN
    tolerance, difference = TOLERANCE * max(1.0, np.nanmax(np.abs(ours))), np.nanmax(np.abs(ours - theirs))
    if not np.allclose(theirs, ours, rtol=0, atol=tolerance, equal_nan=True):
        raise CheckpointError(
            f"{where}: logits differ from those of its fingerprint by up to {difference:.1e}, though all weights are equal: "
            "this version of megatron_specialm computes otherwise than the one that wrote it"
        )


def compare_weights(
    fingerprint: Fingerprint, settings: Mapping[str, Any], found: Mapping[str, str], *, where: Path
) -> None:
    """Compare a fingerprint with settings (`Model.computes`) and hashes of canonical tensors: where they are equal, so
    are the logits.

    Raises:
        CheckpointError: naming a setting, or the tensors that differ, and of a swapped one whose content it has.
    """
    compare_settings(fingerprint, settings, where=where)
    compare_hashes(fingerprint.weights, found, where=where)


def compare_settings(fingerprint: Fingerprint, settings: Mapping[str, Any], *, where: Path) -> None:
    """Compare a fingerprint with settings (`Model.computes`).

    Raises:
        CheckpointError: naming the setting.
    """
    found = {name: settings.get(name) for name in fingerprint.model}
    for name, ours, recorded in unequal_settings(found, fingerprint.model):
        raise CheckpointError(
            f"{where}: {name} is {ours}, and its fingerprint says {recorded}: the config was changed or lost on the way"
        )


def unequal_settings(
    first: Mapping[str, Any], second: Mapping[str, Any], *, prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """The settings that differ, each with both values; those of a group by dotted names, as `moe.top_k`."""
    for name in {**first, **second}:
        ours, theirs = first.get(name), second.get(name)
        if isinstance(ours, Mapping) or isinstance(theirs, Mapping):
            yield from unequal_settings(ours or {}, theirs or {}, prefix=f"{prefix}{name}.")
        elif ours != theirs:
            yield f"{prefix}{name}", ours, theirs


def compare_hashes(recorded: Mapping[str, str], found: Mapping[str, str], *, where: Path) -> None:
    """Compare hashes of tensors.

    Raises:
        CheckpointError: naming the tensors that differ, and of a swapped one whose content it has.
    """
    if recorded.keys() != found.keys():
        name = min(recorded.keys() ^ found.keys())
        raise CheckpointError(f"{where}: {name} is {'missing' if name in recorded else 'not in its fingerprint'}")
    if differing := [name for name in recorded if recorded[name] != found[name]]:
        owners = {value: name for name, value in recorded.items()}
        told = [f"{name} (has the content of {owners[found[name]]})" if found[name] in owners else name
                for name in differing[:8]]  # fmt: skip
        more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise CheckpointError(f"{where}: not what its fingerprint says: {', '.join(told)}{more}: it is damaged")
