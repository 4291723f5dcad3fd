"""Compare the speed of `tokenize` (reading, encoding on all cores, writing the store) with the bare tokenizer library.

    python tools/bench_data.py [--input TEXT.jsonl] [--characters 20000000] [--workers N] [--algorithm bpe] [--rounds 5]

Bare means the library's batch call on texts in memory, with the same number of threads. The two alternate, so that other load
on the machine affects both. `CPU` is the ratio by CPU time of all processes, which other load affects least. Default text: the
docstrings of the installed Python packages.
"""

import argparse
import ast
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from megatron_specialm.data.documents import Documents
from megatron_specialm.data.encoding import Encoder
from megatron_specialm.data.store import StoreWriter
from megatron_specialm.data.tokenizer import JSON, MODEL, Tokenizer
from megatron_specialm.data.tokenizer_making import train_sentencepiece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", help="jsonl, jsonl.gz, jsonl.zst, parquet or txt")
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--characters", type=int, default=20_000_000, help="of text to use")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--algorithm", choices=["bpe", "unigram"], default="bpe")
    parser.add_argument("--vocabulary-size", type=int, default=8_000)
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    with tempfile.TemporaryDirectory() as name:
        _compare(args, Path(name))


def _compare(args: argparse.Namespace, folder: Path) -> None:
    source = Documents([args.input], text_field=args.text_field) if args.input else _docstrings()
    texts = _limited(source, args.characters)
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_sentencepiece(
        texts,
        folder,
        vocabulary_size=args.vocabulary_size,
        algorithm=args.algorithm,
        sample_characters=2_000_000,
    )
    bare = _bare(folder, args)

    def ours() -> int:
        return _tokenize(corpus, folder, tokenizer, args)

    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts)} documents, {megabytes:.1f} MB, {args.algorithm}, {args.workers} workers, MB/s:\n")
    print(f"{'round':>8} {'bare':>8} {'ours':>8} {'ratio':>8} {'CPU':>8}")
    rows = []
    for number in range(args.rounds + 1):
        (bare_wall, bare_cpu), (wall, cpu) = _seconds(lambda: bare(texts)), _seconds(ours)
        if number:  # the first round is a warm-up
            rows.append((megabytes / bare_wall, megabytes / wall, bare_wall / wall, bare_cpu / cpu))
            print(f"{number:>8} " + " ".join(f"{value:>8.2f}" for value in rows[-1]))
    print(f"{'median':>8} " + " ".join(f"{statistics.median(column):>8.2f}" for column in zip(*rows, strict=True)))


def _bare(folder: Path, args: argparse.Namespace) -> Callable[[list[str]], object]:
    """The batch call of the library that encodes with this algorithm (see data/tokenizer.py)."""
    if args.algorithm == "bpe":
        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL))
        return lambda texts: processor.encode(texts, num_threads=args.workers)
    return tokenizers.Tokenizer.from_file(str(folder / JSON)).encode_batch_fast


def _tokenize(corpus: Path, folder: Path, tokenizer: Tokenizer, args: argparse.Namespace) -> int:
    writer = StoreWriter(folder, "train", context_length=args.context_length, vocabulary_size=tokenizer.vocabulary_size)
    with Encoder(folder, workers=args.workers) as encoder:
        for ids in encoder.encode(Documents([str(corpus)], text_field="text")):
            writer.add_document(ids)
    return writer.finish()["tokens"]


def _seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Of the clock, and of CPU time of this process and of those that it has started and that have ended."""
    start, before = time.perf_counter(), os.times()
    call()
    return time.perf_counter() - start, sum(os.times()[:4]) - sum(before[:4])


def _limited(documents: Iterator[str], characters: int) -> list[str]:
    """The first documents with so many characters together."""
    kept: list[str] = []
    total = 0
    for document in documents:
        kept.append(document)
        total += len(document)
        if total >= characters:
            break
    return kept


def _docstrings() -> Iterator[str]:
    """The docstrings of each module of the installed packages, as one document."""
    warnings.simplefilter("ignore")  # of the packages' own escapes
    for path in sorted(Path(np.__file__).parent.parent.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
        text = "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
        if text:
            yield text


if __name__ == "__main__":
    main()
