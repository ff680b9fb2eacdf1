import os
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(FOLDER / "benchmarks"))


@pytest.fixture(scope="session")
def device() -> str:
    return os.environ.get("GAK_TEST_DEVICE", "cpu")


@pytest.fixture(scope="session")
def gak(device):
    from kernels import get_local_kernel

    return get_local_kernel(Path(os.environ.get("GAK_TRITON_BUILD", FOLDER)), backend=device)
