"""Values, on a GPU (GAK_TEST_DEVICE=cuda) or without one in Triton's interpreter (TRITON_INTERPRET=1)."""

import math
import os

import numpy as np
import pytest
import torch
from common import alignment_and_gradient, compare, distances, gen_inputs, log_kernel, reference


MODES = (None, "self", "count", "self+count")

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU: set TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)


@pytest.mark.parametrize("triple", [False, True])
@pytest.mark.parametrize("normalize", MODES)
def test_reference(gak, device, normalize, triple):
    inputs = gen_inputs(5, 5, 12, 2, shortest=1, triple=triple, device=device)
    for delta in (0.1, 1.0):
        expected = reference(**inputs, delta=delta, normalize=normalize)
        value = gak.packed_alignment_kernel(**inputs, delta=delta, normalize=normalize, log=True)
        compare(value, expected, 1e-5)
        assert torch.equal(value, value.T)
    some = gak.packed_alignment_kernel(
        **inputs, other_prefixes=inputs["prefixes"][:3], delta=delta, normalize=normalize, log=True
    )
    compare(some, expected[:, :3], 1e-5)


@pytest.mark.parametrize("delta", [0.01, 0.1, 1.0, 100.0])
def test_lengths_and_bandwidths(gak, device, delta):
    lengths = (70, 33, 1)
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    prefixes = torch.tensor([[s, n] for s, n in enumerate(lengths)])
    x = torch.randn(int(offsets[-1]), 8, generator=torch.Generator().manual_seed(0))
    phi = torch.from_numpy(distances(x, None, None)).float()
    phi = torch.minimum(phi, phi.T)
    value = gak.recursion(phi.to(device), offsets, prefixes[:2], prefixes[1:], delta=delta, normalize=None)
    starts = offsets.tolist()
    for i in (0, 1):
        for j in (1, 2):
            block = phi[starts[i] : starts[i + 1], starts[j] : starts[j + 1]].double().numpy()
            expected = log_kernel(block, lengths[i] + lengths[j], delta)
            compare(value[i, j - 1], torch.tensor(expected), 1e-5)


def test_errors_of_equal_cells_do_not_add_up(gak, device):
    """Local kernels of 1/3 keep log K near 0: what one cell loses in float32 would be lost hundreds of times."""
    length = 256
    phi = torch.full((2 * length, 2 * length), 1.1)
    offsets, prefixes = torch.tensor([0, length, 2 * length]), torch.tensor([[0, length], [1, length]])
    delta = math.sqrt(1.1 / (2 * length * math.log(2)))
    phi = phi.double()
    value = gak.recursion(phi.to(device), offsets, prefixes[:1], prefixes[1:], delta=delta, normalize=None).item()
    expected = log_kernel(phi[:length, :length].numpy(), 2 * length, delta)
    assert abs(expected) < 10
    assert abs(value - expected) < 1e-9


def test_autocast(gak, device):
    inputs = gen_inputs(3, 3, 8, device=device)
    inputs["embeddings"][3] = inputs["embeddings"][0] + 0.01
    expected = gak.packed_alignment_kernel(**inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(gak.packed_alignment_kernel(**inputs), expected)


@pytest.mark.parametrize("triple", [False, True])
@pytest.mark.parametrize("other", [False, True])
def test_blocks(gak, device, monkeypatch, other, triple):
    """A few slices and a few pairs at a time give what all at once give."""
    inputs = gen_inputs(4, 4, 6, 2, shortest=1, triple=triple, device=device)
    inputs["embeddings"][1] = inputs["embeddings"][0] + 0.01
    inputs["other_prefixes"] = inputs["prefixes"][[4, 1, 6]] if other else None
    x = inputs.pop("embeddings").requires_grad_()
    results = []
    for block, pairs in ((512, 1 << 17), (3, 10)):
        monkeypatch.setattr(gak.pairs, "BLOCK", block)
        monkeypatch.setattr(gak.pairs, "PAIRS", pairs)
        value = gak.packed_alignment_kernel(x, **inputs, normalize="self+count", log=True)
        weights = torch.arange(1.0, value.numel() + 1, device=device).view_as(value)
        results.append((value.detach(), torch.autograd.grad((value * weights).sum(), x)[0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    compare(results[1][0], reference(x, **inputs, normalize="self+count"), 1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the CPU's allocator gives")
@pytest.mark.parametrize("normalize", MODES)
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("samples", "slices", "dim", "prefixes", "noise"),
    [
        (384, 4, 64, 4, 1),
        (96, 16, 1024, 1, 1),
        (32, 16, 1536, 1, 1),
        (96, 16, 128, 16, 1),
        (1, 1024, 1536, 1024, 1),
        (2, 1000, 64, 1, 1),
        (256, 8, 1536, 1, 0.1),  # all nearly equal, and compared in float64
    ],
)
def test_memory(gak, monkeypatch, samples, slices, dim, prefixes, noise, dtype, other, normalize):
    """Of the host side: no more than 1.5 times the inputs, the output and the matrix of inner products."""

    def launch(distances, row_start, row_length, column_start, column_length, delta, own, symmetric):
        return torch.zeros(len(row_start), len(column_length), dtype=torch.float64)

    monkeypatch.setattr(gak, "_launch", launch)
    gak.pairs._log_count_table(1024)  # stays on the host
    x = noise * torch.randn(samples * slices, dim, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x += 1 - noise
    all_prefixes = torch.cartesian_prod(torch.arange(samples), torch.arange(1, slices + 1))
    rows = all_prefixes if prefixes == slices else all_prefixes[slices - 1 :: slices]
    options = {"modality": torch.arange(len(x)) % 2, "split": dim // 2, "normalize": normalize}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        value = gak.packed_alignment_kernel(
            x, torch.arange(0, len(x) + 1, slices), rows, rows[::2] if other else None, **options
        )
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    gram = value.element_size() * len(x) ** 2
    limit = 1.5 * (x.nbytes + value.nbytes + gram)
    assert gram < peak < limit


@pytest.mark.parametrize("triple", [False, True])
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("normalize", MODES)
def test_gradient(gak, device, normalize, other, triple):
    inputs = gen_inputs(4, 4, 6, 2, shortest=1, triple=triple, dtype=torch.float64, device=device)
    # no order by sample
    inputs["prefixes"] = inputs["prefixes"].flip(0)[[1, 0, 3, 2, 5, 4, 7, 6]]
    inputs["other_prefixes"] = inputs["prefixes"][[4, 1, 6]] if other else None
    x = inputs.pop("embeddings")
    generator = torch.Generator().manual_seed(0)
    x.requires_grad_()
    value = gak.packed_alignment_kernel(x, **inputs, delta=0.7, normalize=normalize, log=True)
    weights = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    (value * weights.to(device)).sum().backward()
    again = torch.autograd.grad(
        (
            gak.packed_alignment_kernel(x, **inputs, delta=0.7, normalize=normalize, log=True) * weights.to(device)
        ).sum(),
        x,
    )[0]
    assert torch.equal(x.grad, again)

    def weighted(moved):
        return float((reference(moved, **inputs, delta=0.7, normalize=normalize) * weights).sum())

    for _ in range(4):
        step = torch.randn(x.shape, generator=generator, dtype=torch.float64) * 1e-4
        truth = weighted(x.detach().cpu() + step) - weighted(x.detach().cpu() - step)
        along = 2 * float((x.grad.cpu() * step).sum())
        assert abs(along - truth) <= 1e-5 * float(x.grad.norm() * step.norm())
    for log in (False, True):
        first = torch.autograd.grad(
            gak.packed_alignment_kernel(x, **inputs, normalize=None, log=log).sum(), x, create_graph=True
        )[0]
        with pytest.raises(NotImplementedError, match="no second derivative"):
            first.sum().backward()


@pytest.mark.parametrize("delta", [0.1, 1.0])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 5), (7, 3), (33, 18)])
def test_expected_alignment(gak, device, lengths, delta):
    x = torch.randn(sum(lengths), 5, generator=torch.Generator().manual_seed(0))
    phi = distances(x, None, None)[: lengths[0], lengths[0] :]
    value = gak.expected_alignment(x[: lengths[0]].to(device), x[lengths[0] :].to(device), delta=delta)
    truth = torch.from_numpy(alignment_and_gradient(phi, sum(lengths), delta)[0])
    torch.testing.assert_close(value.cpu().double(), truth, rtol=0, atol=2e-5)


def test_refuses(gak, device):
    x = torch.randn(5, 4, device=device)
    offsets, prefixes = torch.tensor([0, 2, 5]), torch.tensor([[0, 2], [1, 3]])
    bad = x.clone()
    bad[3] = math.nan
    for arguments, options, message in [
        ((x, torch.tensor([0, 4, 3, 5]), prefixes), {}, "`offsets` must increase"),
        ((x, offsets, torch.tensor([[0, 3]])), {}, "`prefixes` has a length"),
        ((x, offsets, torch.tensor([[2, 1]])), {}, "`prefixes` names a sample"),
        ((bad, offsets, prefixes), {}, "Row 3"),
        ((x, offsets, prefixes), {"delta": 0}, "`delta`"),
        ((x, offsets, prefixes), {"normalize": "both"}, "`normalize`"),
        ((x, offsets, prefixes), {"split": 2}, "go together"),
        ((x[:, :0], offsets, prefixes), {}, "`embeddings` must be"),
        ((x, offsets[None], prefixes), {}, "`offsets` must increase"),
    ]:
        with pytest.raises(ValueError, match=message):
            gak.packed_alignment_kernel(*arguments, **options)
    for dtype in (torch.int64, torch.bfloat16):
        with pytest.raises(ValueError, match="`distances` must be float32 or float64"):
            gak.recursion(torch.zeros(5, 5, dtype=dtype, device=device), offsets, prefixes)
    for y, delta, message in ((x, 1e-6, "`delta`"), (x, math.nan, "`delta`"), (x[:0], 1.0, "at least one slice")):
        with pytest.raises(ValueError, match=message):
            gak.expected_alignment(x, y, delta=delta)
