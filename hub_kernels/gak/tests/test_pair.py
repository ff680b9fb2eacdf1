"""The recursion of the CUDA kernel in its host build: all that can be run of it without a GPU."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from common import compare, log_kernel


SOURCE = """
#include "pair.h"
extern "C" double log_pair(const float* phi, long stride, long a, int n, long b, int m, float scale, void* border) {
  return gak_cuda::host_log_kernel(phi, stride, a, n, b, m, scale, static_cast<gak_cuda::Cell*>(border));
}
"""


@pytest.fixture(scope="module")
def log_pair(tmp_path_factory):
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("pair")
    (folder / "pair.cpp").write_text(SOURCE)
    include = Path(__file__).resolve().parents[1] / "gak_cuda"
    command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", f"-I{include}", "pair.cpp", "-o", "pair.so"]
    subprocess.run(command, cwd=folder, check=True)
    function = ctypes.CDLL(str(folder / "pair.so")).log_pair
    function.restype = ctypes.c_double
    long, integer = ctypes.c_long, ctypes.c_int
    pointer = ctypes.c_void_p
    function.argtypes = [pointer, long, long, integer, long, integer, ctypes.c_float, pointer]
    return function


@pytest.mark.parametrize("delta", [0.01, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("lengths", [(1, 1), (2, 3), (5, 40), (31, 33), (32, 32), (33, 7), (64, 65), (100, 130)])
def test_strips(log_pair, lengths, delta):
    n, m = lengths
    generator = np.random.default_rng(n * m)
    phi = (2 * generator.random((n + 2, m + 3))).astype(np.float32)
    border = np.full(2 * m, np.nan, dtype=np.float32)
    scale = 1 / (delta**2 * (n + m))
    value = log_pair(phi.ctypes.data, m + 3, 1, n, 2, m, scale, border.ctypes.data)
    expected = log_kernel(phi[1 : 1 + n, 2 : 2 + m].astype(float), n + m, delta)
    compare(torch.tensor(value), torch.tensor(expected), 1e-5)
