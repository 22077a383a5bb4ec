"""The Triton kernels compile for GPUs that need not be there: the interpreter does not notice all."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from dgc.core.kernels import cuda


def assembly(kernel, types, constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {**dict.fromkeys(names, "*i64"), **types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature, constexprs=constants)
    options = {"enable_fp_fusion": False}
    return compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]


assembly(cuda._check, {}, {"BLOCK": cuda.BLOCK})
for state, update, momentum in (("*fp32", True, True), ("*i16", True, True), ("*i16", False, False)):
    types = {"u": state, "v": state, "rows": "*fp32", "low": "*i32", "what": "*fp32", "seed": "i32"}
    constants = {"UPDATE": update, "MOMENTUM": momentum, "BLOCK": cuda.BLOCK}
    ptx = assembly(cuda._advance, types, constants)
    assert "fma." not in ptx, "fused multiply-adds round otherwise than the reference"
    assert ".ftz" not in ptx, "denormals are flushed"
"""


def test_kernels_compile_without_a_gpu() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
