"""Values in Triton's interpreter (TRITON_INTERPRET=1) or on a GPU; without either, down to machine code, never run."""

import os

import pytest
import torch

from hf_sugar.alignment import naive, triton_kernel


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="no GPU: set TRITON_INTERPRET=1")


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("delta", [0.01, 0.3, 1.0, 100.0])
def test_equals_the_definition(delta, dtype):
    generator = torch.Generator().manual_seed(0)
    distances = 4 * torch.rand(80, 50, generator=generator, dtype=dtype)
    n, m = torch.tensor([1, 1, 5, 3, 70, 33]), torch.tensor([1, 7, 1, 4, 40, 40])
    row, column = torch.arange(6), torch.arange(6).flip(0)
    arguments = row, column, n, m, n + m + row, delta
    value = triton_kernel.log_kernels(distances.to(DEVICE), *arguments)
    torch.testing.assert_close(value.cpu(), naive.log_kernels(distances, *arguments), rtol=1e-12, atol=1e-12)


@runs
def test_label_matrix(monkeypatch):
    from hf_sugar.alignment import backends, kernel, label_matrix

    backends._test(triton_kernel, DEVICE)
    slices = torch.randn(9, 8, generator=torch.Generator().manual_seed(0), device=DEVICE)
    arguments = slices, torch.tensor([0, 2, 5, 9]), torch.tensor([[0, 2], [1, 1], [1, 3], [2, 1], [2, 4]])
    options = {"modality": torch.tensor([1, 0, 1, 0, 0, 0, 1, 1, 0]), "split": 4}
    monkeypatch.setattr(kernel, "compiled_kernel", lambda *_: None)
    expected, share = label_matrix(*arguments, **options)
    monkeypatch.setattr(kernel, "compiled_kernel", lambda *_: triton_kernel)
    labels, same_share = label_matrix(*arguments, **options)
    torch.testing.assert_close(labels, expected, rtol=0, atol=1e-6)
    assert share == same_share


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes the compiler's place")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("distances", ["*fp32", "*fp64"])
def test_compiles(capability, distances):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = triton_kernel._recursion
    # A number that is not annotated would come as float32.
    assert next(p.annotation_type for p in kernel.params if p.name == "inverse_square") == "fp64"
    signature = {"distances": distances, "width": "i64", **dict.fromkeys(("row", "column", "n", "m", "total"), "*i64")}
    signature |= {"result": "*fp64", "inverse_square": "fp64", "BLOCK": "constexpr"}
    for block in (16, 128):
        source = ASTSource(kernel, signature=signature, constexprs={"BLOCK": block})
        options = {"num_warps": max(1, block // 32)}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert len(compiled.asm["cubin"]) > 1000
