"""The recursion of the CUDA kernel in its host build: all that can be run of it without a GPU."""

import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from common import alignment_and_gradient, compare, log_kernel


SOURCE = """
#include "pair.h"
using namespace gak_cuda;
extern "C" long kept_bytes(int n, int m) {
  return kept_cells(n, m) * sizeof(Kept);
}
extern "C" double log_pair(const float* phi, long stride, int n, int m, double scale, void* border, void* kept) {
  return host_log_kernel(phi, stride, n, m, scale, static_cast<Cell*>(border), static_cast<Kept*>(kept));
}
extern "C" void add_gradient(
    const void* kept, long stride, int n, int m, double scale, float weight, bool expected_only, float* border,
    float* gradient) {
  host_gradient(static_cast<const Kept*>(kept), stride, n, m, scale, weight, expected_only, border, gradient);
}
"""
LENGTHS = [(1, 1), (2, 3), (5, 40), (31, 33), (32, 32), (33, 7), (64, 65), (100, 130)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("pair")
    (folder / "pair.cpp").write_text(SOURCE)
    include = Path(__file__).resolve().parents[1] / "gak_cuda"
    command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", f"-I{include}", "pair.cpp", "-o", "pair.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "pair.so"))
    pointer, long, integer, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_double
    library.kept_bytes.restype = long
    library.log_pair.restype = ctypes.c_double
    library.log_pair.argtypes = [pointer, long, integer, integer, real, pointer, pointer]
    library.add_gradient.argtypes = [
        *(pointer, long, integer, integer, real, ctypes.c_float, ctypes.c_bool),
        *(pointer, pointer),
    ]
    return library


def pair(lengths):
    """Squared distances of the pair, within those of more slices."""
    n, m = lengths
    phi = (2 * np.random.default_rng(n * m).random((n + 2, m + 3))).astype(np.float32)
    return phi[1 : 1 + n, 2 : 2 + m]


@pytest.mark.parametrize("delta", [0.01, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_strips(library, lengths, delta):
    n, m = lengths
    phi = pair(lengths)
    border = np.full(2 * m, np.nan)
    scale = 1 / (delta**2 * (n + m))
    value = library.log_pair(phi.ctypes.data, m + 3, n, m, scale, border.ctypes.data, None)
    expected = log_kernel(phi.astype(float), n + m, delta)
    compare(torch.tensor(value, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("length", [256, 1024])
def test_errors_of_equal_cells_do_not_add_up(library, length):
    """Local kernels of 1/3 keep log K near 0: what one cell loses in float32 would be lost a thousand times."""
    phi = np.full((length, length), 1.1, dtype=np.float32)
    border = np.full(2 * length, np.nan)
    delta = math.sqrt(1.1 / (2 * length * math.log(2)))
    scale = 1 / (delta**2 * 2 * length)
    value = library.log_pair(phi.ctypes.data, length, length, length, scale, border.ctypes.data, None)
    expected = log_kernel(phi.astype(float), 2 * length, delta)
    assert abs(expected) < 10
    assert abs(value - expected) < 1e-9


@pytest.mark.parametrize("delta", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_way_back(library, lengths, delta):
    n, m = lengths
    phi = pair(lengths)
    border = np.full(2 * m, np.nan)
    kept = np.full(library.kept_bytes(n, m) // 4, np.nan, dtype=np.float32)
    scale = 1 / (delta**2 * (n + m))
    library.log_pair(phi.ctypes.data, m + 3, n, m, scale, border.ctypes.data, kept.ctypes.data)
    border.fill(np.nan)
    expected, gradient = alignment_and_gradient(phi.astype(float), n + m, delta)
    for expected_only, weight, truth in ((True, 1.0, expected), (False, -0.5, -0.5 * gradient)):
        # it adds to what is there, and touches nothing beside the pair
        place = np.full((n + 2, m + 3), 3.0, dtype=np.float32)
        library.add_gradient(
            *(kept.ctypes.data, m + 3, n, m, scale, weight, expected_only, border.ctypes.data),
            place[1:, 2:].ctypes.data,
        )
        inside = place[1 : 1 + n, 2 : 2 + m].copy()
        place[1 : 1 + n, 2 : 2 + m] = 3
        assert (place == 3).all()
        np.testing.assert_allclose(inside - 3, truth, atol=2e-5 * max(1, np.abs(truth).max()))
