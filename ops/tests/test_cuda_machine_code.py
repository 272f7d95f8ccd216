"""The CUDA kernels compile to code that stays in registers, takes few instructions per sample and adds in vectors."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from cuda_machine_code import OF_THE_MODEL, compiler_version, kernels
from machine_code import cuobjdump
from ms_deform_attn.build import compiler
from ms_deform_attn.functional import available

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# instructions per sample and group of lanes, head dimension 32
MOST_INSTRUCTIONS = {"forward, fp32": 52, "forward, bf16": 100, "backward, fp32": 150, "backward, bf16": 160}


@pytest.mark.skipif(not available("cpu"), reason="CPU kernels are not built (no compiler here)")
def test_a_profiler_sees_every_kernel():
    every_kernel = runpy.run_path(str(BENCHMARKS / "every_kernel.py"))["main"]
    with torch.profiler.profile() as profile:
        every_kernel("cpu", ("cpu",))
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["ms_deform_attn::forward"] == calls["ms_deform_attn::backward"] == 2  # float32, bfloat16


needs_compiler = pytest.mark.skipif(
    compiler("cuda") is None or torch.version.cuda is None or cuobjdump() is None,
    reason="no nvcc, torch without CUDA, or no program that lists machine code",
)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels(capability):
    found = {kernel["kernel"]: kernel for kernel in kernels(capability)}
    assert len(found) > 50
    for name, kernel in found.items():
        if "double" not in name:
            assert kernel["stack"] == 0, kernel
            assert kernel["registers"] <= 64, kernel  # eight blocks of 128 threads fit a multiprocessor
        if "backward" in name and ", 4, 8, true" in name:
            # four corners; from Hopper on one addition of four numbers each
            assert sum(kernel["atomics"].values()) == (4 if capability >= 90 else 16), kernel
            assert all(("x4" in kind) == (capability >= 90) for kind in kernel["atomics"]), kernel
    for name, symbol in OF_THE_MODEL.items():
        assert found[symbol]["instructions"] <= MOST_INSTRUCTIONS[name], found[symbol]
    record = json.loads((BENCHMARKS / "machine_code.json").read_text())
    if record["compiler"] == compiler_version():
        recorded = {k["name"]: k for k in record["kernels"] if k["capability"] == capability}
        for name, symbol in OF_THE_MODEL.items():
            for key in ("registers", "stack", "instructions", "atomics"):
                assert found[symbol][key] == recorded[name][key]
