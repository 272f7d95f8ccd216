"""The Triton kernels compile for absent GPUs, stay in registers and add in vectors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from machine_code import cuobjdump

SCRIPT = Path(__file__).parent / "triton_variants.py"
pytestmark = pytest.mark.skipif(cuobjdump() is None, reason="no Triton, or Triton without NVIDIA's tools")

MOST_REGISTERS = 168  # of 255: three blocks of 128 threads fit a multiprocessor
LITTLE_STACK = 16  # bytes: a value or two that wait in memory


def variants(capability: int, precisions: str, dimensions: str, cache: Path) -> list[dict]:
    """The output of `triton_variants.py`, in a process without the interpreter that the other tests use."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, SCRIPT, str(capability), precisions, dimensions]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict], capability: int) -> None:
    for variant in found:
        adds = variant["atomics"]
        assert bool(adds) == ("value" in variant["kernel"]), variant  # only its gradient is summed from several threads
        if variant["precision"] == "fp64" or variant["D"] != 32:
            continue
        assert variant["registers"] <= MOST_REGISTERS, variant
        assert variant["stack"] <= LITTLE_STACK, variant
        # four additions at once from Hopper on: a quarter of the instructions
        if adds and capability >= 90:
            assert all("F32x4" in name for name in adds), variant
            assert sum(adds.values()) == 8, variant
        elif adds:
            assert sum(adds.values()) == 32, variant


@pytest.mark.slow
def test_the_models_kernels_for_hopper(tmp_path):
    found = variants(90, "fp32,bf16", "32", tmp_path)
    assert len(found) == 8
    check(found, 90)
    registers = {(v["precision"], v["kernel"]): v["registers"] for v in found}
    assert registers["fp32", "forward"] <= 80
    assert registers["bf16", "forward"] <= 64


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_variant_compiles(capability, tmp_path):
    found = variants(capability, "fp32,bf16,fp16,fp64", "1,4,30,32,64,71,128,256", tmp_path)
    assert len(found) == 4 * 4 * 8
    check(found, capability)
