"""
What the index costs: the time of a build (of texts whose embeddings cost nothing, and of pictures with a tiny model) and
of a search, beside the bare FAISS call, and of documents embedded at every slice end in one pass beside each of their
prefixes apart. With `--against` each is run in turns with another version of this library.

python benchmarks/retrieval.py --against ../other-version/src
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time


def tasks(items, dim, rows):
    """Functions without arguments, by name. Only what every version of the library has is used."""
    import faiss
    import numpy as np

    from hf_sugar import SugarEmbedder, SugarForConditionalGeneration, SugarIndex, SugarProcessor
    from hf_sugar.world import checkpoint, load_world

    def unit(n):
        x = np.random.default_rng(n).normal(size=(n, dim)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def build(*args, **kwargs):
        with tempfile.TemporaryDirectory() as directory:
            SugarIndex.build(*args, **kwargs, directory=directory)

    vectors, queries, bare = unit(items), unit(100), faiss.IndexFlatIP(dim)
    bare.add(vectors)
    index = SugarIndex(vectors, [{"id": str(n)} for n in range(items)])
    texts = [str(n) for n in range(items // 4)]
    path = str(checkpoint("llava"))
    model = SugarForConditionalGeneration.from_pretrained(path, dtype="float32").eval()
    embed = SugarEmbedder(model, SugarProcessor.from_pretrained(path))
    pictures = load_world("captions", "train", rows)
    slices = [s for r in pictures for s in (r["messages"][0]["content"][1]["text"], r["images"][0])]
    documents = [slices[n : n + 8] for n in range(0, len(slices), 8)]
    prefixes = [document[: n + 1] for document in documents for n in range(len(document))]
    return {
        "build, texts": lambda: build(texts, lambda batch: vectors[[int(text) for text in batch]], fingerprint="f"),
        "build, pictures": lambda: build(pictures, embed),
        "search": lambda: index.search(queries, 10),
        "search, FAISS alone": lambda: bare.search(queries, 10),
        "every slice end, one pass": lambda: embed.every_slice(documents),
        "every slice end, prefixes": lambda: embed(prefixes),
    }


def work(args):
    """Seconds of each task whose name is read."""
    functions = tasks(args.items, args.dim, args.rows)
    print(*functions, sep="|", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        functions[line.strip()]()
        print(time.perf_counter() - start, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=40_000, help="embeddings that are searched; a quarter is built")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--rows", type=int, default=256, help="pictures that are embedded")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--against", help="`src` directory of another version")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args)
    sources = [os.path.join(os.path.dirname(__file__), "..", "src"), *([args.against] if args.against else [])]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--work"],
            env={**os.environ, "PYTHONPATH": os.path.abspath(source)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for source in sources
    ]
    names = [worker.stdout.readline().strip().split("|") for worker in workers][0]
    for name in names:
        times = []
        for repeat in range(args.repeats + 1):
            seconds = []
            for worker in workers if repeat % 2 else workers[::-1]:  # each goes first as often as the other
                print(name, file=worker.stdin, flush=True)
                seconds.append(float(worker.stdout.readline()))
            times.append(seconds if repeat % 2 else seconds[::-1])
        here, *other = (statistics.median(column) for column in zip(*times[1:], strict=True))  # the first warms up
        ratio = "".join(f", other {1e3 * o:.1f} ms" for o in other)
        if other:
            ratio += f": {statistics.median(b / a for a, b in times[1:]):.2f} times as fast (median of pairs)"
        print(f"{name:28} {1e3 * here:8.1f} ms{ratio}", flush=True)
    for worker in workers:
        worker.stdin.close()


if __name__ == "__main__":
    main()
