import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tslearn.metrics import cdist_gak, unnormalized_gak

from hf_sugar.alignment import (
    IMAGE,
    TEXT,
    expected_alignment,
    global_alignment_kernel,
    kernel,
    label_matrix,
    log_delannoy,
    packed_alignment_kernel,
)


MODES = (None, "self", "count", "self+count")


def alignments(n, m, cell=(0, 0)):
    if cell == (n - 1, m - 1):
        yield [cell]
        return
    for step in ((0, 1), (1, 0), (1, 1)):
        following = (cell[0] + step[0], cell[1] + step[1])
        if following[0] < n and following[1] < m:
            for rest in alignments(n, m, following):
                yield [cell, *rest]


def local_kernel(a, b, sigma, codes=None, split=None):
    """Cuturi's local kernel in float64, on the half that the two modalities call for."""
    a, b = a.double(), b.double()
    if codes is not None:
        half = slice(None, split) if codes[0] == codes[1] else slice(split, None)
        a, b = a[half], b[half]
    phi = float((a / a.norm() - b / b.norm()).square().sum())
    return math.exp(-(phi / (2 * sigma**2) + math.log(2 - math.exp(-phi / (2 * sigma**2)))))


def local_matrix(x, y, sigma, cx=None, cy=None, split=None):
    return [
        [local_kernel(a, b, sigma, None if cx is None else (int(cx[i]), int(cy[j])), split) for j, b in enumerate(y)]
        for i, a in enumerate(x)
    ]


def enumerated(x, y, delta=1.0, normalize=None, cx=None, cy=None, split=None):
    """The kernel from a list of all its alignments."""
    n, m = len(x), len(y)
    sigma = delta * math.sqrt((n + m) / 2)

    def total(a, b, ca, cb):
        k = local_matrix(a, b, sigma, ca, cb, split)
        paths = list(alignments(len(a), len(b)))
        value = sum(math.prod(k[i][j] for i, j in path) for path in paths)
        return value / len(paths) if normalize in ("count", "self+count") else value

    value = total(x, y, cx, cy)
    if normalize in ("self", "self+count"):
        value /= math.sqrt(total(x, x, cx, cx) * total(y, y, cy, cy))
    return value


def sequences(lengths, dim=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, dim, generator=generator, dtype=dtype) for length in lengths]


def codes(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 2, (length,), generator=generator) for length in lengths]


def pack(samples):
    offsets = torch.tensor([0, *np.cumsum([len(sample) for sample in samples]).tolist()])
    return torch.cat(samples), offsets


def with_cosines(n, m, cross, inner=0.3):
    """Two sequences of which all slices have the same cosine within, and the same across."""
    gram = torch.full((n + m, n + m), cross, dtype=torch.float64)
    gram[:n, :n] = gram[n:, n:] = inner
    factor = torch.linalg.cholesky(gram.fill_diagonal_(1))
    return factor[:n], factor[n:]


# The kernel against independent computations


@pytest.mark.parametrize("normalize", MODES)
@pytest.mark.parametrize("delta", [0.4, 2.0])
@pytest.mark.parametrize("triple", [False, True])
def test_equals_the_sum_over_all_alignments(normalize, delta, triple):
    lengths = (1, 2, 3, 5, 4)
    x, split = sequences(lengths), 4 if triple else None
    c = codes(lengths) if triple else [None] * len(x)
    value = global_alignment_kernel(x, delta=delta, normalize=normalize, modality_x=c if triple else None, split=split)
    expected = [
        [enumerated(a, b, delta, normalize, ca, cb, split) for b, cb in zip(x, c, strict=True)]
        for a, ca in zip(x, c, strict=True)
    ]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)

    rectangular = global_alignment_kernel(
        x[:2],
        x[2:],
        delta=delta,
        normalize=normalize,
        modality_x=c[:2] if triple else None,
        modality_y=c[2:] if triple else None,
        split=split,
    )
    torch.testing.assert_close(rectangular, value[:2, 2:], rtol=1e-10, atol=0)


@pytest.mark.parametrize("lengths", [(1, 3, 12, 12, 7, 30), (600, 300, 3, 1)])
@pytest.mark.parametrize("delta", [0.1, 1.0, 100.0])
def test_float32_is_close_to_float64(lengths, delta):
    x = sequences(lengths, dim=64)
    for normalize in MODES:
        options = {"delta": delta, "normalize": normalize, "log": True, "backend": "torch"}
        exact = global_alignment_kernel(x, **options)
        value = global_alignment_kernel([s.float() for s in x], **options)
        assert value.dtype == torch.float32
        assert ((value - exact).abs() / exact.abs().clamp(min=1)).max() <= 1e-5
        if normalize == "count":
            assert value.max() <= 1e-6


@pytest.mark.parametrize("factor", [1e20, 1e-25, 1e-40])
def test_scale_of_slices_does_not_matter(factor):
    x = sequences((1, 3, 2), dtype=torch.float32)
    options = {"modality_x": codes((1, 3, 2)), "split": 3, "backend": "torch"}
    value = global_alignment_kernel([s * factor for s in x], **options)
    torch.testing.assert_close(
        value, global_alignment_kernel(x, **options), rtol=0, atol=1e-3 if factor == 1e-40 else 1e-6
    )


@pytest.mark.parametrize("triple", [False, True])
def test_triangles_of_many_slices(monkeypatch, triple):
    """Blocks that are cut in two give the values and the gradient of whole ones."""
    lengths = (9, 3, 12, 1, 8, 7, 10)
    embeddings, offsets = pack(sequences(lengths, dim=6))
    prefixes = torch.stack([torch.arange(len(lengths)), torch.tensor(lengths)], dim=1)
    options = {"modality": torch.cat(codes(lengths)), "split": 3} if triple else {}
    results = []
    for size in (1000, 4):
        monkeypatch.setattr(kernel, "SQUARE", size)
        x = embeddings.clone().requires_grad_()
        value = packed_alignment_kernel(x, offsets, prefixes, backend="torch", **options)
        value[0, 2:].sum().backward()
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("triple", [False, True])
@pytest.mark.parametrize(
    ("samples", "slices", "dim", "every", "noise"),
    [
        (128, 8, 512, False, 1),
        (128, 8, 512, False, 0.1),  # all nearly equal, and compared in float64
        (64, 8, 1536, False, 1),
        # every prefix: the output is as large as the Gram matrix, and self-kernels are as many as pairs
        (1, 20, 512, True, 1),
        (2, 200, 64, False, 1),  # more cells than anything else
    ],
)
def test_memory(samples, slices, dim, every, noise, triple, dtype, other):
    """No more than 1.5 times the inputs, the output and the matrix of inner products."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, slices + 1, (samples,), generator=generator) if samples > 2 else [slices] * samples
    embeddings, offsets = pack(sequences(list(map(int, lengths)), dim=dim, dtype=torch.float32))
    embeddings = (noise * embeddings + 1 - noise).to(dtype)
    options = {"modality": torch.randint(0, 2, (len(embeddings),), generator=generator), "split": dim // 2}
    prefixes = torch.tensor([[s, n] for s, m in enumerate(lengths) for n in (range(1, m + 1) if every else [m])])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        value = packed_alignment_kernel(
            *(embeddings, offsets, prefixes, prefixes[::2] if other else None),
            normalize="self+count",
            backend="torch",
            **options if triple else {},
        )
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    limit = 1.5 * (embeddings.nbytes + value.nbytes + 4 * len(embeddings) ** 2)
    assert 0.2 * limit < peak < limit


MEMORY = """
import ctypes, sys
from pathlib import Path

import torch
from hf_sugar.alignment import packed_alignment_kernel


def call(samples, slices, dim, every, dtype, other=False, triple=True, ragged=False):
    # Ragged ones are nearly equal too, which takes more memory.
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, slices + 1, (samples,), generator=generator) if ragged else torch.full((samples,), slices)
    offsets = torch.cat([torch.tensor([0]), lengths.cumsum(0)])
    x = torch.randn(int(offsets[-1]), dim, generator=generator)
    x = (1 + 0.03 * x if ragged else x).to(dtype)
    rows = torch.tensor([[s, n] for s in range(samples) for n in range(1 if every else lengths[s], lengths[s] + 1)])
    options = {"modality": torch.arange(len(x)) % 2, "split": dim // 2} if triple else {}
    arguments = x, offsets, rows, rows[::2].contiguous() if other else None
    return x, lambda: packed_alignment_kernel(*arguments, normalize="self+count", backend="torch", **options)


def limit(x, value):
    return 1.5 * (x.nbytes + value.nbytes + value.element_size() * len(x) ** 2)

"""

RESIDENT = """
def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


call(32, 8, 1536, False, torch.float32)[1]()
x, measured = call(*map(int, sys.argv[1:5]), getattr(torch, sys.argv[5]))
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
value = measured()
print(status("VmHWM") - before, limit(x, value))
"""

HELD = """
libc = ctypes.CDLL(None)
libc.heap_held.restype = libc.heap_most.restype = ctypes.c_long
for dtype in torch.float32, torch.bfloat16, torch.float64:
    for other in False, True:
        for triple in False, True:
            x, measured = call(*map(int, sys.argv[1:5]), dtype, other, triple, len(sys.argv) > 5)
            # The first call makes what stays with BLAS and in caches.
            measured()
            before = libc.heap_held()
            libc.heap_reset()
            value = measured()
            print(libc.heap_most() - before, limit(x, value))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read where Linux shows it")
@pytest.mark.parametrize(
    "case",
    [
        ("96", "16", "128", "1", "float32"),
        ("96", "16", "128", "1", "bfloat16"),
        ("256", "8", "1536", "0", "float32"),
        ("2", "600", "1536", "0", "float32"),
        ("2", "1000", "64", "0", "float32"),
    ],
)
def test_resident_memory(case):
    """The same of what the process takes: the allocator's rest, numpy and Python included."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY + RESIDENT, *case], capture_output=True, text=True, check=True
    )
    peak, limit = map(float, result.stdout.split())
    assert 0.1 * limit < peak < limit


@pytest.fixture(scope="module")
def counted_heap(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or platform.libc_ver()[0] != "glibc":
        pytest.skip("needs a C compiler and glibc, whose allocator is counted")
    library = tmp_path_factory.mktemp("heap") / "heap.so"
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", Path(__file__).with_name("heap.c"), "-o", library], check=True
    )
    return {**os.environ, "LD_PRELOAD": str(library), "PYTHONMALLOC": "malloc"}


def held(counted_heap, case):
    command = [sys.executable, "-c", MEMORY + HELD, *case]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=counted_heap)
    peaks = [[float(number) for number in line.split()] for line in result.stdout.splitlines()]
    assert len(peaks) == 12
    return peaks


@pytest.mark.parametrize(
    "case",
    [
        ("32", "4", "64", "0"),  # nothing but small objects
        ("16", "8", "128", "1"),
        ("64", "8", "64", "0"),
        ("64", "8", "1536", "0"),
        ("2", "400", "64", "0"),
        ("40", "8", "64", "1"),
        ("1", "60", "1536", "1"),
        ("64", "8", "1536", "0", "ragged"),
        ("40", "8", "64", "1", "ragged"),
    ],
)
def test_held_memory(counted_heap, case):
    """The same of all that is allocated, tensors or not, down to small inputs."""
    for peak, limit in held(counted_heap, case):
        assert 0.2 * limit < peak < limit


def test_memory_that_does_not_grow(counted_heap):
    """What the objects of a call take, beside which the limit of the smallest inputs is nothing."""
    for peak, limit in held(counted_heap, ("2", "2", "8", "0")):
        assert limit < 1000 < peak < kernel.CALL_BYTES


@pytest.mark.parametrize("normalize", [None, "self+count"])
def test_the_way_back_is_run_in_chunks(monkeypatch, normalize):
    """What autograd keeps does not grow with the pairs times their cells."""
    monkeypatch.setattr(kernel, "CHUNK_CELLS", 1 << 12)
    monkeypatch.setattr(kernel, "SMALL_CHUNK_CELLS", 1 << 12)
    x = torch.cat(sequences([12] * 8, dim=8)).requires_grad_()
    offsets = torch.arange(0, 97, 12)
    prefixes = torch.tensor([[s, n] for s in range(8) for n in range(1, 13)])
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = packed_alignment_kernel(x, offsets, prefixes, normalize=normalize, log=True, backend="torch")
    # a few matrices of the slices or the prefixes; all cells would be 20 of them
    assert sum(kept.values()) < 8 * 8 * 96**2
    assert torch.autograd.grad(value.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("triple", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_float32_of_close_slices(triple, same):
    """2 - 2 cos alone is wrong by up to 7e-5 here."""
    lengths = (1, 2, 1, 3, 1, 5, 2)
    slices = torch.cat(sequences(lengths, dim=200, dtype=torch.float32))
    slices[1::3] = slices[0] + 0.03 * slices[1::3]
    slices[2::5] = slices[0]
    x = list(slices.split(lengths))
    modality = {"modality_x": codes(lengths), "split": 100} if triple else {}
    if not same:
        modality |= {"modality_y": codes(lengths)} if triple else {}
    value, exact = (
        global_alignment_kernel(
            s, None if same else s, delta=0.1, normalize=None, log=True, backend="torch", **modality
        )
        for s in (x, [s.double() for s in x])
    )
    error = (value - exact).abs() / exact.abs().clamp(min=1)
    assert error.max() < 2e-6
    assert ((exact > -1) & (exact < -1e-3)).any()  # small enough for the error to show


def test_local_kernel_by_hand():
    # orthogonal slices, sigma = 1: phi = 2, s = 1/e, k = s / (2 - s)
    x, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.5]])
    assert global_alignment_kernel([x], [y]).item() == pytest.approx(1 / (2 * math.e - 1), rel=1e-6)
    # two against one slice, sigma^2 = 1.5: one alignment, the product of 1 and of the kernel of orthogonal slices
    s = math.exp(-2 / 3)
    two = torch.cat([x, y])
    assert global_alignment_kernel([two], [x], normalize=None).item() == pytest.approx(s / (2 - s), rel=1e-6)


def test_equals_tslearn():
    lengths = (1, 2, 6, 11)
    x = [torch.nn.functional.normalize(s, dim=1) for s in sequences(lengths)]
    value = global_alignment_kernel(x, delta=0.7, normalize=None)
    for i, a in enumerate(x):
        for j, b in enumerate(x):
            sigma = 0.7 * math.sqrt((len(a) + len(b)) / 2)
            torch.testing.assert_close(
                value[i, j].item(), float(unnormalized_gak(a.numpy(), b.numpy(), sigma=sigma)), rtol=1e-9, atol=0
            )

    equal = [torch.nn.functional.normalize(s, dim=1) for s in sequences([8] * 5)]
    expected = cdist_gak([s.numpy() for s in equal], sigma=0.7 * math.sqrt(8))
    np.testing.assert_allclose(global_alignment_kernel(equal, delta=0.7).numpy(), expected, rtol=1e-9)


def test_delannoy_numbers():
    known = [[1, 1, 1, 1, 1], [1, 3, 5, 7, 9], [1, 5, 13, 25, 41], [1, 7, 25, 63, 129], [1, 9, 41, 129, 321]]
    n = torch.arange(1, 6)
    counts = log_delannoy(n[:, None], n[None, :])
    assert counts.dtype == torch.float64
    torch.testing.assert_close(counts.exp(), torch.tensor(known, dtype=torch.float64), rtol=1e-12, atol=0)
    assert all(math.exp(log_delannoy(n, m)) == pytest.approx(len(list(alignments(n, m)))) for n, m in [(3, 5), (6, 2)])
    large = sum(math.comb(299, k) * math.comb(699, k) * 2**k for k in range(300))
    assert log_delannoy(300, 700).item() == log_delannoy(700, 300).item() == pytest.approx(math.log(large), rel=1e-14)
    # equal slices make every alignment weigh 1
    same = [torch.ones(n, 3, dtype=torch.float64) for n in (2, 3, 9)]
    lengths = torch.tensor([2, 3, 9])
    torch.testing.assert_close(
        global_alignment_kernel(same, normalize=None, log=True), log_delannoy(lengths[:, None], lengths[None, :])
    )
    with pytest.raises(ValueError, match="at least 1"):
        log_delannoy(0, 3)


# Known values of the normalisations, and where they fail


@pytest.mark.parametrize(
    ("delta", "cross", "expected"),
    [
        (0.5, 0.3, (0.03, 0.02, 0.02, 0.03, 0.0004)),
        (1.0, 0.0, (0.23, 0.17, 0.16, 0.18, 0.005)),
        (1.0, 0.3, (0.33, 0.30, 0.34, 0.43, 0.012)),
        (2.0, 0.3, (0.72, 0.71, 0.76, 0.81, 0.029)),
    ],
)
def test_scale_by_length(delta, cross, expected):
    for (n, m), number in zip(((1, 1), (2, 2), (4, 4), (8, 8), (2, 8)), expected, strict=True):
        x, y = with_cosines(n, m, cross)
        value = global_alignment_kernel([x], [y], delta=delta).item()
        assert value == pytest.approx(
            number, abs=0.00005 if number < 0.001 else 0.0005 if number < 0.1 else 0.005
        ) or (number >= 0.02 and round(value, 2) == number)


@pytest.mark.parametrize(("cross", "expected"), [(0.0, 0.13), (0.3, 0.31)])
def test_count_removes_the_length_bias(cross, expected):
    x, y = with_cosines(2, 8, cross)
    assert round(global_alignment_kernel([x], [y], normalize="self+count").item(), 2) == expected


def test_self_and_count_can_exceed_one():
    angle = math.radians(20)
    y = torch.tensor([[math.cos(angle), (-1) ** i * math.sin(angle)] for i in range(8)])
    x = torch.tensor([[1.0, 0.0]])
    assert global_alignment_kernel([x], [y], normalize="self+count").item() == pytest.approx(1.084, abs=5e-4)


E1, E2 = [1.0, 0.0], [0.0, 1.0]


def test_triple_kernel_is_not_positive_definite():
    slices = [torch.tensor([half + E1], dtype=torch.float64) for half in (E1, E2, E1)]
    value = global_alignment_kernel(slices, modality_x=[[IMAGE], [IMAGE], [TEXT]], split=2)
    low = 1 / (2 * math.e - 1)
    expected = torch.tensor([[1, low, 1], [low, 1, 1], [1, 1, 1]], dtype=torch.float64)
    torch.testing.assert_close(value, expected)
    assert low == pytest.approx(0.2254, abs=5e-5)
    assert torch.linalg.eigvalsh(value)[0].item() == pytest.approx(-0.306, abs=5e-4)


def test_triple_kernel_exceeds_its_self_kernels():
    images = torch.tensor([E1 + E1, E2 + E1], dtype=torch.float64)
    texts = images.clone()
    options = {"modality_x": [[IMAGE, IMAGE], [TEXT, TEXT]], "split": 2}
    value = global_alignment_kernel([images, texts], normalize=None, **options)
    expected = torch.tensor([[1.8705, 3], [3, 1.8705]], dtype=torch.float64)
    torch.testing.assert_close(value, expected, rtol=0, atol=5e-5)
    normalized = global_alignment_kernel([images, texts], **options)
    assert normalized[0, 1].item() == pytest.approx(1.604, abs=5e-4)


# Properties

lengths_strategy = st.lists(st.integers(1, 7), min_size=1, max_size=6)
deltas = st.floats(0.2, 5.0)
seeds = st.integers(0, 10_000)
lean = settings(max_examples=25, deadline=None)


@lean
@given(lengths_strategy, deltas, seeds, st.sampled_from(MODES))
def test_symmetry_permutation_and_range(lengths, delta, seed, normalize):
    x = sequences(lengths, dim=3, seed=seed)
    value = global_alignment_kernel(x, delta=delta, normalize=normalize)
    assert torch.equal(value, value.T)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    permuted = global_alignment_kernel([x[i] for i in order], delta=delta, normalize=normalize)
    torch.testing.assert_close(permuted, value[order][:, order], rtol=1e-9, atol=0)
    assert (value > 0).all()
    if normalize in ("self", "count"):
        assert (value <= 1 + 1e-9).all()
    if normalize in ("self", "self+count"):
        assert torch.equal(value.diagonal(), torch.ones(len(x), dtype=torch.float64))
    log = global_alignment_kernel(x, delta=delta, normalize=normalize, log=True)
    torch.testing.assert_close(log.exp(), value)


@lean
@given(lengths_strategy, seeds, st.booleans(), st.sampled_from(MODES))
def test_does_not_depend_on_the_rest_of_the_batch(lengths, seed, triple, normalize):
    x, c = sequences(lengths, seed=seed, dtype=torch.float32), codes(lengths, seed)
    more, more_codes = sequences((9, 1, 4), seed=seed + 1, dtype=torch.float32), codes((9, 1, 4), seed + 1)

    def matrix(x, c):
        return global_alignment_kernel(
            x, normalize=normalize, log=True, modality_x=c if triple else None, split=3 if triple else None
        )

    alone = matrix(x, c)
    together = matrix([*more[:1], *x, *more[1:]], [*more_codes[:1], *c, *more_codes[1:]])[1:-2, 1:-2]
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


@lean
@given(st.floats(0.05, 10.0), st.floats(1.05, 3.0), seeds)
def test_single_slices_grow_with_delta_and_with_their_cosine(delta, factor, seed):
    x = sequences([1] * 6, seed=seed)
    value = global_alignment_kernel(x, delta=delta, log=True)
    off = ~torch.eye(6, dtype=torch.bool)
    assert (global_alignment_kernel(x, delta=delta * factor, log=True) > value)[off].all()
    unit = torch.nn.functional.normalize(torch.cat(x), dim=1)
    cosines = (unit @ unit.T)[off]
    assert (value[off][cosines.argsort()].diff() >= -1e-12).all()


@lean
@given(lengths_strategy, seeds)
def test_packed_prefixes_equal_sequences(lengths, seed):
    x = sequences(lengths, seed=seed)
    embeddings, offsets = pack(x)
    prefixes = torch.tensor([[s, n] for s in range(len(x)) for n in range(1, lengths[s] + 1)])
    prefixes = prefixes[torch.randperm(len(prefixes), generator=torch.Generator().manual_seed(seed))]
    cut = [x[s][:n] for s, n in prefixes.tolist()]
    for normalize in (None, "self+count"):
        value = packed_alignment_kernel(embeddings, offsets, prefixes, normalize=normalize)
        torch.testing.assert_close(value, global_alignment_kernel(cut, normalize=normalize), rtol=1e-9, atol=0)
        some = packed_alignment_kernel(embeddings, offsets, prefixes[:2], prefixes[::2], normalize=normalize)
        torch.testing.assert_close(some, value[:2, ::2], rtol=1e-9, atol=0)


def test_blocks_and_chunks_change_nothing(monkeypatch):
    lengths = torch.randint(1, 9, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    x, c = sequences(lengths, dtype=torch.float64), codes(lengths)
    embeddings, offsets = pack(x)
    prefixes = torch.tensor([[s, n] for s in range(20) for n in {1, lengths[s]}])
    options = {"normalize": "self+count", "modality": torch.cat(c), "split": 3}
    whole = packed_alignment_kernel(embeddings, offsets, prefixes, **options)
    cross = packed_alignment_kernel(embeddings, offsets, prefixes[:9], prefixes[4:], **options)
    torch.testing.assert_close(cross, whole[:9, 4:], rtol=1e-9, atol=0)
    monkeypatch.setattr(kernel, "BLOCK_SLICES", 17)
    monkeypatch.setattr(kernel, "GROUP_PAIRS", 7)
    monkeypatch.setattr(kernel, "CHUNK_CELLS", 50)
    monkeypatch.setattr(kernel, "SMALL_CHUNK_CELLS", 20)
    torch.testing.assert_close(
        packed_alignment_kernel(embeddings, offsets, prefixes, **options), whole, rtol=1e-9, atol=0
    )
    torch.testing.assert_close(
        packed_alignment_kernel(embeddings, offsets, prefixes[:9], prefixes[4:], **options), cross, rtol=1e-9, atol=0
    )


def test_chunks_stay_small_and_cover_everything():
    generator = np.random.default_rng(0)
    n, m = np.sort(generator.integers(1, 200, (2, 3000)), axis=0)
    order = np.lexsort((np.where(n % 2, m, -m), n))
    n, m = n[order], m[order]
    limit, diagonals = 1 << 17, 8
    chunks = list(kernel._chunks(n, m, limit, diagonals))
    assert [k for chunk in chunks for k in range(chunk.start, chunk.stop)] == list(range(3000))
    assert max(n[k].max() * min(diagonals, m[k].max()) * len(n[k]) for k in chunks) <= limit
    assert sum(n[k].max() * m[k].max() * len(n[k]) for k in chunks) <= 1.5 * (n * m).sum()


# Gradients and extremes


@pytest.mark.parametrize("normalize", MODES)
@pytest.mark.parametrize("triple", [False, True])
def test_gradcheck(normalize, triple):
    lengths = (1, 3, 2)
    embeddings, offsets = pack(sequences(lengths, dim=4))
    options = {"modality": torch.cat(codes(lengths)), "split": 2} if triple else {}
    prefixes = torch.tensor([[0, 1], [1, 3], [1, 2], [2, 2]])

    def op(embeddings, others=None):
        return packed_alignment_kernel(
            embeddings, offsets, prefixes, others, delta=0.8, normalize=normalize, **options
        )

    assert torch.autograd.gradcheck(op, embeddings.requires_grad_())
    assert torch.autograd.gradcheck(lambda e: op(e, prefixes[1:]), embeddings)


@pytest.mark.parametrize("delta", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("normalize", [None, "self+count"])
def test_long_sequences_stay_finite(delta, normalize):
    long = sequences((1024, 300), dim=16, dtype=torch.float32)
    x = [*long, long[1].clone(), -long[1], torch.ones(1, 16)]
    x = [s.requires_grad_() for s in x[1:]] if normalize else [x[0].requires_grad_(), x[4].requires_grad_()]
    value = global_alignment_kernel(x, delta=delta, normalize=normalize, log=True)
    assert value.isfinite().all()
    value.sum().backward()
    assert all(s.grad.isfinite().all() for s in x)


def test_1024_slices_against_float64():
    x = sequences((1024, 1000), dim=16)
    exact = global_alignment_kernel(x[:1], x[1:], normalize=None, log=True).item()
    value = global_alignment_kernel([x[0].float()], [x[1].float()], normalize=None, log=True).item()
    assert value == pytest.approx(exact, rel=1e-5)
    unit = [torch.nn.functional.normalize(s, dim=1) for s in x]
    sigma = math.sqrt(1012)
    k = (unit[0] @ unit[1].T * 2 - 2).div(2 * sigma**2).exp()
    k = (k / (2 - k)).numpy()
    # the plain recursion, rescaled row by row
    log_scale, row = 0.0, np.zeros(1001)
    row[0] = 1.0
    for i in range(1024):
        new, carry = np.zeros(1001), 0.0
        for j in range(1000):
            carry = new[j + 1] = (carry + row[j] + row[j + 1]) * k[i, j]
        scale = new.max()
        log_scale, row = log_scale + math.log(scale), new / scale
    assert exact == pytest.approx(math.log(row[1000]) + log_scale, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_lifted_to_float32(dtype):
    x = [s.to(dtype) for s in sequences((3, 5), dtype=torch.float32)]
    expected = global_alignment_kernel([s.float() for s in x])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = global_alignment_kernel(x)
        labels, _ = label_matrix(*pack([s.float() for s in x]), torch.tensor([[0, 3], [1, 5]]), normalize="self")
    assert value.dtype == torch.float32
    assert torch.equal(value, expected) and torch.equal(labels, expected)


def test_expected_alignment_equals_enumeration():
    x, y = sequences((3, 4))
    cx, cy = codes((3, 4), seed=1)
    for triple in (False, True):
        split = 3 if triple else None
        k = local_matrix(x, y, 0.6 * math.sqrt(3.5), *((cx, cy, split) if triple else ()))
        visits, total = torch.zeros(3, 4, dtype=torch.float64), 0.0
        for path in alignments(3, 4):
            weight = math.prod(k[i][j] for i, j in path)
            total += weight
            for cell in path:
                visits[cell] += weight
        options = {"modality_x": cx, "modality_y": cy.tolist(), "split": split} if triple else {}
        with torch.no_grad():
            value = expected_alignment(x, y, delta=0.6, **options)
        torch.testing.assert_close(value, visits / total, rtol=1e-9, atol=1e-12)
        assert not value.requires_grad
    torch.testing.assert_close(expected_alignment(y, x), expected_alignment(x, y).T)


# Labels


def test_labels_substitute_cosines_ones_and_clamp():
    lengths = (3, 2, 1, 2)
    x, c = sequences(lengths, dtype=torch.float32), codes(lengths, seed=3)
    embeddings, offsets = pack(x)
    prefixes = torch.tensor([[0, 1], [0, 3], [1, 1], [1, 2], [2, 1], [3, 2]])
    for triple in (False, True):
        options = {"modality": torch.cat(c), "split": 4} if triple else {}
        labels, share = label_matrix(embeddings, offsets, prefixes, delta=1.3, **options)
        k = packed_alignment_kernel(embeddings, offsets, prefixes, delta=1.3, normalize="self+count", **options)
        clamped = 0
        for i, (s, n) in enumerate(prefixes.tolist()):
            for j, (t, m) in enumerate(prefixes.tolist()):
                if s == t:
                    assert labels[i, j] == 1
                elif n == m == 1:
                    a, b = x[s][0], x[t][0]
                    if triple:
                        a, b = (v[:4] if c[s][0] == c[t][0] else v[4:] for v in (a, b))
                    torch.testing.assert_close(labels[i, j], torch.cosine_similarity(a, b, dim=0))
                else:
                    clamped += int(k[i, j] > 1)
                    torch.testing.assert_close(labels[i, j], k[i, j].clamp(max=1))
        off = sum(s != t for s in prefixes[:, 0].tolist() for t in prefixes[:, 0].tolist())
        assert share == pytest.approx(clamped / off)
        assert labels.dtype == torch.float32 and not labels.requires_grad


def test_labels_report_the_share_clamped():
    angle = math.radians(20)
    y = torch.tensor([[math.cos(angle), (-1) ** i * math.sin(angle)] for i in range(8)])
    embeddings, offsets = pack([torch.tensor([E1]), y, torch.tensor([E2]), torch.tensor([E1])])
    prefixes = torch.tensor([[0, 1], [1, 8], [2, 1], [3, 1]])
    labels, share = label_matrix(embeddings, offsets, prefixes)
    # of twelve entries the four of E1 with y are above 1, the two of the equal slices are 1 and count for nothing
    assert share == pytest.approx(4 / 12)
    assert labels[0, 1] == labels[3, 1] == labels[0, 3] == 1
    assert labels[0, 2].item() == pytest.approx(0, abs=1e-6)
    assert label_matrix(embeddings, offsets, prefixes, normalize="self")[1] == 0
    assert label_matrix(embeddings, offsets, prefixes[:1]) == (torch.ones(1, 1), 0.0)


def test_labels_keep_negative_cosines():
    embeddings, offsets = pack([torch.tensor([E1]), -torch.tensor([E1])])
    labels, _ = label_matrix(embeddings, offsets, torch.tensor([[0, 1], [1, 1]]))
    torch.testing.assert_close(labels, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))


@pytest.mark.parametrize("triple", [False, True])
def test_mean_labels(triple):
    lengths = (3, 4, 2)
    x, c = sequences(lengths), codes(lengths)
    embeddings, offsets = pack([s.requires_grad_() for s in x])
    prefixes = torch.tensor([[1, 3], [0, 3], [2, 1]])
    options = {"modality": torch.cat(c), "split": 2} if triple else {}
    labels, share = label_matrix(embeddings, offsets, prefixes, label_kernel="mean", **options)
    for i, (s, n) in enumerate(prefixes.tolist()):
        for j, (t, m) in enumerate(prefixes.tolist()):
            total = 0.0
            for a, ca in zip(x[s][:n], c[s], strict=False):
                for b, cb in zip(x[t][:m], c[t], strict=False):
                    half = slice(None) if not triple else slice(None, 2) if ca == cb else slice(2, None)
                    total += torch.cosine_similarity(a[half], b[half], dim=0).item()
            assert labels[i, j].item() == pytest.approx(1 if s == t else total / (n * m), abs=1e-6)
    assert share == 0 and not labels.requires_grad


# Errors


def test_errors_of_sequences():
    x = sequences((2, 3), dtype=torch.float32)
    modality = [[0, 1], [1, 1, 0]]
    for arguments, options, message in [
        (([x[0], x[0][:0]],), {}, r"`x\[1\]`.*length >= 1"),
        ((x, [x[0][0]]), {}, r"`y\[0\]`"),
        ((x, [x[0][:, :5]]), {}, r"`y\[0\]` has 5 dimensions"),
        (([],), {}, "at least one sequence"),
        ((x,), {"delta": 0.0}, "`delta` must be finite and at least 0.001"),
        ((x,), {"delta": float("nan")}, "`delta` must be finite and at least 0.001"),
        ((x,), {"normalize": "both"}, "`normalize`.*'both'"),
        ((x,), {"backend": "cuda"}, "`backend`.*'cuda'"),
        ((x,), {"split": 3}, "go together"),
        ((x,), {"modality_x": modality}, "go together"),
        ((x, x), {"modality_x": modality, "split": 3}, "`modality_y`"),
        ((x,), {"modality_x": modality[:1], "split": 3}, "1 entries for 2 sequences"),
        ((x,), {"modality_x": modality[::-1], "split": 3}, r"`modality_x\[0\]`"),
        ((x,), {"modality_x": [[0, 2], [1, 1, 0]], "split": 3}, "`modality` may hold"),
        ((x,), {"modality_x": modality, "split": 6}, "`split` must lie between 1 and 5"),
        ((x,), {"modality_x": modality, "split": 0}, "`split` must lie between 1 and 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            global_alignment_kernel(*arguments, **options)


def test_errors_name_the_slice():
    bad = sequences((2, 3), dtype=torch.float32)
    bad[1][2, 0] = float("nan")
    with pytest.raises(ValueError, match=r"Slice 2 of sequence 1 \(row 4.*NaN"):
        global_alignment_kernel(bad)
    bad[1][2] = 0
    with pytest.raises(ValueError, match="Slice 2 of sequence 1.*all zeros"):
        global_alignment_kernel(bad)
    bad[1][2, 0] = 1
    with pytest.raises(ValueError, match="Slice 2 of sequence 1.*all zeros after its first 3"):
        global_alignment_kernel(bad, modality_x=[[0, 0], [0, 0, 0]], split=3)


def test_errors_of_the_packed_form():
    embeddings, offsets = pack(sequences((2, 3)))
    prefixes = torch.tensor([[0, 1], [1, 3]])
    for wrong, message in [
        ([0, 2], "run from 0 to 5"),
        ([0, 3, 3, 5], "sequence 1 is empty"),
        ([0, 4, 3, 5], "increase"),
    ]:
        with pytest.raises(ValueError, match=message):
            packed_alignment_kernel(embeddings, torch.tensor(wrong), prefixes)
    for wrong, message in [
        ([[0, 3]], r"`prefixes\[0\]` has length 3, but sample 0 has 2"),
        ([[1, 1], [1, 0]], r"`prefixes\[1\]` has length 0"),
        ([[2, 1]], r"`prefixes\[0\]` names sample 2 of 2"),
        ([0, 1], r"rows \(sample, length\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            packed_alignment_kernel(embeddings, offsets, torch.tensor(wrong))
    for arguments, message in [
        ((embeddings, offsets.double(), prefixes), "`offsets` must hold integers"),
        ((embeddings, offsets, prefixes.double()), "`prefixes` must hold integers"),
        ((embeddings.long(), offsets, prefixes), "`embeddings`.*floating-point.*int64"),
        ((embeddings.to(torch.complex64), offsets, prefixes), "`embeddings`.*complex64"),
        ((embeddings[0], offsets, prefixes), "`embeddings` must have shape"),
        ((embeddings[:, :0], offsets, prefixes), "`embeddings` must have shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            packed_alignment_kernel(*arguments)
    with pytest.raises(ValueError, match=r"`other_prefixes\[0\]`"):
        packed_alignment_kernel(embeddings, offsets, prefixes, torch.tensor([[0, 9]]))
    with pytest.raises(ValueError, match="`label_kernel`.*'dtw'"):
        label_matrix(embeddings, offsets, prefixes, label_kernel="dtw")
