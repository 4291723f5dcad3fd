"""Conversion of a SentencePiece model to a tokenizer of the library `tokenizers`.

SentencePiece BPE has no merges, only pieces: it joins the neighbours whose union has the best score. That is equivalent to
merging any pair of pieces whose union is a piece, ranked by the union's score.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2 as schema

SPACE = "▁"
NEVER = -1e6  # the log-probability of pieces that must not match text: </s>, or a byte's piece <0x0A>


def converted(proto: Any) -> tokenizers.Tokenizer:
    """The tokenizer of a model's protobuf."""
    kind = schema.ModelProto.SentencePiece
    spec = proto.trainer_spec
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == kind.NORMAL}
    if spec.model_type == schema.TrainerSpec.BPE:
        ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
        model: Any = tokenizers.models.BPE(
            ids,
            sorted(_pairs(normal), key=lambda pair: (-normal[pair[0] + pair[1]], ids[pair[0]], ids[pair[1]])),
            unk_token=proto.pieces[spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    else:
        scores = [(piece.piece, normal.get(piece.piece, NEVER)) for piece in proto.pieces]
        model = tokenizers.models.Unigram(scores, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = _decoder(proto.normalizer_spec)
    tokenizer.add_special_tokens([_token(piece.piece) for piece in proto.pieces if piece.type == kind.CONTROL])
    tokenizer.add_tokens([_token(piece.piece) for piece in proto.pieces if piece.type == kind.USER_DEFINED])
    return tokenizer


def _pairs(pieces: Iterable[str]) -> Iterator[tuple[str, str]]:
    known = set(pieces)
    for piece in known:
        for cut in range(1, len(piece)):
            if piece[:cut] in known and piece[cut:] in known:
                yield piece[:cut], piece[cut:]


def _token(text: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(text, normalized=False)


def _normalizer(spec: Any) -> tokenizers.normalizers.Normalizer:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(tokenizers.normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(tokenizers.normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""))
        steps.append(tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(tokenizers.normalizers.Prepend(SPACE))
    steps.append(tokenizers.normalizers.Replace(" ", SPACE))
    return tokenizers.normalizers.Sequence(steps)


def _decoder(spec: Any) -> tokenizers.decoders.Decoder:
    steps: list[Any] = [
        tokenizers.decoders.Replace(SPACE, " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    if spec.add_dummy_prefix:
        steps.append(tokenizers.decoders.Strip(" ", 1, 0))
    return tokenizers.decoders.Sequence(steps)
