"""The teacher cache: a teacher's distribution for every token of a token store, written once and read by many trainings.

    lengths.bin                                    tokens of each window, (W,) int32
    log_probabilities.bin  ids.bin  tail.bin  entropy.bin
                                                   the arrays of the kind, for each token, in the order of window ids
    cache.json                                     written last: the format, the teacher, the store, sizes of the files

| kind    | stored per token                                                           | bytes per token |
|---------|----------------------------------------------------------------------------|-----------------|
| exact   | the log-probabilities of the whole vocabulary                              | 4 V             |
| top-k   | the K likeliest ids, their log-probabilities, that of all others together  | K (4 + id) + 4  |
| sampled | K draws from the teacher's distribution, and that distribution's entropy   | K id + 4        |

The draws of a sampled cache are fixed: a training that reads a window in another epoch gets the same ones. Loss and gradient
are unbiased over caches, but many epochs over one cache do not average its noise out; `noise_of_draws` estimates it. Using all
K draws each time has the least noise that K draws allow. A larger K, or another kind, has less.

An id takes 2 bytes in a vocabulary of up to 65,536 tokens, 4 in a larger one. Probabilities are those at the cache's
temperature. Logarithms are in nats and fp32: with 16 bits, an exact cache would change the teacher.

Legend: B windows of a batch, T context length, V vocabulary, K entries of a token, W windows, N tokens without padding.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np

from megatron_specialm.base.arrays import read_values
from megatron_specialm.base.errors import ArtifactError, ConfigError
from megatron_specialm.base.files import REMAKE, fsync_path, named, read_json, write_json
from megatron_specialm.base.shapes import Count, Size

DESCRIPTION = "cache.json"
LENGTHS = "lengths"
# Names of the extra inputs of a batch, and of the files: (B, T, K) and (B, T, V), (B, T, K), (B, T), (B, T).
IDS = "ids"
LOG_PROBABILITIES = "log_probabilities"
TAIL = "tail"
ENTROPY = "entropy"
NOISE_TOKENS = 50_000  # from which the noise of a cache is estimated

Kind = Literal["exact", "top-k", "sampled"]


@dataclass(frozen=True)
class CacheFormat:
    """What a cache stores of every token. `count` is K; an exact cache has none.

    Raises:
        ConfigError: a temperature that is not positive, or a count that the kind or the vocabulary cannot have.
    """

    kind: Kind
    vocabulary_size: int
    temperature: float = 1.0
    count: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"temperature {self.temperature}: must be above 0; 1 leaves the teacher as it is")
        if self.kind == "exact" and self.count:
            raise ConfigError(f"count {self.count}: an exact cache keeps the whole vocabulary: leave count out")
        if self.kind != "exact" and self.count < 1:
            raise ConfigError(f"count {self.count}: a {self.kind} cache keeps at least 1 entry per token")
        if self.kind == "top-k" and self.count > self.vocabulary_size:
            raise ConfigError(
                f"count {self.count}: the vocabulary has {self.vocabulary_size} tokens: "
                f"set count to at most {self.vocabulary_size}, or kind to exact"
            )

    @property
    def bytes_per_token(self) -> int:
        """The size of the cache's arrays, per token."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.arrays().values())

    def arrays(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """The arrays by name: type, and shape per token."""
        ids = (np.dtype(np.uint16 if self.vocabulary_size <= 2**16 else np.int32), (self.count,))
        width = self.vocabulary_size if self.kind == "exact" else self.count
        log_probabilities = (np.dtype(np.float32), (width,))
        one: tuple[np.dtype, tuple[int, ...]] = (np.dtype(np.float32), ())
        if self.kind == "exact":
            return {LOG_PROBABILITIES: log_probabilities}
        if self.kind == "top-k":
            return {IDS: ids, LOG_PROBABILITIES: log_probabilities, TAIL: one}
        return {IDS: ids, ENTROPY: one}


@dataclass(frozen=True)
class Description:
    """The content of `cache.json`. `kept` is the format, `teacher` and `store` are digests, `bytes` the sizes of the files."""

    kept: CacheFormat
    context_length: Size
    teacher: str
    store: str
    windows: Count
    tokens: Count
    bytes: dict[str, Count]


class TeacherCache:
    """A cache on disk. The arrays are memory-mapped; 12 bytes per window are in memory."""

    def __init__(self, folder: Path, description: Description) -> None:
        self.folder, self.format, self.context_length = folder, description.kept, description.context_length
        lengths = _path(folder, LENGTHS)
        self._lengths = read_values(lengths, dtype=np.int32, shape=(description.windows,))
        self._ends = np.cumsum(self._lengths, dtype=np.int64)
        tokens = self._lengths.sum(dtype=np.int64)
        if ((self._lengths < 0) | (self._lengths > self.context_length)).any() or tokens != description.tokens:
            raise ArtifactError(f"{lengths}: not the lengths of windows with {description.tokens} tokens: {REMAKE}")
        self._arrays = {
            name: read_values(_path(folder, name), dtype=dtype, shape=(description.tokens, *shape), mapped=True)
            for name, (dtype, shape) in self.format.arrays().items()
        }

    @classmethod
    def open(cls, folder: Path, *, teacher: str, store: str) -> Self:
        """Open a cache of this teacher and token store.

        Args:
            teacher, store: their digests.

        Raises:
            ArtifactError: the cache is unfinished, damaged, or of another teacher or store.
        """
        description = read_json(folder / DESCRIPTION, Description)
        for what, wanted in {"teacher": teacher, "store": store}.items():
            if (found_with := getattr(description, what)) != wanted:
                raise ArtifactError(
                    f"{folder}: made with the {what} {found_with}, not {wanted}: teach again with the right {what}"
                )
        for name, size in description.bytes.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else 0
            if found != size:
                raise ArtifactError(
                    f"{path}: {found} bytes, {DESCRIPTION} says {size}: cut short or overwritten: "
                    "remove the folder and teach again"
                )
        return cls(folder, description)

    def __len__(self) -> int:
        return len(self._lengths)

    def extra_inputs(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of the windows `ids` (B,), by name: (B, T, ...) in int32 and fp32, zero in the padding.

        Raises:
            ArtifactError: a token id is outside the vocabulary.
        """
        lengths, ends = self._lengths[ids].tolist(), self._ends[ids].tolist()
        extra_inputs = {}
        for name, array in self._arrays.items():
            dtype = np.int32 if name == IDS else np.float32
            extra_inputs[name] = np.zeros((len(ids), self.context_length, *array.shape[1:]), dtype)
            for row, end, length in zip(extra_inputs[name], ends, lengths, strict=True):
                row[:length] = array[end - length : end]
        ids_BTK = extra_inputs.get(IDS, np.empty(0))
        if ids_BTK.size and not 0 <= ids_BTK.min() <= ids_BTK.max() < self.format.vocabulary_size:
            raise ArtifactError(
                f"{_path(self.folder, IDS)}: has token ids from {ids_BTK.min()} to {ids_BTK.max()} for a vocabulary of "
                f"{self.format.vocabulary_size}: {REMAKE}"
            )
        return extra_inputs

    def noise(self) -> float | None:
        """The gradient noise of a sampled cache (`noise_of_draws`), estimated on evenly spread tokens. None for other kinds."""
        if self.format.kind != "sampled":
            return None
        ids_NK = self._arrays[IDS]
        return noise_of_draws(ids_NK[:: max(1, len(ids_NK) // NOISE_TOKENS)])


def noise_of_draws(ids_NK: np.ndarray) -> float | None:
    """Mean over tokens of the expected squared distance between the distribution of K draws (1/K each) and the teacher's:
    (1 - sum of p squared) / K. The gradients by a student's logits have the same distance. The frequency of equal pairs of
    draws estimates the sum without bias. None with a single draw.
    """
    count = ids_NK.shape[1]
    if count < 2:
        return None
    ordered_NK = np.sort(ids_NK, axis=1)
    equal = sum(int((ordered_NK[:, lag:] == ordered_NK[:, :-lag]).sum()) for lag in range(1, count))
    return (1 - equal / (len(ids_NK) * count * (count - 1) / 2)) / count


class CacheWriter:
    """Writes a cache, one window after the other. It cannot be opened before `finish` has written `cache.json`."""

    def __init__(
        self, folder: Path, cache_format: CacheFormat, *, context_length: int, teacher: str, store: str
    ) -> None:
        self.format = cache_format
        self._folder = folder
        self._labels = {"context_length": context_length, "teacher": teacher, "store": store}
        self._lengths: list[int] = []
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DESCRIPTION).unlink(missing_ok=True)
        self._files = {name: _path(folder, name).open("wb") for name in cache_format.arrays()}

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Append a window: the arrays of its tokens, (N, ...) each."""
        (length,) = {len(array) for array in arrays.values()}
        for name, (dtype, shape) in self.format.arrays().items():
            assert arrays[name].shape[1:] == shape, f"{name}: {arrays[name].shape}"
            with named(_path(self._folder, name)):
                self._files[name].write(arrays[name].astype(dtype, order="C", copy=False).data)
        self._lengths.append(length)

    def finish(self) -> None:
        """Close the files and write `cache.json`."""
        for name, file in self._files.items():
            with named(_path(self._folder, name)):
                file.close()
        _path(self._folder, LENGTHS).write_bytes(np.array(self._lengths, np.int32).tobytes())
        paths = [_path(self._folder, name) for name in (LENGTHS, *self._files)]
        for path in paths:
            fsync_path(path)
        description = {
            "kept": asdict(self.format),
            **self._labels,
            "windows": len(self._lengths),
            "tokens": sum(self._lengths),
            "bytes": {path.name: path.stat().st_size for path in paths},
        }
        write_json(self._folder / DESCRIPTION, description)


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"
