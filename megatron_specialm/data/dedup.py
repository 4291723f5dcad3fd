"""Removing near-duplicate documents, and measuring how much of a test document is contained in training text.

Near-duplicates are found by MinHash over word 5-grams (Broder 1997) with locality-sensitive hashing, from the library
datasketch. A quarter of the 5-grams, chosen by hash, is sketched: it estimates the same similarity at a quarter of the cost.
"""

import re
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from datasketch import MinHash, MinHashLSH

PERMUTATIONS = 64
SHINGLE_WORDS = 5
CONTAINED_WORDS = 8
SAMPLE = 4  # one of so many shingles is sketched
_WORD = re.compile(r"\w+")


def distinct(documents: Iterable[str], *, threshold: float = 0.6) -> list[int]:
    """The numbers of the documents to keep, in order: none is a near-duplicate of an earlier one.

    Args:
        threshold: Jaccard similarity of two documents' 5-grams from which the later one is dropped. Documents without any
            sampled 5-gram are compared by their words.
    """
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    seen: set[str] = set()
    kept = []
    blank = MinHash(num_perm=PERMUTATIONS, hashfunc=int)  # shingles are hashed already
    for number, document in enumerate(documents):
        words = _words(document)
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
    """Hashes of the sampled 5-grams of a document, or of all if none is sampled."""
    hashes = np.unique(_ngrams(words, SHINGLE_WORDS) >> np.uint64(32))
    sampled = hashes[hashes % np.uint64(SAMPLE) == 0]
    return (sampled if len(sampled) else hashes).tolist()


def containment(documents: Sequence[str], training: Iterable[str]) -> np.ndarray:
    """The fraction (0 to 1) of each document's word 8-grams that the training text contains anywhere.

    A document may be no near-duplicate of any other and yet consist of their sentences, as a licence consists of clauses.
    """
    known = np.unique(np.concatenate([_ngrams(_words(text), CONTAINED_WORDS) for text in training]))
    grams = [_ngrams(_words(text), CONTAINED_WORDS) for text in documents]
    # A search in the sorted hashes: `np.isin` would sort all of them again for each document.
    places = [np.minimum(np.searchsorted(known, own), len(known) - 1) for own in grams]
    return np.array([np.mean(known[at] == own) if len(own) else 0.0 for own, at in zip(grams, places, strict=True)])


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(words: list[str], span: int) -> np.ndarray:
    """One 64-bit hash for each `span` consecutive words, or one for all words if there are fewer."""
    codes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    span = min(span, len(codes))
    hashes = np.zeros(max(len(codes) - span + 1, 0), np.uint64)
    for offset in range(span):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + len(hashes)]
    return hashes
