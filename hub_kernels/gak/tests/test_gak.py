"""The compiled kernel by itself: needs torch, kernels and numpy, but not hf_sugar."""

import concurrent.futures
import functools
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import TOLERANCE, compare, distances, gen_inputs, log_count, log_kernel, reference


MODES = (None, "self", "count", "self+count")


@pytest.fixture
def exact(device):
    """Relative error of what is float64 throughout; on CUDA squared distances are rounded to float32."""
    return 1e-10 if device == "cpu" else 1e-5


@pytest.fixture
def in_float64(device):
    if device != "cpu":
        pytest.skip("squared distances are rounded to float32 on CUDA: differences of float64 values cannot be taken")


def paths(n, m):
    """All monotone alignments, by brute force over their steps."""
    for length in range(max(n, m) - 1, n + m - 1):
        for steps in itertools.product(((0, 1), (1, 0), (1, 1)), repeat=length):
            cells = [(0, 0)]
            for down, right in steps:
                cells.append((cells[-1][0] + down, cells[-1][1] + right))
            if cells[-1] == (n - 1, m - 1) and all(i < n and j < m for i, j in cells):
                yield cells


@pytest.mark.parametrize("lengths", [(1, 1), (1, 4), (2, 2), (3, 5), (5, 5)])
def test_brute_force(gak, device, lengths, exact):
    n, m = lengths
    x = torch.randn(n + m, 6, generator=torch.Generator().manual_seed(n * m), dtype=torch.float64)
    offsets, prefixes = torch.tensor([0, n, n + m]), torch.tensor([[0, n], [1, m]])
    phi = distances(x, None, None)[:n, n:]
    s = np.exp(-phi / (n + m))
    k = s / (2 - s)
    expected = sum(math.prod(k[cell] for cell in path) for path in paths(n, m))
    value = gak.packed_alignment_kernel(x.to(device), offsets, prefixes, normalize=None)[0, 1].item()
    assert value == pytest.approx(expected, rel=exact)
    # and the reference of the tests below by the same measure
    assert log_kernel(phi, n + m, 1.0) == pytest.approx(math.log(expected), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("triple", [False, True])
def test_reference(gak, device, triple, dtype, exact):
    tolerance = max(TOLERANCE[dtype], exact)
    inputs = gen_inputs(9, 7, 24, 2, shortest=1, triple=triple, dtype=dtype, device=device)
    for normalize, delta in itertools.product(MODES, (0.1, 1.0, 10.0)):
        expected = reference(**inputs, delta=delta, normalize=normalize)
        value = gak.packed_alignment_kernel(**inputs, delta=delta, normalize=normalize, log=True)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        compare(value, expected, tolerance)
        some = gak.packed_alignment_kernel(
            **{**inputs, "prefixes": inputs["prefixes"][3:9]},
            other_prefixes=inputs["prefixes"][::3],
            delta=delta,
            normalize=normalize,
            log=True,
        )
        compare(some, expected[3:9, ::3], tolerance)
        # both sides need the same slices
        turned = gak.packed_alignment_kernel(
            **inputs, other_prefixes=inputs["prefixes"].flip(0), delta=delta, normalize=normalize, log=True
        )
        compare(turned, expected.flip(1), tolerance)


@pytest.mark.parametrize("triple", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_half_precision(gak, device, triple, dtype):
    """That of the same numbers in float32, rounded."""
    inputs = gen_inputs(6, 5, 24, 2, triple=triple, dtype=dtype, device=device)
    narrow = inputs.pop("embeddings").requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    values = [gak.packed_alignment_kernel(x, **inputs, log=True) for x in (narrow, wide)]
    assert torch.equal(*values)
    gradients = [torch.autograd.grad(v.sum(), x)[0] for v, x in zip(values, (narrow, wide), strict=True)]
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(gradients[0], gradients[1].to(dtype))


@pytest.mark.parametrize("delta", [0.01, 0.03, 0.1, 1.0, 100.0])
def test_close_and_equal_slices(gak, device, delta):
    inputs = gen_inputs(8, 6, 48, shortest=1, triple=True)
    x = inputs["embeddings"]
    x[1::3] = x[0] + 1e-3 * x[1::3]
    x[2::5] = x[0]
    x[5] = -x[0]
    inputs["embeddings"] = x.to(device)
    for normalize in MODES:
        value = gak.packed_alignment_kernel(**inputs, delta=delta, normalize=normalize, log=True)
        leaf = inputs["embeddings"].clone().requires_grad_()
        traced = gak.packed_alignment_kernel(
            **{**inputs, "embeddings": leaf}, delta=delta, normalize=normalize, log=True
        )
        assert torch.autograd.grad(traced.sum(), leaf)[0].isfinite().all()
        if delta >= 0.1:
            expected = reference(**inputs, delta=delta, normalize=normalize)
            compare(value, expected, 1e-5)
            compare(traced, expected, 1e-5)
        else:
            compare(traced, value, 1e-3)


@pytest.mark.parametrize("delta", [0.01, 0.1, 1.0, 100.0])
def test_long_sequences(gak, device, delta):
    lengths = (1024, 700, 1, 430)
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    prefixes = torch.tensor([[s, n] for s, n in enumerate(lengths)])
    x = torch.randn(int(offsets[-1]), 8, generator=torch.Generator().manual_seed(0))
    phi = torch.from_numpy(distances(x, None, None)).float()
    phi = torch.minimum(phi, phi.T)
    value = gak.recursion(phi.to(device), offsets, prefixes, delta=delta, normalize=None)
    for i, j in [(0, 2), (2, 3), (1, 3)] + ([(0, 1)] if delta == 1 else []):
        s, t = offsets[i], offsets[j]
        block = phi[s : s + lengths[i], t : t + lengths[j]].double().numpy()
        expected = log_kernel(block, lengths[i] + lengths[j], delta)
        compare(value[i, j], torch.tensor(expected), 1e-5)
    compare(
        gak.packed_alignment_kernel(x.to(device), offsets, prefixes, delta=delta, normalize=None, log=True),
        value.cpu(),
        1e-5,
    )


@pytest.mark.parametrize("delta", [0.3, 1.0, 100.0])
@pytest.mark.parametrize("normalize", ["self", "count", "self+count"])
def test_long_sequences_against_short_ones(gak, device, normalize, delta):
    """A self-kernel sums over more than its pair does: here it leaves the range of a float64, and the pair does not."""
    lengths = (430, 300, 64, 2)
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    prefixes = torch.tensor([[s, n] for s, n in enumerate(lengths)])
    x = torch.randn(int(offsets[-1]), 8, generator=torch.Generator().manual_seed(0))
    phi = torch.from_numpy(distances(x, None, None)).float()
    phi = torch.minimum(phi, phi.T)
    inputs = {"offsets": offsets, "prefixes": prefixes[:1], "other_prefixes": prefixes[1:]}
    expected = reference(x, **inputs, delta=delta, normalize=normalize, phi=phi.double().numpy())
    compare(gak.recursion(phi.to(device), **inputs, delta=delta, normalize=normalize), expected, 1e-5)
    whole = gak.recursion(phi.to(device), offsets, prefixes, delta=delta, normalize=normalize)
    compare(whole[:1, 1:], expected, 1e-5)
    compare(
        gak.packed_alignment_kernel(x.to(device), **inputs, delta=delta, normalize=normalize, log=True), expected, 2e-5
    )


def test_count_is_the_number_of_alignments(gak, device):
    lengths = (1, 2, 40, 300, 1024)
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    same = torch.ones(int(offsets[-1]), 4, device=device)
    prefixes = torch.tensor([[s, n] for s, n in enumerate(lengths)])
    value = gak.packed_alignment_kernel(same, offsets, prefixes, normalize=None, log=True)
    compare(value, torch.tensor([[log_count(n, m) for m in lengths] for n in lengths]), 1e-6)
    value = gak.packed_alignment_kernel(same, offsets, prefixes, normalize="count")
    torch.testing.assert_close(value.cpu(), torch.ones(5, 5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalize", MODES)
@pytest.mark.parametrize("triple", [False, True])
def test_gradcheck(gak, device, normalize, triple, in_float64):
    inputs = gen_inputs(4, 3, 4, 2, shortest=1, triple=triple, dtype=torch.float64, device=device)
    x = inputs.pop("embeddings").requires_grad_()
    some = {**inputs, "prefixes": inputs["prefixes"][:3], "other_prefixes": inputs["prefixes"][2:5]}
    for arguments in (inputs, some):
        for log in (True, False):
            op = functools.partial(gak.packed_alignment_kernel, **arguments, delta=0.8, normalize=normalize, log=log)
            assert torch.autograd.gradcheck(op, x)


def test_gradient_of_long_sequences(gak, device, in_float64):
    offsets, prefixes = torch.tensor([0, 90, 200]), torch.tensor([[0, 90], [1, 110]])
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device=device)
    x.requires_grad_()
    options = {"delta": 0.3, "normalize": "self", "log": True}
    gak.packed_alignment_kernel(x, offsets, prefixes, **options)[0, 1].backward()
    direction = torch.randn(200, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    with torch.no_grad():
        ahead, behind = (
            gak.packed_alignment_kernel(x + step * direction, offsets, prefixes, **options)[0, 1]
            for step in (1e-6, -1e-6)
        )
    slope = ((ahead - behind) / 2e-6).item()
    assert (x.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5)


def test_expected_alignment(gak, device, exact):
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    phi = distances(x, None, None)[:4, 4:]
    s = np.exp(-phi / (0.49 * 9))
    k = s / (2 - s)
    visits, total = torch.zeros(4, 5, dtype=torch.float64), 0.0
    for path in paths(4, 5):
        weight = math.prod(k[cell] for cell in path)
        total += weight
        for cell in path:
            visits[cell] += weight
    value = gak.expected_alignment(x[:4].to(device), x[4:].to(device), delta=0.7)
    torch.testing.assert_close(value.cpu().double(), visits / total, rtol=exact, atol=exact)


def test_bits_do_not_depend_on_the_batch(gak, device):
    inputs = gen_inputs(40, 9, 16, 3, shortest=1, triple=False)
    phi = torch.from_numpy(distances(inputs["embeddings"], None, None)).float().to(device)
    phi = torch.minimum(phi, phi.T)
    offsets, prefixes = inputs["offsets"], inputs["prefixes"]
    for normalize in MODES:
        whole = gak.recursion(phi, offsets, prefixes, normalize=normalize)
        assert torch.equal(whole, whole.T)
        order = torch.randperm(len(prefixes), generator=torch.Generator().manual_seed(0))
        assert torch.equal(gak.recursion(phi, offsets, prefixes[order], normalize=normalize), whole[order][:, order])
        few = gak.recursion(phi, offsets, prefixes[7:12], prefixes[50:51], normalize=normalize)
        assert torch.equal(few, whole[7:12, 50:51])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", [1, 0.05])  # 0.05: nearly equal slices
@pytest.mark.parametrize("triple", [False, True])
def test_dimensions_a_part_at_a_time(gak, device, triple, noise, dtype, exact):
    """On CPUs, of narrow dtypes and of two sets that share some slices, but not all."""
    inputs = gen_inputs(6, 6, 200, 2, shortest=1, triple=triple, device=device)
    inputs["embeddings"] = (noise * inputs["embeddings"] + 1 - noise).to(dtype)
    tolerance = max(TOLERANCE[dtype], exact)
    for others in (None, inputs["prefixes"][::3], torch.tensor([[0, 1], [2, 1], [5, 1]])):
        value = gak.packed_alignment_kernel(**inputs, other_prefixes=others, normalize="self+count", log=True)
        compare(value, reference(**inputs, other_prefixes=others, normalize="self+count"), tolerance)


@pytest.mark.parametrize("normalize", MODES)
def test_all_prefixes_of_a_long_sample(gak, device, normalize):
    """Their self-kernels are as many as the pairs: some lengths at a time give what the pairs give by themselves."""
    lengths = (110, 3, 40)
    offsets = torch.tensor([0, 110, 113, 153])
    x = torch.randn(153, 12, generator=torch.Generator().manual_seed(0)).to(device)
    phi = torch.from_numpy(distances(x, None, None)).float().to(device)
    phi = torch.minimum(phi, phi.T)
    prefixes = torch.tensor([[s, n] for s, length in enumerate(lengths) for n in range(1, length + 1)])
    prefixes = prefixes[torch.randperm(153, generator=torch.Generator().manual_seed(1))]
    whole = gak.recursion(phi, offsets, prefixes, normalize=normalize)
    assert torch.equal(whole, whole.T)
    assert torch.equal(gak.recursion(phi, offsets, prefixes[::2], prefixes[1:], normalize=normalize), whole[::2, 1:])
    for k in range(0, 153, 17):
        few, others = prefixes[k : k + 2], prefixes[[k, 40, 80]]
        assert torch.equal(
            gak.recursion(phi, offsets, few, others, normalize=normalize), whole[k : k + 2, [k, 40, 80]]
        )
    options = {"normalize": normalize, "log": True}
    compare(gak.packed_alignment_kernel(x, offsets, prefixes, **options), whole, 1e-5)
    compare(gak.packed_alignment_kernel(x, offsets, prefixes[::2], prefixes, **options), whole[::2], 1e-5)


RESIDENT = """
import ctypes, sys
from pathlib import Path

import torch
from kernels import get_local_kernel

samples, slices, dim, every, half = map(int, sys.argv[2:7])
gak = get_local_kernel(Path(sys.argv[1]), backend="cpu")
torch.set_num_threads(2)


def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def inputs(samples, slices, dim, every):
    x = torch.randn(samples * slices, dim, generator=torch.Generator().manual_seed(0))
    rows = torch.cartesian_prod(torch.arange(samples), torch.arange(1, slices + 1))
    rows = rows if every else rows[slices - 1 :: slices]
    options = {"modality": torch.arange(len(x)) % 2, "split": dim // 2, "normalize": "self+count"}
    x = x.to(getattr(torch, sys.argv[7]))
    return (x, torch.arange(0, len(x) + 1, slices), rows, rows[::2].contiguous() if half else None), options


arguments, options = inputs(32, 8, dim, 0)
gak.packed_alignment_kernel(*arguments, **options)
arguments, options = inputs(samples, slices, dim, every)
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
value = gak.packed_alignment_kernel(*arguments, **options)
x = arguments[0]
print(status("VmHWM") - before, 1.5 * (x.nbytes + value.nbytes + value.element_size() * len(x) ** 2))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "case",
    [
        ("128", "5", "1536", "0", "0", "bfloat16"),  # would take twice the memory in float32
        ("96", "16", "128", "1", "0", "float32"),  # every prefix
        ("1", "330", "1536", "1", "0", "bfloat16"),  # as many self-kernels as pairs
        ("1", "330", "768", "1", "1", "float32"),
        ("4", "100", "1536", "1", "1", "float32"),  # two sets that share some slices
        ("1", "1024", "64", "0", "1", "float32"),
    ],
)
def test_memory(device, case):
    """What a call adds to the resident memory: at most 1.5 times the inputs, the output and the matrix of products."""
    if device != "cpu":
        pytest.skip("of the CPU kernel; the host side of the others is measured in gak-triton")
    build = os.environ.get("GAK_BUILD", str(Path(__file__).resolve().parents[1]))
    result = subprocess.run([sys.executable, "-c", RESIDENT, build, *case], capture_output=True, text=True, check=True)
    peak, limit = map(float, result.stdout.split())
    assert 0.1 * limit < peak < limit


def test_same_on_every_run_and_in_threads(gak, device):
    inputs = gen_inputs(30, 8, 32, 2, device=device)
    first = gak.packed_alignment_kernel(**inputs, normalize="self+count")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(gak.packed_alignment_kernel, **inputs, normalize="self+count") for _ in range(16)]
    assert all(torch.equal(job.result(), first) for job in jobs)


def test_bits_do_not_depend_on_the_number_of_threads(gak, device):
    inputs = gen_inputs(60, 9, 16, 3, shortest=1, triple=False)
    phi = torch.from_numpy(distances(inputs["embeddings"], None, None)).float().to(device)
    phi = torch.minimum(phi, phi.T).requires_grad_()
    known = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        value = gak.recursion(phi, inputs["offsets"], inputs["prefixes"], normalize="self+count")
        known.append((value.detach(), torch.autograd.grad(value.square().sum(), phi)[0]))
    torch.set_num_threads(1)
    for value, gradient in known[1:]:
        assert torch.equal(value, known[0][0]) and torch.equal(gradient, known[0][1])


def test_autocast(gak, device):
    inputs = gen_inputs(4, 4, 16, device=device)
    inputs["embeddings"][3] = inputs["embeddings"][0] + 0.01
    x = inputs.pop("embeddings").requires_grad_()
    expected = gak.packed_alignment_kernel(x, **inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        value = gak.packed_alignment_kernel(x, **inputs)
    assert torch.equal(value, expected)
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile(gak, device):
    inputs = gen_inputs(6, 5, 16, device=device)
    x = inputs.pop("embeddings")

    def twice(x):
        return 2 * gak.packed_alignment_kernel(x, **inputs, normalize="self+count")

    # The host side of the CUDA kernel looks at values and leaves the graph.
    compiled = torch.compile(twice, fullgraph=device == "cpu", backend="aot_eager")
    torch.testing.assert_close(compiled(x), twice(x))
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(leaf).sum().backward()
    twice(other).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    turned = x.T.contiguous().T.requires_grad_()
    compiled(turned).sum().backward()
    torch.testing.assert_close(turned.grad, other.grad)


def test_opcheck(gak, device):
    if device != "cpu":
        pytest.skip("these ops are those of the CPU")
    inputs = gen_inputs(4, 4, 8, triple=False, dtype=torch.float64)
    phi = torch.from_numpy(distances(inputs["embeddings"], None, None)).requires_grad_()
    ops = gak._ops.ops
    torch.library.opcheck(ops.log_recursion.default, (phi, inputs["offsets"], inputs["prefixes"], None, 1.0, 3))
    leaf = inputs["embeddings"].clone().requires_grad_()
    codes = torch.arange(len(leaf)) % 2
    torch.library.opcheck(ops.squared_distances.default, (leaf, codes, 3))
    for x in (leaf.detach(), leaf.detach().T.contiguous().T):
        torch.library.opcheck(ops.squared_distances_backward.default, (phi.detach(), x, codes, 3))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = inputs["embeddings"].to(dtype)
        torch.library.opcheck(
            ops.log_alignment.default, (x, inputs["offsets"], inputs["prefixes"], None, None, 0, 1.0, 1)
        )


def test_errors(gak, device):
    x = torch.randn(5, 4, device=device)
    offsets, prefixes = torch.tensor([0, 2, 5]), torch.tensor([[0, 2], [1, 3]])
    modality = torch.tensor([0, 1, 0, 1, 0])
    nan, zero, half = x.clone(), x.clone(), x.clone()
    nan[3, 1], zero[4], half[1, 2:] = math.nan, 0, 0
    for arguments, options, message in [
        ((x, torch.tensor([0, 3]), prefixes), {}, "run from 0 to 5"),
        ((x, torch.tensor([0, 2, 2, 5]), prefixes), {}, "sequence 1 is empty"),
        ((x, torch.tensor([0, 4, 3, 5]), prefixes), {}, "increase"),
        ((x, offsets.int(), prefixes), {}, "`offsets`.*int64"),
        ((x, offsets, prefixes.double()), {}, "`prefixes`.*int64"),
        ((x, offsets, torch.tensor([[0, 3]])), {}, "length 3, but sample 0 has 2 slices"),
        ((x, offsets, torch.tensor([[0, 0]])), {}, "length 0"),
        ((x, offsets, torch.tensor([[2, 1]])), {}, "names sample 2 of 2"),
        ((x, offsets, prefixes[:0]), {}, "at least one row"),
        ((x, offsets, prefixes, torch.tensor([[0, 9]])), {}, "`other_prefixes.0.`"),
        ((x.int(), offsets, prefixes), {}, "`embeddings` must be bfloat16"),
        ((nan, offsets, prefixes), {}, "Slice 1 of sequence 1 .row 3.*NaN"),
        ((zero, offsets, prefixes), {}, "Slice 2 of sequence 1.*all zeros"),
        (
            (half, offsets, prefixes),
            {"modality": modality, "split": 2},
            "Slice 1 of sequence 0.*zeros after its first 2",
        ),
        ((x, offsets, prefixes), {"delta": 0.0}, "`delta` must be finite and at least 0.001"),
        ((x, offsets, prefixes), {"delta": math.nan}, "`delta` must be finite and at least 0.001"),
        ((x, offsets, prefixes), {"modality": modality + 1, "split": 2}, "`modality` may hold"),
        ((x, offsets, prefixes), {"modality": modality[:4], "split": 2}, "4 entries for 5 slices"),
        ((x, offsets, prefixes), {"modality": modality, "split": 4}, "`split` must lie between 1 and 3"),
    ]:
        # The host side of the CUDA kernel says the same in fewer words.
        with pytest.raises((RuntimeError, ValueError), match=message if device == "cpu" else None):
            gak.packed_alignment_kernel(*arguments, **options)
    # with gradients the distances are taken elsewhere
    for bad, options, message in [
        (nan, {}, "Row 3 .*NaN"),
        (zero, {}, "Row 4 .*all zeros"),
        (half, {"modality": modality, "split": 2}, "Row 1 .*half that is all zeros"),
        (x, {"modality": modality + 1, "split": 2}, "`modality` must hold"),
        (x, {"modality": modality[:4], "split": 2}, "each of the 5 slices"),
        (x, {"modality": modality, "split": 4}, "`split` must lie between 1 and 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            gak.packed_alignment_kernel(bad.clone().requires_grad_(), offsets, prefixes, **options)
    for options in ({"normalize": "both"}, {"split": 2}, {"modality": modality}):
        with pytest.raises(ValueError):
            gak.packed_alignment_kernel(x, offsets, prefixes, **options)
    with pytest.raises(ValueError, match="`normalize`"):
        gak.recursion(torch.zeros(5, 5, device=device), offsets, prefixes, normalize="both")
    for options in ({"split": 2}, {"modality_x": modality[:2], "split": 2}, {"modality_x": modality[:2]}):
        with pytest.raises(ValueError, match="modality"):
            gak.expected_alignment(x[:2], x[2:], **options)


def test_extreme_scales_of_embeddings(gak, device):
    inputs = gen_inputs(5, 4, 16, dtype=torch.float64, device=device)
    x = inputs.pop("embeddings")
    expected = gak.packed_alignment_kernel(x, **inputs)
    for factor in (1e200, 1e-200, 1e-310):
        torch.testing.assert_close(gak.packed_alignment_kernel(x * factor, **inputs), expected, rtol=1e-4, atol=0)
