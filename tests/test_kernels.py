"""The compiled kernels and how one is chosen. Triton by itself is tested in hub_kernels/gak-triton/tests."""

import json
import os
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from hf_sugar.alignment import (
    KernelFallbackWarning,
    backends,
    compiled_kernel,
    global_alignment_kernel,
    label_matrix,
    naive,
    packed_alignment_kernel,
    recursion,
)


ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "hub_kernels"
sys.path.insert(0, str(KERNELS))


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """A build of today's sources: that of the checkout if it is one, else a new one."""
    pytest.importorskip("kernels", reason="the compiled kernel needs the `kernels` package")
    import build_local

    for file in (KERNELS / "gak" / "build").glob("*/metadata.json"):
        if json.loads(file.read_text())["id"] == build_local.library_name():
            return KERNELS / "gak"
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler to build the kernel with")
    folder = tmp_path_factory.mktemp("kernels")
    build_local.build(folder)
    return folder


@pytest.fixture
def choose(monkeypatch):
    """Sets the environment of the selection and forgets what was chosen before."""

    def set_environment(path=None, kernels=None):
        for name, value in (("HF_SUGAR_KERNELS", kernels), ("HF_SUGAR_KERNEL_PATH", path)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, str(value))
        backends._select.cache_clear()

    yield set_environment
    backends._select.cache_clear()


@pytest.fixture(scope="module")
def gak(built):
    from kernels import get_local_kernel

    return get_local_kernel(built, backend="cpu")


# Agreement


def job(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    distances = 4 * torch.rand(20, 19, generator=generator, dtype=dtype)
    # more pairs than go through the recursion together, of all lengths in no order
    n, m, row, column = (torch.randint(low, 10, (70,), generator=generator) for low in (1, 1, 0, 0))
    return distances, row, column, n, m, n + m + row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("delta", [0.01, 0.15, 1.0, 100.0])
def test_equals_the_definition(gak, delta, dtype):
    arguments = job(dtype=dtype)
    # cells are as exact as a float64 is
    torch.testing.assert_close(
        gak.log_kernels(*arguments, delta), naive.log_kernels(*arguments, delta), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("delta", [0.05, 1.0])
def test_long_sequences(gak, delta):
    """Too long for a float64 without logarithms."""
    distances = 4 * torch.rand(500, 400, generator=torch.Generator().manual_seed(0))
    pair = [torch.tensor(numbers) for numbers in ([0, 3], [0, 5], [500, 2], [400, 2], [900, 4])]
    value = gak.log_kernels(distances, *pair, delta)
    torch.testing.assert_close(value, recursion.log_kernels(distances, *pair, delta), rtol=1e-12, atol=0)


def test_neighbours_change_no_bit(gak):
    """A pair's bits depend neither on its neighbours nor on how many there are."""
    arguments = job()
    value = gak.log_kernels(*arguments, 0.7)
    for p in range(0, 70, 7):
        alone = gak.log_kernels(arguments[0], *(index[p : p + 1] for index in arguments[1:]), 0.7)
        assert torch.equal(alone, value[p : p + 1])


def test_the_op_is_a_torch_op(gak):
    torch.library.opcheck(gak.ops.log_kernels, (*job(), 1.0))
    compiled = torch.compile(gak.log_kernels, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*job(), 1.0), gak.log_kernels(*job(), 1.0))


def test_pairs_outside_the_matrix_are_refused(gak):
    distances, *indices = job()
    for index, wrong in ((0, -1), (0, 20), (1, 19), (2, 0), (2, 21), (3, 20), (4, 0), (0, 2**62)):
        changed = [part.clone() for part in indices]
        changed[index][69] = wrong
        with pytest.raises(RuntimeError, match="pair 69 leaves the matrix"):
            gak.log_kernels(distances, *changed, 1.0)
    for wrong in (indices[0].int(), indices[0][:-1]):
        with pytest.raises(RuntimeError, match="must be contiguous int64 vectors of one length"):
            gak.log_kernels(distances, wrong, *indices[1:], 1.0)
    with pytest.raises(RuntimeError, match="`distances` must be a contiguous matrix of float32 or float64"):
        gak.log_kernels(distances.half(), *indices, 1.0)


@pytest.mark.parametrize("triple", [False, True])
def test_equals_the_pytorch_path(choose, built, monkeypatch, triple):
    choose(built, "local")
    lengths = torch.randint(1, 9, (40,), generator=torch.Generator().manual_seed(0))
    x = torch.randn(int(lengths.sum()), 8, generator=torch.Generator().manual_seed(1))
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    prefixes = torch.stack([torch.arange(40), lengths], dim=1)
    options = {"modality": torch.arange(len(x)) % 2, "split": 4} if triple else {}
    for normalize in (None, "self", "count", "self+count"):
        for others in (None, prefixes[3:9]):
            values = [
                packed_alignment_kernel(
                    x, offsets, prefixes, others, normalize=normalize, log=True, backend=backend, **options
                )
                for backend in ("local", "torch")
            ]
            torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)
    labels, share = label_matrix(x, offsets, prefixes, **options)
    monkeypatch.setenv("HF_SUGAR_KERNELS", "torch")
    expected, expected_share = label_matrix(x, offsets, prefixes, **options)
    torch.testing.assert_close(labels, expected, rtol=0, atol=1e-6)
    assert share == expected_share


def test_gradients_take_the_pytorch_path(choose, built):
    choose(built, "local")
    x = [torch.eye(3, dtype=torch.float64, requires_grad=True), torch.ones(2, 3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda a: global_alignment_kernel([a, x[1]], backend="local"), x[0])


# Selection

ARGUMENTS = (torch.eye(4), torch.tensor([0, 2, 4]), torch.tensor([[0, 2], [1, 1]]))


def test_what_is_asked_for_is_used(choose, built, monkeypatch, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(built, "torch")
        assert compiled_kernel("cpu") is None
        assert compiled_kernel("cpu", "local").__name__.startswith("_gak_cpu_")
        choose(built)
        assert compiled_kernel("cpu") is compiled_kernel("cpu", "local")
        assert compiled_kernel("cpu", "torch") is None
        # nothing built, or built for another device, is no reason to warn
        choose(kernels="")
        monkeypatch.setattr(backends, "CHECKOUT", tmp_path)
        assert compiled_kernel("cpu") is None
        packed_alignment_kernel(*ARGUMENTS)
        monkeypatch.setattr(backends, "CHECKOUT", built)
        assert compiled_kernel("mps") is None
    choose(kernels="fast")
    for backend, message in (
        ("auto", "HF_SUGAR_KERNELS in .* must be one of.*'fast'"),
        ("quick", "`backend`.*'quick'"),
    ):
        with pytest.raises(ValueError, match=message):
            compiled_kernel("cpu", backend)


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


@pytest.mark.extras
def test_first_calls_from_several_threads(built):
    environment = {**os.environ, "HF_SUGAR_KERNEL_PATH": str(built)}
    finished = subprocess.run([sys.executable, "-c", FIRST_CALLS], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_one_warning_with_the_reason(choose, tmp_path):
    choose(tmp_path, "local")
    with pytest.warns(KernelFallbackWarning, match=r"nothing is built for cpu tensors.*make kernels") as caught:
        value = packed_alignment_kernel(*ARGUMENTS)
        packed_alignment_kernel(*ARGUMENTS)
    assert len(caught) == 1 and caught[0].filename == __file__
    torch.testing.assert_close(value, packed_alignment_kernel(*ARGUMENTS, backend="torch"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [("cut", "Digest"), ("unknown", "Digest"), ("no digest", "no digest"), ("wrong", "the test call gave")],
)
def test_a_build_that_cannot_be_trusted_is_not_used(choose, built, monkeypatch, tmp_path, damage, message):
    shutil.copytree(built / "build", tmp_path / "build")
    variant = next(file.parent for file in (tmp_path / "build").glob("*cpu*/metadata.json"))
    if damage == "cut":
        library = next(variant.glob("*.so"))
        library.write_bytes(library.read_bytes()[:1000])
    elif damage == "unknown":
        (variant / "extra.py").write_text("")
    elif damage == "no digest":
        metadata = json.loads((variant / "metadata.json").read_text())
        del metadata["digest"]
        (variant / "metadata.json").write_text(json.dumps(metadata))
    else:
        wrong = types.SimpleNamespace(log_kernels=lambda *arguments: torch.zeros(2))
        monkeypatch.setattr(backends, "_load_local", lambda folder: wrong)
    choose(tmp_path)
    with pytest.warns(KernelFallbackWarning, match=message):
        assert compiled_kernel("cpu") is None


SPY = """
import socket, sys, warnings
looked_up = []
def spy(*arguments, **options):
    looked_up.append(arguments[:2])
    raise OSError("no network in this test")
socket.getaddrinfo = socket.socket.connect = socket.socket.connect_ex = socket.create_connection = spy
import torch
from hf_sugar.alignment import backends, compiled_kernel, label_matrix
warnings.simplefilter("ignore")
label_matrix(torch.eye(4), torch.tensor([0, 2, 4]), torch.tensor([[0, 2], [1, 1]]))
assert (compiled_kernel("cpu") is not None) == (sys.argv[1] == "built"), "selection"
print(len(looked_up))
backends._select.cache_clear()
warnings.simplefilter("error")
try:
    compiled_kernel("cpu", "hub")
except UserWarning as warning:
    assert "Hub kernel" in str(warning)
print(len(looked_up))
"""


@pytest.mark.parametrize("state", ["built", pytest.param("empty", marks=pytest.mark.extras)])
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


def test_build_files_are_valid():
    pytest.importorskip("kernels")
    from kernels._rust import Build

    for kernel in ("gak", "gak-triton"):
        assert Build.open(KERNELS / kernel)


@pytest.mark.extras
@pytest.mark.parametrize("interpret", ["0", "1"])
def test_triton(interpret):
    """Two processes: the interpreter and the compiler of Triton exclude each other."""
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
    finished = subprocess.run(
        [*command, str(KERNELS / "gak-triton" / "tests")],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        **{"capture_output": True, "text": True},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
