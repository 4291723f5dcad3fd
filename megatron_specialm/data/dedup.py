"""Which documents to keep so that no two of them are equal or nearly so.

Near-duplicates are found by MinHash over word 5-grams (Broder 1997) with locality-sensitive hashing, from the library
datasketch. Only every fourth 5-gram by hash is sketched, which estimates the same similarity at a quarter of the cost.
"""

import re
import zlib
from collections.abc import Iterable

import numpy as np
from datasketch import MinHash, MinHashLSH

PERMUTATIONS = 64
SHINGLE_WORDS = 5
SAMPLE = 4  # one shingle in so many is sketched
_WORD = re.compile(r"\w+")


def distinct(documents: Iterable[str], *, threshold: float = 0.6) -> list[int]:
    """The numbers of the documents to keep, in order: each is no near-duplicate of one kept before it.

    Args:
        threshold: Jaccard similarity of two documents' 5-grams from which the later one is dropped. Documents without a
            single sampled 5-gram are compared by their words alone.
    """
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    seen: set[str] = set()
    kept = []
    blank = MinHash(num_perm=PERMUTATIONS, hashfunc=int)  # the shingles come hashed
    for number, document in enumerate(documents):
        words = _WORD.findall(document.lower())
        exact = " ".join(words)
        if exact in seen:
            continue
        seen.add(exact)
        sketch = blank.copy()
        sketch.update_batch(_shingles(words))
        if not index.query(sketch):
            index.insert(number, sketch, check_duplication=False)
            kept.append(number)
    return kept


def _shingles(words: list[str]) -> list[int]:
    """Hashes of the sampled 5-grams of a document; of all of them where the sample would be empty."""
    codes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    span = min(SHINGLE_WORDS, len(codes))
    hashes = np.zeros(max(len(codes) - span + 1, 0), np.uint64)
    for offset in range(span):
        hashes = (hashes * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + len(hashes)]) & np.uint64(2**64 - 1)
    hashes = np.unique(hashes >> np.uint64(32))
    sampled = hashes[hashes % np.uint64(SAMPLE) == 0]
    return (sampled if len(sampled) else hashes).tolist()
