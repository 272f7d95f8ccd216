"""Compile the Triton kernels for absent GPUs: `python ops/tests/triton_variants.py 90 fp32,bf16 32`.

Prints a line of json per variant: registers and bytes of the stack per thread, from the listing of the machine code,
and its kinds of atomic additions. The arguments are the compute capability (90 is Hopper), precisions and head
dimensions.
"""

import collections
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from machine_code import listing
from ms_deform_attn import triton_kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SIZES = {"N": "i32", "Q": "i32", "heads": "i32", "D": "i32", "blocks": "i32"}
ACCUMULATED = ("location", "grad_value", "grad_location", "grad_attention")  # in fp32, or fp64 for fp64


def variants(precision: str, D: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, types of the arguments, and constants, as the launches in `triton_kernels` have them."""
    wide = precision if precision == "fp64" else "fp32"
    constants = {
        "level_count": 4,
        "points": 4,
        "acc_type": tl.float64 if precision == "fp64" else tl.float32,
        "block_q": triton_kernels.BLOCK_Q,
        "block_d": triton.next_power_of_2(D),
    }

    def types(*tensors: str) -> dict[str, str]:
        return {name: f"*{wide if name in ACCUMULATED else precision}" for name in tensors} | {"levels": "*i32"} | SIZES

    yield "forward", triton_kernels._forward, types("value", "location", "attention", "output"), constants
    tensors = types("grad_output", "value", "location", "attention", "grad_value", "grad_location", "grad_attention")
    for need_value, need_samples in ((True, True), (True, False), (False, True)):
        needs = {"need_value": need_value, "need_samples": need_samples}
        name = "backward" + " value" * need_value + " samples" * need_samples
        yield name, triton_kernels._backward, tensors, constants | needs


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, D: int) -> dict[str, Any]:
    """Registers, stack and atomic additions of a variant's machine code."""
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    attributes = {}
    for i, name in enumerate(kernel.arg_names):
        if types.get(name, "").startswith("*") or (name == "D" and D % 16 == 0):
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        resources, code = listing(Path(file.name))
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", resources)}
    atomics = collections.Counter(re.findall(r"\b(?:RED|REDG|ATOM|ATOMG)\.E\.ADD[A-Z0-9.x]*", code))
    return {"registers": used["REG"], "stack": used["STACK"], "atomics": dict(atomics)}


if __name__ == "__main__":
    capability, precisions, dimensions = int(sys.argv[1]), sys.argv[2].split(","), map(int, sys.argv[3].split(","))
    for D in dimensions:
        for precision in precisions:
            for name, kernel, types, constants in variants(precision, D):
                result = compiled(kernel, types, constants, capability, D)
                print(json.dumps({"precision": precision, "D": D, "kernel": name, **result}), flush=True)
