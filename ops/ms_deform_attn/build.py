"""Compile the C++ kernels, once, and find them again.

A build is stored under a key of everything it depends on: the source, the torch version, its C++ ABI, the
platform and the instruction set of the processor. A change of any of them simply is another build.
"""

import hashlib
import os
import platform
import shutil
import sys
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "csrc" / "cpu.cpp"
COMPILE_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math",
                 "-fno-signed-zeros")  # fmt: skip


def cache_folder() -> Path:
    """Where builds are kept: `$MS_DEFORM_ATTN_CACHE`, or `ms_deform_attn` in the user's cache folder."""
    named = os.environ.get("MS_DEFORM_ATTN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(named) if named else Path(base) / "ms_deform_attn"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    return next((x for x in cpuinfo.read_text().splitlines() if x.startswith(("flags", "Features"))), "")


def library_path() -> Path:
    """The file that the current source, torch and processor build to; it need not exist."""
    key = hashlib.sha256()
    for part in (
        SOURCE.read_text(),
        torch.__version__,
        str(torch.compiled_with_cxx11_abi()),
        platform.platform(),
        _processor(),
        " ".join(COMPILE_FLAGS),
    ):
        key.update(part.encode() + b"\0")
    return cache_folder() / key.hexdigest()[:16] / "ms_deform_attn_cpu.so"


def compiler() -> str | None:
    """The C++ compiler that `build` would use, or None."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def build(verbose: bool = False) -> Path:
    """Compile the CPU kernels for this machine unless that is done already.

    Returns:
        The shared library.

    Raises:
        RuntimeError: there is no C++ compiler, or it failed.
    """
    target = library_path()
    if target.exists():
        return target
    if compiler() is None:
        raise RuntimeError(
            "no C++ compiler found (looked for $CXX, c++, g++, clang++). Install one, for example with "
            "'apt install g++' or 'conda install cxx-compiler', and run 'python -m ms_deform_attn build' again. "
            "Without it the PyTorch version of the operator is used."
        )
    from torch.utils import cpp_extension  # imports setuptools: not for everybody who only uses the operator

    # ninja comes as a dependency, but its program is on the PATH only in an activated environment
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    folder = target.parent.with_name(f"{target.parent.name}.building-{os.getpid()}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        cpp_extension.load(
            name="ms_deform_attn_cpu",
            sources=[str(SOURCE)],
            extra_cflags=list(COMPILE_FLAGS),
            build_directory=str(folder),
            is_python_module=False,
            verbose=verbose,
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / "ms_deform_attn_cpu.so", target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target
