"""Benchmark data preparation for a shard of a corpus on one core: speed and memory of each kind of task.

    python tools/bench_prepare.py [--megabytes 40] [--vectors 262144] [--windows 100000000] [--only NAME ...]

The text is the docstrings of the installed Python packages, repeated to the given size; windows have 1,024 tokens. Each
measurement runs in its own process. Seconds are its CPU time (one thread), memory is its peak resident memory. Mapped files
that were read count as resident, although the kernel may drop them at any time; `own MiB` excludes them.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

CONTEXT, DIMENSIONS, K = 1024, 256, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=40, help="of text to tokenize and embed")
    parser.add_argument("--vectors", type=int, default=262_144, help="to cluster and assign")
    parser.add_argument("--windows", type=int, default=100_000_000, help="to index by cluster, and to open")
    parser.add_argument("--only", nargs="+", choices=MEASURED, default=list(MEASURED))
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = "1"
    print(f"{'':<34} {'rate per core':>26} {'peak MiB':>10} {'own MiB':>9}")
    with tempfile.TemporaryDirectory() as folder:
        _text(Path(folder), args.megabytes * 1_000_000)
        for name in args.only:
            with multiprocessing.get_context("spawn").Pool(1) as process:
                rate, peak, own = process.apply(_measure, (name, Path(folder), args))
            print(f"{name:<34} {rate:>26} {peak:>10,.0f} {own:>9,.0f}", flush=True)


def _measure(name: str, folder: Path, args: argparse.Namespace) -> tuple[str, float, float]:
    """The speed in one measurement, and the process's memory: the peak, and the final one without mapped files."""
    rate = MEASURED[name](folder, args)
    own = sum(
        int(line.split()[1])
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines()
        if line.startswith("Private_Dirty")
    )
    return rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, own / 1024


def _seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _text(folder: Path, size: int) -> None:
    """The shard's file, and the tokenizer."""
    from bench_data import _docstrings

    from megatron_specialm.data.tokenizer_making import train_sentencepiece

    texts = [text for text in itertools.islice(_docstrings(), 6_000) if len(text) > 200]
    written = 0
    with (folder / "corpus.jsonl").open("w") as file:
        for text in itertools.cycle(texts):
            written += file.write(json.dumps({"text": text[:8_000]}) + "\n")
            if written > size:
                break
    train_sentencepiece(texts, folder, vocabulary_size=8_000, algorithm="bpe", sample_characters=2_000_000)


def tokenize(folder: Path, args: argparse.Namespace) -> str:
    """Reading, encoding and writing the store, in one process."""
    from megatron_specialm.data.documents import Documents
    from megatron_specialm.data.encoding import Encoder
    from megatron_specialm.data.store import StoreWriter, describe_store
    from megatron_specialm.data.tokenizer import Tokenizer

    size, split = Tokenizer.load(folder).vocabulary_size, {}
    writer = StoreWriter(folder, "train", context_length=CONTEXT, vocabulary_size=size)

    def work() -> None:
        with Encoder(folder, workers=1) as encoder:
            for ids in encoder.encode(Documents([str(folder / "corpus.jsonl")], text_field="text")):
                writer.add_document(ids)
        split.update({**writer.finish(), "skipped": 0})

    seconds = _seconds(work)
    describe_store(
        folder, splits={"train": split}, tokenizer="t", context_length=CONTEXT, vocabulary_size=size, eod=0
    )  # fmt: skip
    return f"{split['tokens'] / seconds:,.0f} tokens/s"


def _embed(folder: Path, settings: dict[str, Any], *, batches: int) -> str:
    from pydantic import TypeAdapter

    from megatron_specialm.clustering.encoders import fit_encoder
    from megatron_specialm.config.schema import Encoder
    from megatron_specialm.data.store import TokenStore
    from megatron_specialm.data.tokenizer import Tokenizer
    from megatron_specialm.stages.embed import Windows

    windows = Windows(TokenStore.open(folder, "train"), Tokenizer.load(folder))
    encoder = fit_encoder(
        TypeAdapter(Encoder).validate_python(settings), lambda count: windows.draw(count, seed=0), seed=0, threads=1
    )
    size = min(len(windows), 2_000 if batches else 256)
    rows = [np.arange(start, start + size) % len(windows) for start in range(0, max(batches, 1) * size, size)]
    tokens = sum(len(windows._store.window(int(i))) for part in rows for i in part)
    seconds = _seconds(lambda: [encoder.encode(windows.texts(part)) for part in rows])
    return f"{len(rows) * size / seconds:,.0f} windows ({tokens / seconds:,.0f} tokens)/s"


def embed_tfidf(folder: Path, args: argparse.Namespace) -> str:
    return _embed(folder, {"kind": "tfidf", "dimensions": 64, "sample": 5_000}, batches=3)


def embed_static(folder: Path, args: argparse.Namespace) -> str:
    return _embed(folder, {"kind": "static", "dimensions": DIMENSIONS}, batches=3)


def embed_minilm(folder: Path, args: argparse.Namespace) -> str:
    """A Sentence-BERT with all-MiniLM-L6-v2's shape and random weights, which do not affect its speed."""
    import torch
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.set_num_threads(1)
    text = (folder / "corpus.jsonl").read_text()[:3_000_000].lower()
    words = sorted(set(text.split()), key=len)[:30_000]
    model = folder / "minilm"
    model.mkdir()
    (model / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast.from_pretrained(model).save_pretrained(model)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    BertModel(BertConfig(vocab_size=len(words) + 5, **shape)).save_pretrained(model)
    layers = [models.Transformer(str(model), max_seq_length=256), models.Pooling(384)]
    SentenceTransformer(modules=layers, device="cpu").save(str(model / "sbert"), create_model_card=False)
    return _embed(folder, {"kind": "sentence-bert", "model": str(model / "sbert")}, batches=0)


def _vectors(args: argparse.Namespace) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(args.vectors, DIMENSIONS)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def kmeans_ours(folder: Path, args: argparse.Namespace) -> str:
    import faiss

    from megatron_specialm.clustering import kmeans

    faiss.omp_set_num_threads(1)
    vectors, iterations = _vectors(args), 8
    seconds = _seconds(lambda: kmeans.fit(vectors, k=K, iterations=iterations, seed=0, sample=args.vectors))
    return f"{seconds / (iterations + 1) / args.vectors * 1e6:.1f} s/iteration/M"


def kmeans_faiss(folder: Path, args: argparse.Namespace) -> str:
    """faiss's own k-means on the same vectors, for comparison."""
    import faiss

    faiss.omp_set_num_threads(1)
    vectors, iterations = _vectors(args), 8
    limits = {"max_points_per_centroid": len(vectors), "min_points_per_centroid": 1}
    theirs = faiss.Kmeans(DIMENSIONS, K, niter=iterations, seed=0, **limits)

    def work() -> None:
        theirs.train(vectors)
        theirs.index.search(vectors, 1)

    return f"{_seconds(work) / (iterations + 1) / args.vectors * 1e6:.1f} s/iteration/M"


def assign_clusters(folder: Path, args: argparse.Namespace) -> str:
    import faiss

    from megatron_specialm.clustering.kmeans import Centroids
    from megatron_specialm.clustering.routers import assign
    from megatron_specialm.clustering.vectors import Vectors, describe_vectors

    faiss.omp_set_num_threads(1)
    (folder / "vectors").mkdir()
    array = np.lib.format.open_memmap(
        folder / "vectors" / "train.npy", mode="w+", dtype=np.float32, shape=(args.vectors, DIMENSIONS)
    )
    rng = np.random.default_rng(0)
    for start in range(0, args.vectors, 16_384):
        array[start : start + 16_384] = rng.normal(size=array[start : start + 16_384].shape)
    array.flush()
    del array
    describe_vectors(folder / "vectors")
    centroids = rng.normal(size=(K, DIMENSIONS)).astype(np.float32)
    seconds = _seconds(lambda: assign(Vectors(folder / "vectors"), Centroids(centroids)))
    return f"{args.vectors / seconds:,.0f} windows/s"


def index_by_cluster(folder: Path, args: argparse.Namespace) -> str:
    """Join an assignment in 64 shards."""
    from megatron_specialm.data.clusters import order_type, sort_by_cluster

    share = args.windows // 64
    for number in range(64):
        clusters = np.random.default_rng(number).integers(0, K, share).astype(np.int32)
        np.save(folder / f"clusters.{number}.npy", clusters)
    parts = [np.load(folder / f"clusters.{number}.npy", mmap_mode="r") for number in range(64)]
    order = np.lib.format.open_memmap(
        folder / "order.npy", mode="w+", dtype=order_type(64 * share), shape=(64 * share,)
    )  # fmt: skip
    return f"{64 * share / _seconds(lambda: sort_by_cluster(parts, order, k=K)):,.0f} windows/s"


def open_store(folder: Path, args: argparse.Namespace) -> str:
    """Open a store of 256 shards. Its files are sparse files of the right size, so that only the opening is measured."""
    import struct

    from megatron_specialm.data.store import TokenStore, describe_store, join_shards

    share, shards = args.windows // 256, []
    for number in range(256):
        shard = folder / f"generic.{number:05d}"
        shard.mkdir()
        with (shard / "train.idx").open("wb") as file:
            file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, share, 2))
            file.seek(12 * share, os.SEEK_CUR)
            file.write(struct.pack("<qq", 0, share))
        with (shard / "train.bin").open("wb") as file:
            file.truncate(1_000)
        sizes = {name: (shard / name).stat().st_size for name in ("train.bin", "train.idx")}
        split = {"documents": 1, "windows": share, "tokens": 500, "skipped": 0, "bytes": sizes}
        settings: dict[str, Any] = {"tokenizer": "t", "context_length": CONTEXT, "vocabulary_size": 32_000, "eod": 0}
        describe_store(shard, splits={"train": split}, **settings)
        shards.append(shard)
    whole = folder / "generic"
    whole.mkdir()
    describe_store(whole, splits={"train": join_shards(shards, "train", store=whole)}, **settings)
    before = _private()
    start = time.perf_counter()
    store = TokenStore.open(whole, "train")
    assert len(store) == 256 * share
    seconds = time.perf_counter() - start
    return f"{seconds:.2f} s, {_private() - before:.1f} MiB more"


def _private() -> float:
    import psutil

    return psutil.Process().memory_full_info().uss / 2**20


MEASURED: dict[str, Callable[[Path, argparse.Namespace], str]] = {
    "tokenize": tokenize,
    "embed tfidf-64": embed_tfidf,
    "embed static-256": embed_static,
    "embed sentence-bert (MiniLM's shape)": embed_minilm,
    "k-means, 1024 x 256": kmeans_ours,
    "the same by faiss.Kmeans": kmeans_faiss,
    "assign, 1024 x 256": assign_clusters,
    "index by cluster": index_by_cluster,
    "open a store of 256 shards": open_store,
}

if __name__ == "__main__":
    main()
