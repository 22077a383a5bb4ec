"""The Triton kernels compile for GPUs that need not be there: the interpreter does not notice all."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from dgc.core.kernels import cuda_kernels, cuda_steps, cuda_tables, decode_kernels, decode_torch
from dgc.core.kernels import encode_kernels, fit_kernels, trim_kernels
from dgc.core.quantize import VALUE_BITS, parameter_bytes


def assembly(kernel, types, constants):
    names = [name for name in kernel.arg_names if name not in constants]
    own = {name: kind for name, kind in types.items() if name in names}
    signature = {**dict.fromkeys(names, "*i64"), **own, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature, constexprs=constants)
    options = {"enable_fp_fusion": False}
    return compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]


# A launch first calls a function that Triton makes of the arguments' names, beside its own names.
backend = make_backend(GPUTarget("cuda", 80, 32))
for module in (cuda_kernels, cuda_steps, decode_kernels, encode_kernels, fit_kernels, trim_kernels):
    for kernel in vars(module).values():
        if isinstance(kernel, JITFunction):
            bind = create_function_from_signature(kernel.signature, kernel.params, backend)
            bind(*(torch.zeros(1) for _ in kernel.arg_names))

block = {"BLOCK": cuda_tables.BLOCK}
assembly(cuda_kernels.check, {}, block)
assembly(cuda_kernels.pick_digit, {}, {})
assembly(decode_kernels.clear, {}, block)
bytes_ = {"message": "*u8", "data": "*u8", **dict.fromkeys(("width", "runs", "stride"), "i32")}
assembly(decode_kernels.checksum, bytes_, {"RUN": 256})
for state, update, momentum in (("*fp32", True, True), ("*i16", True, True), ("*i16", False, False)):
    types = {"u": state, "v": state, "rows": "*fp32", "low": "*i32", "what": "*fp32"}
    constants = {"UPDATE": update, "MOMENTUM": momentum, **block}
    ptx = assembly(cuda_kernels.advance, types, constants)
    values = {"held": "*fp32", "sent": "*fp32", "count": "i32"}
    ptx += assembly(cuda_kernels.subtract, types | values, {"MASKING": momentum, **block})
    for shift in (24, 0):
        assembly(cuda_kernels.count_digits, types, {"SHIFT": shift, **block})
    assembly(cuda_kernels.count_ties, types, block)
    ptx += assembly(cuda_kernels.collect, types, block)
    assert "fma." not in ptx, "fused multiply-adds round otherwise than the reference"
    assert ".ftz" not in ptx, "denormals are flushed"

for kernel in (cuda_steps.squares_finite, cuda_steps.precondition, cuda_steps.decay):
    ptx = assembly(kernel, {"rows": "*fp32", "scales": "*fp32"}, block)
    assert "fma." not in ptx and ".ftz" not in ptx and "approx" not in ptx and "div.full" not in ptx
    if kernel is cuda_steps.precondition:
        assert "sqrt.rn.f32" in ptx and "div.rn.f32" in ptx

floats = dict.fromkeys(("thresholds", "values", "ordered"), "*fp32") | {"low": "*i32"}
for known in (False, True):
    assembly(trim_kernels.start, floats, {"KNOWN": known})
assembly(trim_kernels.judge, floats, {})
for places in ("*i32", "*i64"):
    assembly(trim_kernels.key_by_place, {"keys": places}, block)
    assembly(trim_kernels.take, {"places": places, "marks": "*i32", **floats}, block)
assembly(trim_kernels.key_by_magnitude, floats, block)
assembly(trim_kernels.mark, {"marks": "*i32"}, block)
ptx = assembly(trim_kernels.remember, floats, {})

slots = {"values": "*fp32", "decoded": "*fp32", "held": "*i32", "parameters": "*i16", "num_tensors": "i32"}
assembly(fit_kernels.find_bounds, slots, block)
for bits in VALUE_BITS:
    assembly(fit_kernels.give_codes, slots, {"VALUE_BITS": bits, **block})
    search, levels = bits in (2, 3, 4), 1 << (bits - 1)
    if bits < 32:
        bins = {"BIN_BITS": 7 if search else 0}
        assembly(fit_kernels.fill_histogram, slots, {**bins, **block})
        ptx += assembly(fit_kernels.find_levels, slots, {"LEVELS": levels, "SEARCH": search, **bins})
assert "fma." not in ptx and ".ftz" not in ptx

bytes_ = {"message": "*u8", "head": "*u8", "parameters": "*u8", "words": "*i32", "finite": "*i1"}
numbers = dict.fromkeys(("low_bits", "head_bytes", "num_tensors", "slots", "width"), "i32")
types = slots | bytes_ | numbers | {"room": "i64"}
for kernel in ("hold", "move_front", "add_quotients", "hold_what_fits", "split_gaps", "pack", "place_ones"):
    assembly(getattr(encode_kernels, kernel), types, block)
assembly(encode_kernels.judge_room, types, {})
assembly(encode_kernels.finish, types, {})
assembly(encode_kernels.begin, types, {"VALUE_BITS": 4, "NOT_FINITE": 8, **block})

block = {"BLOCK": decode_torch.BLOCK}
sizes = dict.fromkeys(("width", "head_bytes", "num_tensors", "slots", "low_bits"), "i32")
floats = {"values": "*fp32", "scales": "*fp32"}
types = sizes | floats | {"messages": "*u8", "head": "*u8", "numel": "i64"}
for bits in VALUE_BITS:
    constants = {"VALUE_BITS": bits, "PARAMETER_BYTES": parameter_bytes(bits), **block}
    flags = {"NOT_FINITE": 8, "SOME_UNUSED": 16, "RICE": 32}
    assembly(decode_kernels.read_frames, types, constants | flags)
    for levels in (1, 8):
        assembly(decode_kernels.finish, types, constants | {"LEVELS": levels})
assembly(decode_kernels.measure, types, block)
assembly(decode_kernels.place_ones, types, block)
ptx = assembly(decode_kernels.add_values, types, {"LEVELS": 8, **block})
assert "fma." not in ptx and ".ftz" not in ptx
"""


def test_kernels_compile_without_a_gpu() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
