"""Text to token ids and back, by the library that a tokenizer encodes with.

A SentencePiece BPE model encodes with SentencePiece, which is faster, and converts exactly. A unigram model encodes with
`tokenizers`: SentencePiece adds log-probabilities in 32 bits, so in long documents rounding decides between nearly equal
segmentations, which no other library reproduces.
"""

from collections.abc import Callable
from typing import NamedTuple

import sentencepiece
import tokenizers

# Texts of many scripts, which a tokenizer, its conversion and its export must encode alike.
PROBES = (
    "The  quick\tbrown fox,\n\n  jumps over 1234567 lazy dogs!?  ",
    "for i in range(10):\r\n        x[i] += 0.5  # naïve café, Ångström ½ ﬁ",
    "Ελληνικά русский 日本語 العربية हिन्दी 👩‍👩‍👧 e\u0301 \u2003\u00a0\u200b",
    "</s> <s> <unk> <0x0A> <|endoftext|> \0 \u2581",
)


class Codec(NamedTuple):
    """encode: a text to token ids, in one thread, without special tokens. decode: ids to the text."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def sentencepiece_codec(processor: sentencepiece.SentencePieceProcessor) -> Codec:
    """The codec of a SentencePiece model."""
    return Codec(processor.encode, processor.decode)


def tokenizers_codec(tokenizer: tokenizers.Tokenizer) -> Codec:
    """The codec of a tokenizer of the library `tokenizers`. From here on it encodes the names of special tokens as ordinary
    text."""
    tokenizer.encode_special_tokens = True

    def encode(text: str) -> list[int]:
        # A batch of one: unlike `encode`, it skips character offsets. It stays in one thread.
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    return Codec(encode, tokenizer.decode)


def added_tokens(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """The tokens beside the model's vocabulary, special or not."""
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]
