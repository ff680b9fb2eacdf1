"""Compiles for GPUs that are not here: down to machine code, never run."""

import os

import pytest


if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter takes the compiler's place", allow_module_level=True)

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def check(kernel, signature, constants, capability):
    # A number that is not annotated would come as float32.
    assert next(p.annotation_type for p in kernel.params if p.name == "inverse_square") == "fp64"
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = signature | dict.fromkeys(("BLOCK", *constants), "constexpr")
    for block in (16, 128):
        source = ASTSource(kernel, signature=signature, constexprs={"BLOCK": block, **constants})
        compiled = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": max(1, block // 32)}
        )
        assert len(compiled.asm["cubin"]) > 1000


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("own", "symmetric"), [(False, True), (True, False), (False, False)])
def test_cubin(gak, capability, own, symmetric):
    signature = {
        "phi": "*fp32",
        "stride": "i64",
        **dict.fromkeys(("row_start", "row_length", "column_start", "column_length"), "*i64"),
        "result": "*fp64",
        "columns": "i32",
        "inverse_square": "fp64",
    }
    check(gak._recursion, signature, {"OWN": own, "SYMMETRIC": symmetric}, capability)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("own", "expected"), [(False, False), (True, False), (False, True)])
def test_cubin_of_the_way_back(gak, capability, own, expected):
    pointers = ("row_start", "row_length", "row_group", "column_start", "column_length", "column_group")
    signature = {
        "upstream": "*fp32",
        "phi": "*fp32",
        "stride": "i64",
        **dict.fromkeys(pointers, "*i64"),
        **dict.fromkeys(("columns", "column_groups", "jobs"), "i32"),
        "workspace": "*fp32",
        "cells": "i64",
        "gradient": "*fp32",
        "inverse_square": "fp64",
    }
    check(gak._recursion_backward, signature, {"OWN": own, "EXPECTED": expected}, capability)
