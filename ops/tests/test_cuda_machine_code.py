"""The CUDA kernels as machine code: in registers, with few instructions per sample, adding in vectors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_machine_code import cuobjdump
from ms_deform_attn.build import compiler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler("cuda") is None or torch.version.cuda is None, reason="no nvcc, or torch without CUDA"),
    pytest.mark.skipif(cuobjdump() is None, reason="no program that lists machine code"),
]

SCRIPT = Path(__file__).with_name("cuda_machine_code.py")
# instructions per sample and group of lanes, head dimension 32
MOST_INSTRUCTIONS = {
    "forward_kernel<float, float, 4, 8>": 52,
    "forward_kernel<c10::BFloat16, float, 8, 4>": 100,
    "backward_kernel<float, float, 4, 8, true, true>": 135,
    "backward_kernel<c10::BFloat16, float, 4, 8, true, true>": 150,
}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels(capability):
    done = subprocess.run([sys.executable, SCRIPT, str(capability)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = {found["kernel"]: found for found in map(json.loads, done.stdout.splitlines())}
    assert len(kernels) > 50
    for name, found in kernels.items():
        if "double" not in name:
            assert found["stack"] == 0, found
            assert found["registers"] <= 64, found  # two blocks of 512 threads fit a multiprocessor
        if "backward" in name and ", 4, 8, true" in name:
            # four corners; from Hopper on one addition of four numbers each
            assert sum(found["atomics"].values()) == (4 if capability >= 90 else 16), found
            assert all(("x4" in kind) == (capability >= 90) for kind in found["atomics"]), found
    if capability == 90:
        for name, most in MOST_INSTRUCTIONS.items():
            assert kernels[name]["instructions"] <= most, kernels[name]
