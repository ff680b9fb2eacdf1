import sys
from pathlib import Path

import torch
from kernels.benchmark import Benchmark


sys.path.insert(0, str(Path(__file__).parent))

from common import compare, gen_inputs, reference  # noqa: E402


class Small(Benchmark):
    seed = 0
    # samples, slices, dim, prefixes per sample
    shape: tuple[int, int, int, int | None] = (64, 8, 1536, None)

    def setup(self):
        self.inputs = gen_inputs(*self.shape, device=self.device)

    def benchmark_labels(self):
        self.out = self.kernel.packed_alignment_kernel(**self.inputs, delta=1.0, normalize="self+count", log=True)

    def verify_labels(self) -> torch.Tensor:
        expected = reference(**self.inputs, delta=1.0, normalize="self+count")
        compare(self.out, expected, 1e-5)
        return expected.to(self.out)


class Medium(Small):
    shape = (256, 8, 1536, None)
    # The reference goes pair by pair: minutes.
    verify_labels = None


class Long(Small):
    shape = (64, 64, 1536, 4)
    verify_labels = None
