"""Compiles for GPUs that are not here: down to machine code, never run."""

import os

import pytest


if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter takes the compiler's place", allow_module_level=True)

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("own", "symmetric"), [(False, True), (True, False), (False, False)])
def test_cubin(gak, capability, own, symmetric):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        "phi": "*fp32",
        "stride": "i64",
        **dict.fromkeys(("row_start", "row_length", "column_start", "column_length"), "*i64"),
        "result": "*fp64",
        "inverse_square": "fp32",
        **dict.fromkeys(("BLOCK", "OWN", "SYMMETRIC"), "constexpr"),
    }
    for block in (16, 128):
        constants = {"BLOCK": block, "OWN": own, "SYMMETRIC": symmetric}
        source = ASTSource(gak._recursion, signature=signature, constexprs=constants)
        compiled = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": max(1, block // 32)}
        )
        assert len(compiled.asm["cubin"]) > 1000
