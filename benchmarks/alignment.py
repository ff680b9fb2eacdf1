"""
Time of the alignment kernel: compiled, PyTorch, and what else there is.

    make kernels && python benchmarks/alignment.py
    python benchmarks/alignment.py --against path/to/another/checkout     # its PyTorch path, in turns with this one's

A row is `samples x slices x dim` with ragged lengths (uniform from 2 to the number of slices), two modalities and
`normalize="self+count"`; after a colon, so many prefixes are drawn of each sample. Every figure is a median in
milliseconds of runs that alternate between the implementations. "bare Gram" is the time of the inner products alone, with
the same halves and the same symmetry; nothing that computes them can be faster. Run it on a machine that does nothing else.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from hf_sugar.alignment import compiled_kernel, label_matrix, packed_alignment_kernel


CASES = ["64x8x1536", "256x8x1536", "512x16x1536", "64x64x1536", "64x64x1536:4", "64x16x1536:4"]
# Label matrices of the demo: an image and its caption, both prefixes of each; four prefixes of longer samples.
LABELS = ["captions", "conversations"]
TSLEARN = "64x12x1536"


def inputs_of(case: str) -> dict:
    """Random packed samples as keyword arguments of `packed_alignment_kernel`."""
    shape, _, drawn = {"captions": "32x2x256:2", "conversations": "24x12x256:4"}.get(case, case).partition(":")
    samples, slices, dim = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, slices + 1, (samples,), generator=generator)
    x = torch.randn(int(lengths.sum()), dim, generator=generator) + 0.7 * torch.randn(1, dim, generator=generator)
    half = dim // 2
    sample = torch.arange(samples).repeat_interleave(int(drawn or 1))
    length = lengths[sample]
    if case == "captions":
        length = torch.arange(len(sample)) % 2 + 1
    elif drawn:
        length = (torch.rand(len(sample), generator=generator) * length).long() + 1
    return {
        "embeddings": torch.cat([F.normalize(x[:, :half], dim=1), F.normalize(x[:, half:], dim=1)], dim=1),
        "offsets": F.pad(lengths.cumsum(0), (1, 0)),
        "prefixes": torch.stack([sample, length], dim=1),
        "modality": torch.randint(0, 2, (len(x),), generator=generator),
        "split": half,
    }


def gram_products(inputs: dict) -> dict[str, Callable[[], None]]:
    """The inner products that the kernel needs, in pieces of several sizes, of which the fastest counts."""
    x, text, half = inputs["embeddings"], inputs["modality"] == 0, inputs["split"]
    uni = [x[text, :half].contiguous(), x[~text, :half].contiguous()]
    cross = [x[text, half:].contiguous(), x[~text, half:].contiguous()]

    def products(size: int):
        for part in uni:
            blocks = part.split(size)
            for i, block in enumerate(blocks):
                for other in blocks[i:]:
                    block @ other.T
        cross[0] @ cross[1].T

    return {f"Gram {size}": partial(products, size) for size in (128, 256, 512, 1024, 1 << 30)}


def tslearn_kernels(inputs: dict) -> dict[str, Callable[[], object]]:
    from tslearn.metrics import cdist_gak
    from tslearn.utils import to_time_series_dataset

    starts, prefixes = inputs["offsets"].tolist(), inputs["prefixes"].tolist()
    series = to_time_series_dataset([inputs["embeddings"][starts[s] : starts[s] + n].numpy() for s, n in prefixes])
    return {f"tslearn {jobs}": partial(cdist_gak, series, sigma=2.0, n_jobs=jobs) for jobs in (1, 2)}


def pytorch_path(case: str) -> Callable[[], object]:
    if case in LABELS:
        return partial(label_matrix, **inputs_of(case))
    return partial(packed_alignment_kernel, **inputs_of(case), normalize="self+count", backend="torch")


def milliseconds(function: Callable[[], object]) -> float:
    """Of one call, after others that are not timed, so that none finds the caches as another left them."""
    end = time.perf_counter() + 0.03
    while True:
        start = time.perf_counter()
        function()
        now = time.perf_counter()
        if now > end:
            return 1e3 * (now - start)


def alternate(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(milliseconds(function))
    return {name: statistics.median(values) for name, values in times.items()}


def compare(cases: list[str], checkouts: list[Path], repeats: int):
    """A process for each checkout, which times one call of its PyTorch path for each line that it is sent."""
    environment = {**os.environ, "HF_SUGAR_KERNELS": "torch"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            env={**environment, "PYTHONPATH": str(path / "src")},
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True},
        )
        for path in checkouts
    ]
    print("| case | PyTorch here | there | ratio |\n|---|---|---|---|")
    for case in cases:
        times = [[] for _ in workers]
        for _ in range(repeats):
            for worker, values in zip(workers, times, strict=True):
                print(case, file=worker.stdin, flush=True)
                values.append(float(worker.stdout.readline()))
        here, there = map(statistics.median, times)
        print(f"| {case} | {here:.1f} | {there:.1f} | {here / there:.2f} |", flush=True)
    for worker in workers:
        worker.communicate()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="samples x slices x dim [: prefixes]")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-tslearn", action="store_true", help="leave out tslearn, which takes most of the time")
    parser.add_argument("--against", type=Path, help="a checkout whose PyTorch path takes turns with this one's")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        functions = {}
        for case in map(str.strip, sys.stdin):
            functions[case] = functions.get(case) or pytorch_path(case)
            print(milliseconds(functions[case]), flush=True)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {arguments.repeats} runs, ms\n")
    if arguments.against:
        compare(
            [*arguments.cases, *LABELS], [Path(__file__).resolve().parents[1], arguments.against], arguments.repeats
        )
        return
    if compiled_kernel("cpu", "local") is None:
        raise SystemExit("error: nothing is built: run `make kernels`")
    print("| case | slices | compiled | bare Gram | ratio | PyTorch | tslearn |\n|---|---|---|---|---|---|---|")
    for case in [*arguments.cases, *([] if arguments.no_tslearn else [TSLEARN])]:
        inputs = inputs_of(case)
        functions = gram_products(inputs)
        functions["compiled"] = partial(packed_alignment_kernel, **inputs, normalize="self+count", backend="local")
        functions["PyTorch"] = pytorch_path(case)
        functions |= tslearn_kernels(inputs) if case == TSLEARN and not arguments.no_tslearn else {}
        times = alternate(functions, arguments.repeats)
        gram, tslearn = (min((times[n] for n in times if n.startswith(k)), default=None) for k in ("Gram", "tslearn"))
        print(
            f"| {case} | {len(inputs['embeddings'])} | {times['compiled']:.2f} | {gram:.2f} | "
            f"{times['compiled'] / gram:.2f} | {times['PyTorch']:.1f} | "
            + (f"{tslearn:.0f} ({tslearn / times['compiled']:.0f}x) |" if tslearn else "|"),
            flush=True,
        )


if __name__ == "__main__":
    main()
