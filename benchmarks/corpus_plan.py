"""
The plan of docs/scale.md for a corpus that many machines embed, at a thousandth of its size: each machine writes an index of
its part, the parts are put together, and indexes of several kinds are compared in bytes, time and recall; then documents are
added. Bytes and times of the whole corpus are these times the scale. The embeddings are drawn, not a model's: topics with
noise around them and a falling spectrum, so that the first 256 of 768 dimensions hold most of it. A model's own recall has to
be measured on its own embeddings.

    python benchmarks/corpus_plan.py                                  # 100,000 documents for 100 million
    python benchmarks/corpus_plan.py --documents 2000 --machines 2    # only to see that it runs
"""

import argparse
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np

from hf_sugar.retrieval import SugarIndex


GIB = 2**30


def corpus(count: int, dim: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    spectrum = np.arange(1, dim + 1) ** -0.5
    topics = random.standard_normal((max(2, count // 100), dim)) * spectrum
    x = topics[random.integers(len(topics), size=count)] + 0.7 * random.standard_normal((count, dim)) * spectrum
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def cut(x: np.ndarray, dim: int) -> np.ndarray:
    return np.ascontiguousarray(x[:, :dim] / np.linalg.norm(x[:, :dim], axis=1, keepdims=True))


def timed(function, *args, **kwargs):
    start = time.perf_counter()
    value = function(*args, **kwargs)
    return value, time.perf_counter() - start


def size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--scale", type=int, default=1000, help="times so many documents in the corpus")
    parser.add_argument("--machines", type=int, default=10)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--queries", type=int, default=200)
    args = parser.parse_args()
    faiss.omp_set_num_threads(1)
    count, dim, short = args.documents, args.dim, args.dim // 3
    x = corpus(count + count // 100 + args.queries, dim)
    documents, added, queries = np.split(x, [count, count + count // 100])
    truth = faiss.knn(queries, documents, 10, metric=faiss.METRIC_INNER_PRODUCT)[1]

    def embed(items):
        return x[[int(item) for item in items]]

    print(f"{count:,} documents of {dim} dimensions, for {args.scale * count:,}; 1 thread")
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        parts = [directory / f"part-{n}" for n in range(args.machines)]
        began = time.perf_counter()
        for part, numbers in zip(parts, np.array_split(np.arange(count), args.machines)):
            SugarIndex.build(list(map(str, numbers)), embed, fingerprint="drawn", directory=part)
        seconds = time.perf_counter() - began
        print(
            f"parts written: {1e6 * seconds / count:.0f} us a document beside the model, {size(directory) / count:.0f} bytes"
        )
        index, seconds = timed(SugarIndex.merge, parts, directory / "whole")
        print(f"{args.machines} parts put together: {seconds:.1f} s, {1e6 * seconds / count:.0f} us a document")
        assert len(index) == count and np.array_equal(index.embeddings, documents)

        clusters = 2 ** round(np.log2(2 * count**0.5))
        kinds = [(dim, "SQfp16"), (short, "SQ8"), (dim, f"IVF{clusters},SQfp16"), (short, f"IVF{clusters},SQ8")]
        kinds += [
            (dim, "HNSW32_SQfp16"),
            (dim, f"IVF{clusters},PQ{dim // 12}"),
            (short, f"IVF{clusters},PQ{short // 4}"),
        ]
        print("\n| index | built (s) | bytes a document | GiB of the corpus | ms a query | recall@10 | 1% added (s) |")
        print("|---|---|---|---|---|---|---|")
        for width, factory in kinds:
            vectors, asked = cut(documents, width), cut(queries, width)
            index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
            _, trained = timed(index.train, vectors)
            _, filled = timed(index.add, vectors)
            if factory.startswith("IVF"):
                index.nprobe = max(1, clusters // 32)
            (_, found), seconds = timed(index.search, asked, 10)
            recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth)])
            bytes_each = len(faiss.serialize_index(index)) / count
            _, more = timed(index.add, cut(added, width))
            print(
                f"| {width} x {factory} | {trained + filled:.1f} | {bytes_each:.0f} | "
                f"{bytes_each * count * args.scale / GIB:.0f} | {1e3 * seconds / len(asked):.2f} | {recall:.3f} | {more:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
