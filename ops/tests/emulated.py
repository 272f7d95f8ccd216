"""The CUDA kernels on the CPU: `emulation/cuda.h` implements the CUDA constructs in C++."""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from ms_deform_attn import functional
from ms_deform_attn.build import SOURCES, cache_folder

Check = Literal["", "memory", "races"]

HEADERS = Path(__file__).parent / "emulation"
LAUNCH = re.compile(r"([A-Za-z_]\w*(?:<[^;{}]*?>)?)\s*<<<(.*?)>>>\s*\(", re.DOTALL)
# Neither contraction nor fast mathematics: what a kernel computes is what its source says.
FLAGS = ("-std=c++20", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-Wno-unknown-pragmas",
         "-U_FORTIFY_SOURCE")  # fmt: skip
CHECKS = {
    "": (),
    # the undefined behaviour that a kernel can cause; all kinds take ten times as long to compile
    "memory": ("-fsanitize=address,alignment,bounds,shift,signed-integer-overflow,float-cast-overflow",
               "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"),
    "races": ("-fsanitize=thread",),
}  # fmt: skip


def possible() -> bool:
    """Whether the emulation can be built here."""
    return sys.platform == "linux" and shutil.which("g++") is not None


def translated(source: str, architecture: int) -> str:
    """CUDA C++ of the operator as C++: launches, the architecture, the memory of `at::empty`, the dispatch key."""
    source = re.sub(r"#include <c10/cuda/.*>\n", "\n", source)
    source, launches = LAUNCH.subn(r"emulation::launch(\2, \1, ", source)
    assert launches > 0
    assert "<<<" not in source
    shared = r"emulation::shared<\1>(__COUNTER__, \3)"
    source = re.sub(r"__shared__ ([\w<>, ]+?) (\w+)\[(.+?)\];", rf"\1* const \2 = {shared};", source)
    source = source.replace("__CUDA_ARCH__", "EMULATED_ARCHITECTURE").replace("at::empty(", "emulation::empty(")
    source, registered = re.subn(r"(TORCH_LIBRARY_IMPL\(\w+, )CUDA,", r"\1CPU,", source)
    assert registered == 1
    source = re.sub(r'm\.impl\("(\w+)"', r'm.impl("emulated_\1"', source)
    return f'#define EMULATED_ARCHITECTURE {architecture}\n#include "cuda.h"\n#line 1 "cuda.cu"\n{source}'


def build(source: str, check: Check = "", architecture: int = 900) -> Path:
    """Compile the translation of a source, unless it has been compiled before. Returns the shared library."""
    from torch.utils import cpp_extension

    text = translated(source, architecture)
    flags = [*FLAGS, *CHECKS[check]]
    key = hashlib.sha256("\0".join([text, torch.__version__, *flags]).encode())
    for file in sorted(HEADERS.iterdir()):
        key.update(file.read_bytes())
    folder = cache_folder() / f"emulated-{key.hexdigest()[:16]}"
    library = folder / "kernels.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if library.exists():
            return library
        (folder / "kernels.cpp").write_text(text)
        includes = [f"-I{path}" for path in (HEADERS, *cpp_extension.include_paths())]
        objects = [folder / "kernels.o"]
        subprocess.run(["g++", *flags, *includes, "-c", folder / "kernels.cpp", "-o", objects[0]], check=True)
        if check == "races":
            objects.append(folder / "races.o")
            subprocess.run(["g++", *FLAGS, "-O2", "-c", HEADERS / "races.cpp", "-o", objects[1]], check=True)
        # not linked with -fsanitize=thread, whose functions are those of races.cpp
        sanitizer = CHECKS[check] if check == "memory" else ()
        made = folder / f"made-{os.getpid()}.so"
        torchs = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu"]
        subprocess.run(["g++", "-shared", *sanitizer, *objects, *torchs, "-o", made], check=True)
        made.replace(library)
    return library


@functools.cache
def load() -> None:
    """Register the emulated kernels: `$EMULATED_SOURCE` in place of the operator's, with `$EMULATED_CHECK`."""
    source = Path(os.environ.get("EMULATED_SOURCE", SOURCES["cuda"])).read_text()
    architecture = int(os.environ.get("EMULATED_ARCHITECTURE", "900"))
    library = build(source, os.environ.get("EMULATED_CHECK", ""), architecture)
    functional.register("emulated_forward", "emulated_backward")
    torch.ops.load_library(str(library))


@contextmanager
def emulated() -> Iterator[None]:
    """Use the emulated kernels in the operator, for the duration of a `with` block."""
    load()
    before = functional._kernels
    kernels = torch.ops.ms_deform_attn.emulated_forward, torch.ops.ms_deform_attn.emulated_backward
    functional._kernels = lambda value: kernels
    try:
        yield
    finally:
        functional._kernels = before
