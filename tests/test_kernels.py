"""The compiled kernels and how one is chosen. The op by itself is tested in hub_kernels/*/tests."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tslearn.metrics import cdist_gak, unnormalized_gak

from hf_sugar.alignment import (
    KernelFallbackWarning,
    compiled_kernel,
    global_alignment_kernel,
    label_matrix,
    packed_alignment_kernel,
    selection,
)


ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "hub_kernels"
sys.path[:0] = [str(KERNELS), str(KERNELS / "gak" / "benchmarks")]

from common import compare, gen_inputs, reference  # noqa: E402


MODES = (None, "self", "count", "self+count")


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """A build of today's sources: that of the checkout if it is one, else a new one."""
    pytest.importorskip("kernels", reason="the compiled kernel needs the `kernels` package")
    if sys.version_info < (3, 11):
        pytest.skip("hub_kernels/build_local.py needs Python 3.11")
    import build_local

    name = f"_gak_cpu_{build_local.tree_hash(KERNELS / 'gak', 'cpu')}"
    for file in (KERNELS / "gak" / "build").glob("*/metadata.json"):
        if json.loads(file.read_text())["id"] == name:
            return KERNELS / "gak"
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler to build the kernel with")
    folder = tmp_path_factory.mktemp("kernels")
    build_local.build("gak", "cpu", folder)
    return folder / "gak"


@pytest.fixture
def choose(monkeypatch):
    """Sets the environment of the selection and forgets what was chosen before."""

    def set_environment(**environment):
        for name in ("HF_SUGAR_KERNELS", "HF_SUGAR_KERNEL_PATH"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        selection._select.cache_clear()

    yield set_environment
    selection._select.cache_clear()


@pytest.fixture
def local(choose, built):
    choose(HF_SUGAR_KERNELS="local", HF_SUGAR_KERNEL_PATH=built)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KernelFallbackWarning)
        assert compiled_kernel("cpu") is not None


@pytest.fixture(scope="module")
def gak(built):
    from kernels import get_local_kernel

    return get_local_kernel(built, backend="cpu")


# Agreement


@pytest.mark.parametrize("isa", ["", "avx2", "portable"])
def test_tests_of_the_kernel_pass(built, isa):
    """With the instructions of this machine, and with less."""
    environment = {**os.environ, "GAK_BUILD": str(built), "OMP_NUM_THREADS": "1", "GAK_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(KERNELS / "gak" / "tests")]
    if isa:
        command += ["-k", "brute or reference or close or (gradcheck and True)"]
    finished = subprocess.run([*command, "-c", os.devnull], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("triple", [False, True])
def test_equals_the_pytorch_path(gak, triple):
    # more slices than one block holds
    inputs = gen_inputs(220, 15, 32, 2, shortest=1, triple=triple)
    exact = {**inputs, "embeddings": inputs["embeddings"].double()}
    other = inputs["prefixes"][5:40]
    for normalize in MODES:
        options = {"delta": 0.8, "normalize": normalize, "log": True}
        expected = packed_alignment_kernel(**exact, **options, backend="torch")
        compare(gak.packed_alignment_kernel(**inputs, **options), expected, 1e-5)
        compare(gak.packed_alignment_kernel(**exact, **options), expected, 1e-10)
        compare(packed_alignment_kernel(**inputs, **options, backend="torch"), expected, 1e-5)
        some = gak.packed_alignment_kernel(**inputs, other_prefixes=other, **options)
        compare(some, expected[:, 5:40], 1e-5)


def test_gradients_equal_those_of_the_pytorch_path(local):
    inputs = gen_inputs(6, 5, 12, 2, shortest=1, dtype=torch.float64)
    x = inputs.pop("embeddings")
    weights = torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = []
    for backend in ("local", "torch"):
        leaf = x.clone().requires_grad_()
        value = packed_alignment_kernel(leaf, **inputs, normalize="self+count", backend=backend)
        gradients.append(torch.autograd.grad((value * weights).sum(), leaf)[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_equals_tslearn(local):
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(5)]
    unit = [(s / s.norm(dim=1, keepdim=True)).numpy() for s in x]
    sigma = 0.7 * math.sqrt(8)
    value = global_alignment_kernel(x, delta=0.7, normalize=None, backend="local").numpy()
    expected = [[float(unnormalized_gak(a, b, sigma=sigma)) for b in unit] for a in unit]
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    value = global_alignment_kernel(x, delta=0.7, backend="local").numpy()
    np.testing.assert_allclose(value, cdist_gak(unit, sigma=sigma), rtol=1e-9)


def test_labels_are_those_of_the_pytorch_path(choose, built):
    inputs = gen_inputs(24, 6, 32, 3, shortest=1)
    choose(HF_SUGAR_KERNELS="torch")
    expected, expected_share = label_matrix(**inputs)
    choose(HF_SUGAR_KERNELS="local", HF_SUGAR_KERNEL_PATH=built)
    labels, share = label_matrix(**inputs)
    torch.testing.assert_close(labels, expected, rtol=0, atol=2e-6)
    assert share == expected_share
    sample, length = inputs["prefixes"].T
    assert (labels[sample[:, None] == sample] == 1).all() and labels.max() <= 1
    first = inputs["offsets"][sample[length == 1]]
    x, codes = inputs["embeddings"][first], inputs["modality"][first]
    for i, a in enumerate(x):
        for j, b in enumerate(x):
            half = slice(None, 16) if codes[i] == codes[j] else slice(16, None)
            cosine = torch.cosine_similarity(a[half], b[half], dim=0)
            if first[i] != first[j]:
                torch.testing.assert_close(labels[length == 1][:, length == 1][i, j], cosine, rtol=0, atol=1e-6)


lean = settings(max_examples=25, deadline=None)


@lean
@given(
    samples=st.integers(1, 9),
    slices=st.integers(1, 7),
    triple=st.booleans(),
    delta=st.floats(0.05, 20),
    seed=st.integers(0, 10_000),
    normalize=st.sampled_from(MODES),
)
def test_properties(gak, samples, slices, triple, delta, seed, normalize):
    inputs = gen_inputs(samples, slices, 6, 2, shortest=1, triple=triple, seed=seed)
    options = {"delta": delta, "normalize": normalize, "log": True}
    value = gak.packed_alignment_kernel(**inputs, **options)
    assert torch.equal(value, value.T)
    compare(value, reference(**inputs, delta=delta, normalize=normalize), 1e-5 if delta >= 0.1 else 1e-4)
    if normalize in ("self", "self+count"):
        assert (value.diagonal() == 0).all()
    if normalize == "count" or (normalize == "self" and not triple):
        assert value.max() <= 1e-5

    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    starts = inputs["offsets"]
    picked = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in order.tolist()])
    moved = {
        "embeddings": inputs["embeddings"][picked],
        "offsets": torch.nn.functional.pad((starts[1:] - starts[:-1])[order].cumsum(0), (1, 0)),
        "prefixes": torch.stack([order.argsort()[inputs["prefixes"][:, 0]], inputs["prefixes"][:, 1]], dim=1),
        "modality": inputs["modality"][picked] if triple else None,
        "split": inputs["split"],
    }
    compare(gak.packed_alignment_kernel(**moved, **options), value, 1e-6)


@lean
@given(delta=st.floats(0.05, 10.0), factor=st.floats(1.05, 3.0), seed=st.integers(0, 10_000))
def test_single_slices_grow_with_delta(gak, delta, factor, seed):
    inputs = gen_inputs(6, 1, 8, shortest=1, triple=False, seed=seed)
    low, high = (gak.packed_alignment_kernel(**inputs, delta=d, log=True) for d in (delta, delta * factor))
    assert (high > low)[~torch.eye(6, dtype=torch.bool)].all()


# Selection

ARGUMENTS = (torch.eye(4), torch.tensor([0, 2, 4]), torch.tensor([[0, 2], [1, 1]]))


def test_torch_is_used_when_told(choose, built):
    choose(HF_SUGAR_KERNELS="torch", HF_SUGAR_KERNEL_PATH=built)
    assert compiled_kernel("cpu") is None
    assert compiled_kernel("cpu", "local").__name__.startswith("_gak_cpu_")
    choose(HF_SUGAR_KERNEL_PATH=built)
    assert compiled_kernel("cpu") is compiled_kernel("cpu", "local")
    assert compiled_kernel("cpu", "torch") is None


def test_nothing_built_is_no_reason_to_warn(choose, built, monkeypatch, tmp_path):
    choose(HF_SUGAR_KERNELS="")
    monkeypatch.setattr(selection, "CHECKOUT", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled_kernel("cpu") is None
        packed_alignment_kernel(*ARGUMENTS)
        # nor is a build for another device
        monkeypatch.setattr(selection, "CHECKOUT", built)
        assert compiled_kernel("mps") is None


FIRST_CALLS = """
import concurrent.futures, threading, warnings
from hf_sugar.alignment import compiled_kernel
warnings.simplefilter("error")
together = threading.Barrier(8)
def first(_):
    together.wait()
    return compiled_kernel("cpu")
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = set(pool.map(first, range(8)))
assert len(found) == 1 and None not in found, found
"""


def test_first_calls_from_several_threads(built):
    environment = {**os.environ, "HF_SUGAR_KERNEL_PATH": str(built)}
    finished = subprocess.run([sys.executable, "-c", FIRST_CALLS], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_one_warning_with_the_reason(choose, tmp_path):
    choose(HF_SUGAR_KERNELS="local", HF_SUGAR_KERNEL_PATH=tmp_path)
    with pytest.warns(KernelFallbackWarning, match=r"nothing is built for cpu tensors.*make kernels") as caught:
        value = packed_alignment_kernel(*ARGUMENTS)
        packed_alignment_kernel(*ARGUMENTS)
    assert len(caught) == 1 and caught[0].filename == __file__
    torch.testing.assert_close(value, packed_alignment_kernel(*ARGUMENTS, backend="torch"))


@pytest.mark.parametrize("damage", ["cut", "unknown", "no digest"])
def test_a_damaged_build_is_never_loaded(choose, built, tmp_path, damage):
    shutil.copytree(built / "build", tmp_path / "build")
    variant = next(file.parent for file in (tmp_path / "build").glob("*cpu*/metadata.json"))
    if damage == "cut":
        library = next(variant.glob("*.so"))
        library.write_bytes(library.read_bytes()[:1000])
    elif damage == "unknown":
        (variant / "extra.py").write_text("")
    else:
        metadata = json.loads((variant / "metadata.json").read_text())
        del metadata["digest"]
        (variant / "metadata.json").write_text(json.dumps(metadata))
    choose(HF_SUGAR_KERNEL_PATH=tmp_path)
    with pytest.warns(KernelFallbackWarning, match="no digest" if damage == "no digest" else "Digest"):
        assert compiled_kernel("cpu") is None


def test_a_kernel_that_is_wrong_is_refused(choose, monkeypatch, tmp_path):
    class Wrong:
        @staticmethod
        def packed_alignment_kernel(*arguments, **options):
            return torch.zeros(2, 2)

    choose(HF_SUGAR_KERNEL_PATH=tmp_path)
    monkeypatch.setattr(selection, "_load_local", lambda folder, device: Wrong)
    with pytest.warns(KernelFallbackWarning, match="the test call gave"):
        assert compiled_kernel("cpu") is None


def test_unknown_choice(choose):
    choose(HF_SUGAR_KERNELS="fast")
    with pytest.raises(ValueError, match="HF_SUGAR_KERNELS must be one of.*'fast'"):
        compiled_kernel("cpu")
    with pytest.raises(ValueError, match="`backend` must be one of.*'fast'"):
        global_alignment_kernel([torch.eye(2)], backend="fast")


def test_errors_are_those_of_the_pytorch_path(local):
    embeddings, offsets, prefixes = ARGUMENTS
    bad = embeddings.clone()
    bad[3, 1] = math.nan
    with pytest.raises(ValueError, match="Slice 1 of sequence 1 .row 3.*NaN"):
        packed_alignment_kernel(bad, offsets, prefixes)
    with pytest.raises(ValueError, match="Slice 1 of sequence 1 .row 3.*NaN"):
        packed_alignment_kernel(bad.requires_grad_(), offsets, prefixes)
    with pytest.raises(ValueError, match="Slice 1 of sequence 1 .row 3.*all zeros"):
        packed_alignment_kernel(embeddings * torch.tensor([1, 1, 1, 0])[:, None], offsets, prefixes)
    good = {"embeddings": embeddings + 1, "offsets": offsets, "prefixes": prefixes}
    good |= {"modality": torch.tensor([0, 1, 1, 0]), "split": 2}
    packed_alignment_kernel(**good)
    for change in [
        {"offsets": offsets + 1},
        {"offsets": offsets[:1]},
        {"offsets": torch.tensor([0, 3, 3, 4])},
        {"prefixes": prefixes[:0]},
        {"prefixes": prefixes.T[:1].T},
        {"prefixes": torch.tensor([[0, 3]])},
        {"prefixes": torch.tensor([[-1, 1]])},
        {"other_prefixes": torch.tensor([[0, 1], [1, 0]])},
        {"delta": 0},
        {"split": 4},
        {"split": None},
        {"modality": None},
        {"modality": torch.tensor([0, 1, 1])},
        {"modality": torch.tensor([0, 1, 1, 2])},
        {"modality": torch.tensor([0, 1, 1, 0.5])},
    ]:
        with pytest.raises(ValueError) as expected:
            packed_alignment_kernel(**good | change, backend="torch")
        with pytest.raises(ValueError, match=f"^{re.escape(str(expected.value))}$"):
            packed_alignment_kernel(**good | change)


SPY = """
import socket, sys, warnings
looked_up = []
def spy(*arguments, **options):
    looked_up.append(arguments[:2])
    raise OSError("no network in this test")
socket.getaddrinfo = socket.socket.connect = socket.socket.connect_ex = socket.create_connection = spy
import torch
from hf_sugar.alignment import compiled_kernel, label_matrix, selection
warnings.simplefilter("ignore")
label_matrix(torch.eye(4), torch.tensor([0, 2, 4]), torch.tensor([[0, 2], [1, 1]]))
assert (compiled_kernel("cpu") is not None) == (sys.argv[1] == "built"), "selection"
print(len(looked_up))
selection._select.cache_clear()
warnings.simplefilter("error")
try:
    compiled_kernel("cpu", "hub")
except UserWarning as warning:
    assert "Hub kernel" in str(warning)
print(len(looked_up))
"""


@pytest.mark.parametrize("state", ["built", "empty"])
def test_no_network_unless_asked(built, tmp_path, state):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment["HF_SUGAR_KERNEL_PATH"] = str(built if state == "built" else tmp_path)
    command = [sys.executable, "-c", SPY, state]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    by_default, on_request = map(int, finished.stdout.split())
    assert by_default == 0
    # With a build at hand the Hub is not asked even then; without, the spy sees that it is.
    assert (on_request == 0) == (state == "built")


# What this machine builds


def test_the_benchmark_runs(built):
    command = [sys.executable, str(ROOT / "benchmarks" / "alignment.py"), "--cases", "6x3x16", "--repeats", "1"]
    environment = {**os.environ, "HF_SUGAR_KERNEL_PATH": str(built)}
    finished = subprocess.run([*command, "--no-tslearn"], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "| 6x3x16 |" in finished.stdout and "recursion per pair" in finished.stdout


def test_build_files_are_valid():
    pytest.importorskip("kernels")
    from kernels._rust import Build

    for kernel in ("gak", "gak-triton"):
        assert Build.open(KERNELS / kernel)


def test_the_library_asks_for_no_new_system(built):
    checker = pytest.importorskip("kernel_abi_check", reason="kernel-abi-check is not installed")
    library = checker.ObjectFile(next((built / "build").glob("*cpu*/*.so")))
    assert not library.check_manylinux("manylinux_2_28")
    assert not library.check_python_abi("3.9")


def test_the_two_kernels_share_their_host_side():
    ours, theirs = KERNELS / "gak" / "torch-ext" / "gak", KERNELS / "gak-triton" / "torch-ext" / "gak_triton"
    assert (ours / "pairs.py").read_text() == (theirs / "pairs.py").read_text()


@pytest.mark.extras
def test_cuda_compiles(tmp_path):
    """Compiled for sm_80, sm_90, sm_100 and sm_120; it is not run, because that takes a GPU."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    pytest.importorskip("kernels")
    import build_local

    variant = build_local.build("gak", "cuda", tmp_path)
    assert next(variant.glob("*.so")).stat().st_size > 10_000


@pytest.mark.extras
@pytest.mark.parametrize("part", ["interpreter", "compile"])
def test_triton(part, tmp_path):
    """Two processes: the interpreter and the compiler of Triton exclude each other."""
    pytest.importorskip("triton", reason="triton is not installed")
    pytest.importorskip("kernels", reason="the Triton kernel is loaded with the `kernels` package")
    import build_local

    for backend in ("cpu", "cuda"):
        build_local.build("gak-triton", backend, tmp_path)
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1" if part == "interpreter" else "0",
        "GAK_TRITON_BUILD": str(tmp_path / "gak-triton"),
    }
    folder = KERNELS / "gak-triton" / "tests" / f"test_{part}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(folder)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
