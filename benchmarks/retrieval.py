"""
What the index costs: the time of `SugarIndex.search` over the bare FAISS call, and the time of embedding documents at
every slice end in one pass against embedding each of their prefixes apart.

python benchmarks/retrieval.py
"""

import argparse
import statistics
import time

import faiss
import numpy as np
import torch

from hf_sugar import SugarForConditionalGeneration, SugarIndex, SugarProcessor
from hf_sugar.retrieval import SugarEmbedder
from hf_sugar.world import checkpoint, load_world


def alternate(first, second, repeats):
    """Median seconds of both, and of their ratio; they take turns, so that other work on the machine meets both."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        times.append((middle - start, time.perf_counter() - middle))
    del times[0]  # warm-up
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    return a, b, statistics.median(y / x for x, y in times)


def search(args):
    rng = np.random.default_rng(0)
    items, queries = (rng.normal(size=(n, args.dim)).astype(np.float32) for n in (args.items, args.queries))
    items, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (items, queries))
    bare = faiss.IndexFlatIP(args.dim)
    bare.add(items)
    index = SugarIndex(items, [{"id": str(n)} for n in range(args.items)])
    scores, positions = bare.search(queries, args.k)
    found = index.search(queries, args.k)
    same = [[(hit.index, hit.score) for hit in hits] for hits in found] == [
        list(zip(*row, strict=True)) for row in zip(positions.tolist(), scores.tolist(), strict=True)
    ]
    a, b, ratio = alternate(lambda: bare.search(queries, args.k), lambda: index.search(queries, args.k), args.repeats)
    print(f"flat search, {args.items} x {args.dim}, {args.queries} embedded queries, k={args.k}, same hits: {same}")
    print(
        f"  FAISS {1e3 * a:.1f} ms, SugarIndex {1e3 * b:.1f} ms, overhead {100 * (ratio - 1):+.1f}% (median of pairs)"
    )
    # what is added to the FAISS call itself, without the noise of that call
    index._nearest = lambda queries, k: (scores, positions)
    start = time.perf_counter()
    for _ in range(20):
        index.search(queries, args.k)
    print(f"  all that is not FAISS: {1e3 * (time.perf_counter() - start) / 20:.2f} ms")


def slices(args):
    model = SugarForConditionalGeneration.from_pretrained(str(checkpoint("llava")), dtype=torch.float32).eval()
    processor = SugarProcessor.from_pretrained(str(checkpoint("llava")))
    rows = load_world("captions", "train", 4 * args.documents)
    documents = []
    for n in range(args.documents):
        four = [rows[4 * n + i] for i in range(4)]
        documents.append([s for r in four for s in (r["messages"][0]["content"][1]["text"], r["images"][0])])
    prefixes = [document[: n + 1] for document in documents for n in range(8)]
    embed = SugarEmbedder(model, processor, batch_size=args.batch_size)
    difference = np.abs(np.concatenate(embed.every_slice(documents)) - embed(prefixes)).max()
    a, b, ratio = alternate(lambda: embed.every_slice(documents), lambda: embed(prefixes), args.repeats)
    print(f"{args.documents} documents of 8 slices, batches of {args.batch_size}")
    print(f"  every slice end in one pass {a:.2f} s, 8 prefixes apart {b:.2f} s: {ratio:.2f} times")
    print(f"  largest difference of a component {difference:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    search(args)
    slices(args)


if __name__ == "__main__":
    main()
