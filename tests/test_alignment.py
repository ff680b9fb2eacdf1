import math

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
    label_matrix,
    log_delannoy,
    naive,
    packed_alignment_kernel,
    recursion,
    slices,
)


MODES = (None, "self", "count", "self+count")


@pytest.fixture(autouse=True, scope="module")
def without_compiled_kernels():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_SUGAR_KERNELS", "torch")
        yield


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
    x, c = sequences(lengths), codes(lengths) if triple else None
    options = {"delta": delta, "normalize": normalize, "split": 4 if triple else None}
    value = global_alignment_kernel(x, modality_x=c, **options)
    each = list(zip(x, c or [None] * len(x), strict=True))
    expected = [[enumerated(a, b, delta, normalize, ca, cb, options["split"]) for b, cb in each] for a, ca in each]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)
    others = {"modality_x": c[:2], "modality_y": c[2:]} if triple else {}
    rectangular = global_alignment_kernel(x[:2], x[2:], **others, **options)
    torch.testing.assert_close(rectangular, value[:2, 2:], rtol=1e-10, atol=0)


@pytest.mark.parametrize("delta", [0.1, 1.0, 100.0])
def test_float32_is_close_to_float64(delta):
    x = sequences((1, 3, 12, 12, 7, 30), dim=64)
    for normalize in MODES:
        options = {"delta": delta, "normalize": normalize, "log": True}
        exact = global_alignment_kernel(x, **options)
        value = global_alignment_kernel([s.float() for s in x], **options)
        assert value.dtype == torch.float32
        assert ((value - exact).abs() / exact.abs().clamp(min=1)).max() <= 1e-5


@pytest.mark.parametrize("factor", [1e12, 1e-12])
def test_scale_of_slices_does_not_matter(factor):
    x = sequences((1, 3, 2), dtype=torch.float32)
    options = {"modality_x": codes((1, 3, 2)), "split": 3}
    value = global_alignment_kernel([s * factor for s in x], **options)
    torch.testing.assert_close(value, global_alignment_kernel(x, **options), rtol=0, atol=1e-6)


@pytest.mark.parametrize("triple", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_float32_of_close_slices(triple, same):
    """2 - 2 cos alone is wrong by up to 7e-5 here."""
    lengths = (1, 2, 1, 3, 1, 5, 2)
    slices = torch.cat(sequences(lengths, dim=200, dtype=torch.float32))
    slices[1::3] = slices[0] + 0.03 * slices[1::3]
    slices[2::5] = slices[0]
    options = {"delta": 0.1, "normalize": None, "log": True}
    if triple:
        options |= {"split": 100, "modality_x": codes(lengths)} | ({} if same else {"modality_y": codes(lengths)})
    value, exact = (
        global_alignment_kernel(s, None if same else s, **options)
        for s in (slices.split(lengths), slices.double().split(lengths))
    )
    assert ((value - exact).abs() / exact.abs().clamp(min=1)).max() < 2e-6
    assert ((exact > -1) & (exact < -1e-3)).any()  # small enough for the error to show


def test_equals_tslearn():
    x = [torch.nn.functional.normalize(s, dim=1) for s in sequences((1, 2, 6, 11))]
    value = global_alignment_kernel(x, delta=0.7, normalize=None)
    for i, a in enumerate(x):
        for j, b in enumerate(x):
            sigma = 0.7 * math.sqrt((len(a) + len(b)) / 2)
            assert value[i, j].item() == pytest.approx(unnormalized_gak(a.numpy(), b.numpy(), sigma=sigma), rel=1e-9)
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
    for wrong, message in ((0, "at least 1"), (2.7, "`n` must hold integers"), (True, "`n` must hold integers")):
        with pytest.raises(ValueError, match=message):
            log_delannoy(wrong, 3)


# Known values of the normalisations, and where they fail


@pytest.mark.parametrize(
    ("delta", "cross", "normalize", "expected"),
    [
        (0.5, 0.3, "self", ["0.03", "0.02", "0.02", "0.03", "0.0004"]),
        (1.0, 0.0, "self", ["0.23", "0.17", "0.16", "0.18", "0.005"]),
        (1.0, 0.3, "self", ["0.33", "0.30", "0.34", "0.43", "0.012"]),
        (2.0, 0.3, "self", ["0.72", "0.71", "0.76", "0.81", "0.029"]),
        (1.0, 0.0, "self+count", ["0.13"]),  # dividing by the count removes the bias of lengths
        (1.0, 0.3, "self+count", ["0.31"]),
    ],
)
def test_scale_by_length(delta, cross, normalize, expected):
    for (n, m), number in zip(((1, 1), (2, 2), (4, 4), (8, 8), (2, 8))[-len(expected) :], expected, strict=True):
        x, y = with_cosines(n, m, cross)
        value = global_alignment_kernel([x], [y], delta=delta, normalize=normalize).item()
        assert f"{value:.{len(number) - 2}f}" == number


E1, E2 = [1.0, 0.0], [0.0, 1.0]


def test_triple_kernel_is_not_positive_definite():
    slices = [torch.tensor([half + E1], dtype=torch.float64) for half in (E1, E2, E1)]
    value = global_alignment_kernel(slices, modality_x=[[IMAGE], [IMAGE], [TEXT]], split=2)
    low = 1 / (2 * math.e - 1)
    expected = torch.tensor([[1, low, 1], [low, 1, 1], [1, 1, 1]], dtype=torch.float64)
    torch.testing.assert_close(value, expected)
    assert torch.linalg.eigvalsh(value)[0].item() == pytest.approx(-0.306, abs=5e-4)


def test_triple_kernel_exceeds_its_self_kernels():
    slices = [torch.tensor([E1 + E1, E2 + E1], dtype=torch.float64)] * 2
    value = global_alignment_kernel(slices, modality_x=[[IMAGE, IMAGE], [TEXT, TEXT]], split=2)
    assert value[0, 1].item() == pytest.approx(1.604, abs=5e-4)


# Properties

lengths_strategy = st.lists(st.integers(1, 7), min_size=1, max_size=6)
deltas = st.floats(0.2, 5.0)
seeds = st.integers(0, 10_000)
lean = settings(max_examples=10, deadline=None)


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


@pytest.mark.parametrize("triple", [False, True])
def test_blocks_and_chunks_change_nothing(monkeypatch, triple):
    """Many small blocks of slices and chunks of pairs give what one of each gives."""
    lengths = [5, 1, 9, 2, 7, 7, 3, 12, 1, 4]
    embeddings, offsets = pack(sequences(lengths))
    prefixes = torch.tensor([[s, n] for s in range(10) for n in {1, lengths[s]}])
    options = {"normalize": "self+count"}
    options |= {"modality": torch.cat(codes(lengths)), "split": 3} if triple else {}
    results = []
    for block, strip, cells in ((1024, 64, 1 << 17), (1, 3, 50), (17, 1, 1 << 17)):
        monkeypatch.setattr(slices, "BLOCK_SLICES", block)
        monkeypatch.setattr(slices, "STRIP_SLICES", strip)
        monkeypatch.setattr(recursion, "CHUNK_CELLS", cells)
        x = embeddings.clone().requires_grad_()
        value = packed_alignment_kernel(x, offsets, prefixes, **options)
        value[0, 2:].sum().backward()
        cross = packed_alignment_kernel(embeddings, offsets, prefixes[:9], prefixes[4:], **options)
        labels = label_matrix(embeddings, offsets, prefixes, label_kernel="mean")[0]
        heat = expected_alignment(embeddings[:20], embeddings[20:], delta=0.5)
        results.append((value.detach(), cross, x.grad, labels, heat))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(results[0][1], results[0][0][:9, 4:], rtol=1e-9, atol=0)


@lean
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6), st.floats(0.01, 5), seeds)
def test_recursion_equals_the_definition(lengths, delta, seed):
    n, m = torch.tensor(lengths).T
    generator = torch.Generator().manual_seed(seed)
    distances = 4 * torch.rand(12, 11, generator=generator, dtype=torch.float64)
    row, column = (torch.randint(0, 3, (len(n),), generator=generator) for _ in range(2))
    arguments = distances, row, column, n, m, n + m + row, delta
    expected = naive.log_kernels(*arguments)
    torch.testing.assert_close(recursion.log_kernels(*arguments), expected, rtol=1e-10, atol=1e-12)
    traced = recursion.log_kernels(distances.requires_grad_(), *arguments[1:])
    torch.testing.assert_close(traced.detach(), expected, rtol=1e-10, atol=1e-12)


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
def test_long_sequences(delta):
    """Against the plain recursion, one row after the other, where neither K nor its parts fit in a float64."""
    x = sequences((500, 450), dim=16, dtype=torch.float32)
    unit = [torch.nn.functional.normalize(s.double(), dim=1) for s in x]
    exponent = (2 - 2 * unit[0] @ unit[1].T) / (delta**2 * 950)
    local = -exponent - torch.log(2 - torch.exp(-exponent))
    row = np.full(451, -np.inf)
    row[0] = 0.0
    for cells in local.numpy():
        before, row = np.logaddexp(row[1:], row[:-1]), np.full(451, -np.inf)
        for j, cell in enumerate(cells):
            row[j + 1] = cell + np.logaddexp(row[j], before[j])
    x = [s.requires_grad_() for s in x]
    value = global_alignment_kernel(x[:1], x[1:], delta=delta, normalize=None, log=True)
    assert value.item() == pytest.approx(row[450], rel=1e-5)
    value.sum().backward()
    assert all(s.grad.isfinite().all() for s in x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_lifted_to_float32(dtype):
    x = [s.to(dtype) for s in sequences((3, 5), dtype=torch.float32)]
    expected = global_alignment_kernel([s.float() for s in x])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = global_alignment_kernel(x)
        labels, _ = label_matrix(*pack([s.float() for s in x]), torch.tensor([[0, 3], [1, 5]]), normalize="self")
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    torch.testing.assert_close(labels, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("triple", [False, True])
def test_expected_alignment_equals_enumeration(triple):
    x, y = sequences((3, 4))
    cx, cy = codes((3, 4), seed=1)
    k = local_matrix(x, y, 0.6 * math.sqrt(3.5), *((cx, cy, 3) if triple else ()))
    visits, total = torch.zeros(3, 4, dtype=torch.float64), 0.0
    for path in alignments(3, 4):
        weight = math.prod(k[i][j] for i, j in path)
        total += weight
        for cell in path:
            visits[cell] += weight
    options = {"modality_x": cx, "modality_y": cy.tolist(), "split": 3} if triple else {}
    with torch.no_grad():
        value = expected_alignment(x, y, delta=0.6, **options)
    torch.testing.assert_close(value, visits / total, rtol=1e-9, atol=1e-12)
    assert not value.requires_grad


# Labels


@pytest.mark.parametrize("triple", [False, True])
def test_labels_substitute_cosines_ones_and_clamp(triple):
    lengths = (3, 2, 1, 2, 1)
    x, c = sequences(lengths, dtype=torch.float32), codes(lengths, seed=3)
    x[4], c[4] = -x[2], c[2]  # the cosine of opposite slices stays negative
    embeddings, offsets = pack(x)
    prefixes = torch.tensor([[0, 1], [0, 3], [1, 1], [1, 2], [2, 1], [3, 2], [4, 1]])
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
                torch.testing.assert_close(labels[i, j], torch.cosine_similarity(a, b, dim=0), atol=1e-6, rtol=1e-5)
            else:
                clamped += int(k[i, j] > 1)
                torch.testing.assert_close(labels[i, j], k[i, j].clamp(max=1))
    assert labels[4, 6].item() == pytest.approx(-1, abs=1e-6)
    off = sum(s != t for s in prefixes[:, 0].tolist() for t in prefixes[:, 0].tolist())
    assert share == pytest.approx(clamped / off)
    assert not labels.requires_grad


def test_labels_report_the_share_clamped():
    angle = math.radians(20)
    y = torch.tensor([[math.cos(angle), (-1) ** i * math.sin(angle)] for i in range(8)])
    assert global_alignment_kernel([torch.tensor([E1])], [y], normalize="self+count").item() == pytest.approx(
        1.084, abs=5e-4
    )
    embeddings, offsets = pack([torch.tensor([E1]), y, torch.tensor([E2]), torch.tensor([E1])])
    prefixes = torch.tensor([[0, 1], [1, 8], [2, 1], [3, 1]])
    labels, share = label_matrix(embeddings, offsets, prefixes)
    # of twelve entries the four of E1 with y are above 1, the two of the equal slices are 1 and count for nothing
    assert share == pytest.approx(4 / 12)
    assert labels[0, 1] == labels[3, 1] == labels[0, 3] == 1
    assert labels[0, 2].item() == pytest.approx(0, abs=1e-6)
    assert label_matrix(embeddings, offsets, prefixes, normalize="self")[1] == 0
    assert label_matrix(embeddings, offsets, prefixes[:1]) == (torch.ones(1, 1), 0.0)


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
        ((x, [x[0][:, :5]]), {}, r"`y\[0\]` has shape \(2, 5\); expected \(length, 6\)"),
        (([],), {}, "at least one sequence"),
        *(((x,), {"delta": delta}, "`delta` must lie between 0.001 and") for delta in (0.0, -1.0, math.nan, 1e200)),
        ((x,), {"normalize": "both"}, "`normalize`.*'both'"),
        ((x,), {"backend": "cuda"}, "`backend`.*'cuda'"),
        ((x,), {"split": 3}, "go together"),
        ((x,), {"modality_x": modality}, "go together"),
        ((x, x), {"modality_x": modality, "split": 3}, "`modality_y`"),
        ((x, x), {"modality_y": modality, "split": 3}, "`modality_x`"),
        ((x,), {"modality_x": modality[:1], "split": 3}, r"\[2\] entries for \[2, 3\] slices"),
        ((x,), {"modality_x": [[0, 2], [1, 1, 0]], "split": 3}, "`modality` must hold 0"),
        ((x,), {"modality_x": modality, "split": 6}, "`split` must lie between 1 and 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            global_alignment_kernel(*arguments, **options)


def test_errors_name_the_slice():
    bad = sequences((2, 3), dtype=torch.float32)
    good, triple = bad[1][2].clone(), {"modality_x": [[0, 0], [0, 0, 0]], "split": 3}
    for value, options, what in (
        (good.fill_(float("nan")), {}, "is infinite or not a number and"),
        (torch.full((6,), 1e25), {}, "is infinite"),
        (torch.zeros(6), {}, "is all zeros and has no direction"),
        (torch.full((6,), 1e-25), {}, "is all zeros"),
        (torch.eye(6)[0], triple, "is all zeros after its first 3 dimensions"),
    ):
        bad[1][2] = value
        with pytest.raises(ValueError, match=rf"Slice 2 of sequence 1 \(row 4 of .*\) {what}"):
            global_alignment_kernel(bad, **options)


def test_errors_of_the_packed_form():
    embeddings, offsets = pack(sequences((2, 3)))
    prefixes = torch.tensor([[0, 1], [1, 3]])
    for arguments, message in [
        ((embeddings, torch.tensor([0, 2]), prefixes), "from 0 to 5"),
        ((embeddings, torch.tensor([0, 3, 3, 5]), prefixes), "increase"),
        ((embeddings, offsets.double(), prefixes), "`offsets` must hold integers"),
        ((embeddings, offsets, torch.tensor([[0, 3]])), r"`prefixes\[0\]` asks for 3 slices of sample 0.* has 2"),
        ((embeddings, offsets, torch.tensor([[1, 1], [1, 0]])), r"`prefixes\[1\]` asks for 0 slices"),
        ((embeddings, offsets, torch.tensor([[2, 1]])), r"of sample 2; samples run from 0 to 1"),
        ((embeddings, offsets, torch.tensor([0, 1])), r"rows \(sample, length\)"),
        ((embeddings, offsets, prefixes, torch.tensor([[0, 9]])), r"`other_prefixes\[0\]`"),
        ((embeddings.long(), offsets, prefixes), "`embeddings`.*floating-point.*int64"),
        ((embeddings[0], offsets, prefixes), "`embeddings` must be floating-point of shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            packed_alignment_kernel(*arguments)
    with pytest.raises(ValueError, match="`label_kernel`.*'dtw'"):
        label_matrix(embeddings, offsets, prefixes, label_kernel="dtw")
