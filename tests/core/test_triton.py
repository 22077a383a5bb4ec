"""The Triton kernels compile for GPUs that need not be there: the interpreter does not notice all."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
from itertools import product

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from dgc.core.kernels import cuda


def assembly(kernel, types, constants, arch):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {**dict.fromkeys(names, "*i64"), **types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature, constexprs=constants)
    options = {"enable_fp_fusion": False}
    return compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]


for arch in (80, 90):
    assembly(cuda._check, {}, {"BLOCK": cuda.BLOCK}, arch)
    variants = ((True, True), (True, False), (False, False))
    for state, (update, momentum) in product(("*fp32", "*i16"), variants):
        types = {"u": state, "v": state, "rows": "*fp32", "low": "*i32", "what": "*fp32"}
        constants = {"UPDATE": update, "MOMENTUM": momentum, "BLOCK": cuda.BLOCK}
        ptx = assembly(cuda._advance, {**types, "seed": "i32"}, constants, arch)
        assert "fma." not in ptx, "fused multiply-adds round otherwise than the reference"
        assert ".ftz" not in ptx, "denormals are flushed"
"""


def test_kernels_compile_without_a_gpu() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
