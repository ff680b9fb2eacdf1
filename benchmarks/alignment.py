"""
Time and memory of the alignment kernel: compiled, PyTorch, and what else there is.

    make kernels && python benchmarks/alignment.py

One table. A row is `samples x slices x dim` with ragged lengths (uniform from 2 to the number of slices), two
modalities and `normalize="self+count"`; every figure is the median of `--repeats` runs at least that alternate between
the implementations. "bare Gram" is the BLAS time of the inner products alone, with the same halves and the same symmetry;
nothing that computes them can be faster. Memory is what one call adds to the resident memory; for PyTorch, whose
allocator keeps what it frees, it is also what its tensors take. Run it on a machine that does nothing else.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from hf_sugar.alignment import kernel, packed_alignment_kernel


HUB_KERNELS = Path(__file__).resolve().parents[1] / "hub_kernels"
sys.path.insert(0, str(HUB_KERNELS / "gak" / "benchmarks"))

from common import gen_inputs  # noqa: E402


CASES = {"64x8x1536": None, "256x8x1536": None, "512x16x1536": None, "64x64x1536": 4}
# One sample with all its prefixes: of this, the memory only.
LONG = "1x300x1536"
OPTIONS = {"delta": 1.0, "normalize": "self+count"}
# Seconds, and how often a turn times what is not slow.
SLOW, WARM, ROUNDS = 1, 0.03, 3


def inputs_of(case: str) -> dict:
    samples, slices, dim = map(int, case.split("x"))
    inputs = gen_inputs(samples, slices, dim, CASES.get(case), shortest=slices if case == LONG else 2)
    if case == LONG:
        inputs["prefixes"] = torch.cartesian_prod(torch.arange(samples), torch.arange(1, slices + 1))
    half = dim // 2
    x = inputs["embeddings"]
    inputs["embeddings"] = torch.cat([F.normalize(x[:, :half], dim=1), F.normalize(x[:, half:], dim=1)], dim=1)
    return inputs


def gram_products(inputs: dict) -> dict[str, Callable[[], None]]:
    x, text, half = inputs["embeddings"], inputs["modality"] == 0, inputs["split"]
    uni = [x[text, :half].contiguous(), x[~text, :half].contiguous()]
    cross = [x[text, half:].contiguous(), x[~text, half:].contiguous()]

    def blocked(size: int):
        for part in uni:
            blocks = part.split(size)
            for i, block in enumerate(blocks):
                for other in blocks[i:]:
                    block @ other.T
        cross[0] @ cross[1].T

    return {str(size): lambda size=size: blocked(size) for size in (128, 256, 512, 1024, 1 << 30)}


def alternate(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """
    Medians in milliseconds. A timed call follows calls of the same function, for `WARM` seconds, that are not timed: none
    finds the caches as another left them, or the second core asleep after a long call with one thread. What takes more
    than `SLOW` seconds does not notice, and is called once a turn; the others, which any disturbance shows in, are timed
    `ROUNDS` times as often.
    """

    def run(name):
        start = time.perf_counter()
        functions[name]()
        return 1e3 * (time.perf_counter() - start)

    slow = {name for name in functions if run(name) > 1e3 * SLOW}
    times = {name: [] for name in functions}
    for turn in range(repeats * ROUNDS):
        for name in functions:
            if name in slow and turn % ROUNDS:
                continue
            end = time.perf_counter() + (0 if name in slow else WARM)
            while time.perf_counter() < end:
                run(name)
            times[name].append(run(name))
    return {name: statistics.median(values) for name, values in times.items()}


def tslearn_kernels(inputs: dict) -> dict[str, Callable[[], None]]:
    from tslearn.metrics import cdist_gak
    from tslearn.utils import to_time_series_dataset

    starts = inputs["offsets"].tolist()
    series = to_time_series_dataset(
        [inputs["embeddings"][starts[s] : starts[s] + n].numpy() for s, n in inputs["prefixes"].tolist()]
    )
    return {f"tslearn {jobs}": lambda jobs=jobs: cdist_gak(series, sigma=2.0, n_jobs=jobs) for jobs in (1, 2)}


def pysdtw_pairs(inputs: dict) -> Callable[[], None]:
    import pysdtw

    starts = inputs["offsets"].tolist()
    sequences = [inputs["embeddings"][starts[s] : starts[s] + n] for s, n in inputs["prefixes"].tolist()]
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    i, j = torch.triu_indices(len(padded), len(padded))
    soft = pysdtw.SoftDTW(gamma=1.0, use_cuda=False)
    return lambda: soft(padded[i], padded[j])


def pytorch_recursion(distances: torch.Tensor, inputs: dict) -> Callable[[], None]:
    sample, length = inputs["prefixes"].numpy().T
    start = inputs["offsets"].numpy()[sample]
    i, j = np.triu_indices(len(sample))
    n, m = length[i], length[j]
    return lambda: kernel._log_kernels(
        distances, start[i], start[j], n, m, n + m, OPTIONS["delta"], kernel._Scratch(kernel.CHUNK_CELLS)
    )


def peak_extra_memory(case: str, backend: str, dtype: str = "float32") -> dict[str, float]:
    command = [sys.executable, __file__, "--memory", case, backend, dtype]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(case: str, backend: str, dtype: str):
    """In a process of its own: what one call adds to the resident memory at its peak, in MB (Linux)."""

    def resident(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    def inputs_in_dtype(case: str) -> dict:
        inputs = inputs_of(case)
        return inputs | {"embeddings": inputs["embeddings"].to(getattr(torch, dtype))}

    # What a process takes once, such as the pages of BLAS's code, is no part of a call.
    packed_alignment_kernel(**inputs_in_dtype("32x8x1536"), **OPTIONS, backend=backend)
    inputs = inputs_in_dtype(case)
    # What the allocator keeps of what was freed would hide what the call takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    packed_alignment_kernel(**inputs, **OPTIONS, backend=backend)
    peak = resident("VmHWM") - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        packed_alignment_kernel(**inputs, **OPTIONS, backend=backend)
    steps = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    slices, prefixes = len(inputs["embeddings"]), len(inputs["prefixes"])
    limit = (inputs["embeddings"].nbytes + 4 * (slices**2 + prefixes**2)) / 2**20
    print(json.dumps({"peak": peak, "tensors": max(accumulate(steps)) / 2**20, "inputs, output and Gram": limit}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="samples x slices x dim")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-tslearn", action="store_true", help="leave out tslearn, which takes most of the time")
    parser.add_argument(
        "--memory", nargs=3, metavar=("CASE", "BACKEND", "DTYPE"), help="print what one call takes, in MB, and stop"
    )
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory(*arguments.memory)
        return
    # Imported here, so that the memory of a process without it can be measured.
    from kernels import get_local_kernel

    torch.set_num_threads(arguments.threads)
    gak = get_local_kernel(Path(os.environ.get("HF_SUGAR_KERNEL_PATH", HUB_KERNELS / "gak")), backend="cpu")
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "?",
    )
    print(
        f"{model}, {arguments.threads} threads, torch {torch.__version__}, medians of {arguments.repeats} runs "
        f"({arguments.repeats * ROUNDS} of what takes less than {SLOW} s), ms\n"
    )
    columns = [
        "case",
        "slices",
        "compiled",
        "bare Gram",
        "ratio",
        "PyTorch",
        "tslearn",
        "pysdtw",
        "recursion: compiled",
        "PyTorch",
        "extra MB (limit)",
        "PyTorch MB: tensors / resident",
    ]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for case in arguments.cases:
        inputs = inputs_of(case)
        functions: dict[str, Callable[[], object]] = {
            "compiled": partial(gak.packed_alignment_kernel, **inputs, **OPTIONS),
            "torch": partial(packed_alignment_kernel, **inputs, **OPTIONS, backend="torch"),
        }
        grams = gram_products(inputs)
        functions |= grams
        distances = gak._squared_distances(inputs["embeddings"], inputs["modality"], inputs["split"])
        some = {name: inputs[name] for name in ("offsets", "prefixes")}
        functions["recursion"] = partial(gak.recursion, distances, **some, normalize=None)
        functions["torch recursion"] = pytorch_recursion(distances, inputs)
        if not arguments.no_tslearn:
            functions |= tslearn_kernels(inputs)
        if case == "64x8x1536" and importlib.util.find_spec("pysdtw"):
            functions["pysdtw"] = pysdtw_pairs(inputs)
        times = alternate(functions, arguments.repeats)
        floor = min(times[name] for name in grams)
        tslearn = [times[name] for name in times if name.startswith("tslearn")]
        memory, torch_memory = (peak_extra_memory(case, backend) for backend in ("local", "torch"))
        row = [
            case,
            str(len(inputs["embeddings"])),
            f"{times['compiled']:.2f}",
            f"{floor:.2f}",
            f"{times['compiled'] / floor:.2f}",
            f"{times['torch']:.1f}",
            f"{min(tslearn):.0f}" if tslearn else "-",
            f"{times['pysdtw']:.0f}" if "pysdtw" in times else "-",
            f"{times['recursion']:.2f}",
            f"{times['torch recursion']:.1f}",
            f"{memory['peak']:.0f} ({1.5 * memory['inputs, output and Gram']:.0f})",
            f"{torch_memory['tensors']:.0f} / {torch_memory['peak']:.0f}",
        ]
        print("| " + " | ".join(row) + " |", flush=True)

    ragged = inputs_of("64x12x1536")
    functions = {"compiled": lambda: gak.packed_alignment_kernel(**ragged, **OPTIONS)}
    if not arguments.no_tslearn:
        functions |= tslearn_kernels(ragged)
        times = alternate(functions, arguments.repeats)
        best = min(times["tslearn 1"], times["tslearn 2"])
        print(
            f"\n64 ragged samples of at most 12 slices: {times['compiled']:.2f}, tslearn {best:.0f}, {best / times['compiled']:.0f}x"
        )

    far = inputs_of(arguments.cases[0])
    near = far | {"embeddings": far["embeddings"] * 0.02 + 1 / 40}
    times = alternate(
        {
            f"{name} {backend}": partial(packed_alignment_kernel, **inputs, **OPTIONS, backend=backend)
            for name, inputs in {"far": far, "near": near}.items()
            for backend in ("local", "torch")
        },
        arguments.repeats,
    )
    slower = {backend: times[f"near {backend}"] / times[f"far {backend}"] for backend in ("local", "torch")}
    print(
        f"\n{arguments.cases[0]}, all slices nearly equal: compiled {slower['local']:.1f} times as long, "
        f"PyTorch {slower['torch']:.1f}"
    )
    memory = {backend: peak_extra_memory(arguments.cases[0], backend, "bfloat16") for backend in ("local", "torch")}
    print(
        f"{arguments.cases[0]} in bfloat16, extra MB: compiled {memory['local']['peak']:.1f}, "
        f"PyTorch {memory['torch']['tensors']:.1f} (tensors), "
        f"limit {1.5 * memory['local']['inputs, output and Gram']:.1f}"
    )
    for dtype in ("float32", "bfloat16"):
        memory = peak_extra_memory(LONG, "local", dtype)
        print(
            f"{LONG}, all prefixes, in {dtype}, extra MB: compiled {memory['peak']:.1f}, "
            f"limit {1.5 * memory['inputs, output and Gram']:.1f}"
        )

    many = {count: gen_inputs(256, 8, 64, count // 256) for count in (256, 2048)}
    functions = {}
    for count, inputs in many.items():
        distances = gak._squared_distances(inputs["embeddings"], inputs["modality"], inputs["split"])
        functions[str(count)] = lambda distances=distances, inputs=inputs: gak.recursion(
            distances, inputs["offsets"], inputs["prefixes"], normalize=None
        )
    times = alternate(functions, arguments.repeats)
    per_pair = {count: 1e6 * times[str(count)] / (count * (count + 1) / 2) for count in many}
    cells = {count: float(inputs["prefixes"][:, 1].double().mean()) ** 2 for count, inputs in many.items()}
    print("recursion per pair: " + ", ".join(f"P={n}: {per_pair[n]:.0f} ns ({cells[n]:.1f} cells)" for n in many))


if __name__ == "__main__":
    main()
