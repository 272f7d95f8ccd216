"""The CUDA kernels as machine code for absent GPUs: `python ops/tests/cuda_machine_code.py 80 90`.

Prints a line of JSON per compute capability and kernel: its registers, the bytes that it spills to local memory, and
the instructions and atomic additions per sample of its loop over the samples. `--output` writes those of the kernels
that the model calls, such as `ops/benchmarks/machine_code.json`.
"""

import argparse
import collections
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine_code import listing
from ms_deform_attn.build import CUDA_FLAGS, SOURCES, compiler
from torch.utils import cpp_extension

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Zx0-9_.]*)([^;]*);")
OF_THE_MODEL = {
    "forward, fp32": "forward_kernel<float, float, 4, 8>",
    "forward, bf16": "forward_kernel<c10::BFloat16, float, 8, 4>",
    "backward, fp32": "backward_kernel<float, float, 4, 8, true, true>",
    "backward, bf16": "backward_kernel<c10::BFloat16, float, 4, 8, true, true>",
}
SHUFFLES = 6  # between lanes, for each sample that they exchange


def loops(code: list[tuple[str, str, str]]) -> list[list[str]]:
    """The instructions of every loop, from the target of a branch backwards to the branch."""
    position = {address: i for i, (address, _, _) in enumerate(code)}
    found = []
    for i, (_, name, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", operands)
        start = position.get(f"{int(target[1], 16):04x}", i) if name.startswith("BRA") and target else i
        if start < i:
            found.append([x[1] for x in code[start : i + 1] if x[1] != "NOP"])
    return found


def loop_over_samples(code: list[tuple[str, str, str]]) -> dict[str, float | dict[str, float]]:
    """Instructions per sample of the shortest loop in which lanes exchange samples."""
    best: list[str] = []
    samples = 0
    for body in loops(code):
        exchanged = sum(x.startswith("SHFL.IDX") for x in body) // SHUFFLES
        if exchanged and (not best or len(body) < len(best)):
            best, samples = body, exchanged
    if not best:
        return {}
    atomics = collections.Counter(x for x in best if "RED" in x)
    return {
        "instructions": len(best) / samples,
        "atomics": {name: count / samples for name, count in atomics.items()},
    }


def kernels(capability: int, source: Path = SOURCES["cuda"]) -> Iterator[dict[str, Any]]:
    """Compile for a compute capability, and describe every kernel."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cubin"
        includes = [f"-I{path}" for path in cpp_extension.include_paths("cuda")]
        command = [compiler("cuda"), *CUDA_FLAGS, *includes, f"-arch=sm_{capability}", "-cubin", "-o", file]
        subprocess.run([*command, source], check=True)
        resources, listed = listing(file)
    used = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", resources))
    for text in re.split(r"\n\s*Function : ", listed)[1:]:
        symbol, _, body = text.partition("\n")
        name = subprocess.run(["c++filt", symbol.strip()], capture_output=True, text=True, check=True).stdout
        name = name.replace("(anonymous namespace)::", "").removeprefix("void ").partition("(")[0]
        used_by = {key: int(n) for key, n in re.findall(r"(REG|STACK):(\d+)", used[symbol.strip()])}
        result = {"kernel": name.strip(), "registers": used_by["REG"], "stack": used_by["STACK"]}
        yield {"capability": capability} | result | loop_over_samples(INSTRUCTION.findall(body))


def compiler_version() -> str:
    """The version of nvcc, such as `nvcc 13.0`."""
    text = subprocess.run([compiler("cuda"), "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.search(r'release ([0-9.]+)', text)[1]}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capabilities", type=int, nargs="+", help="such as 90 for Hopper")
    parser.add_argument("--source", type=Path, default=SOURCES["cuda"], help="another version of csrc/cuda.cu")
    parser.add_argument("--output", type=Path, help="file for the record")
    arguments = parser.parse_args()
    found = []
    for capability in arguments.capabilities:
        for kernel in kernels(capability, arguments.source):
            found.append(kernel)
            print(json.dumps(kernel), flush=True)
    if arguments.output:
        by_name = {(kernel["capability"], kernel["kernel"]): kernel for kernel in found}
        chosen = []
        for name, symbol in OF_THE_MODEL.items():
            for capability in arguments.capabilities:
                chosen.append({"name": name, **by_name[capability, symbol]})
        record = {"compiler": compiler_version(), "kernels": chosen}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
