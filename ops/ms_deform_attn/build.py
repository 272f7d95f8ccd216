"""Compile the C++ and CUDA kernels and cache them.

The cache key is a hash of everything a build depends on: the source, the torch version, its C++ ABI, the flags, the
platform, and the instruction set of the CPU or the architecture of the GPU.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch

Device = Literal["cpu", "cuda"]

SOURCES = {device: Path(__file__).parent / "csrc" / name for device, name in (("cpu", "cpu.cpp"), ("cuda", "cuda.cu"))}
# -fopenmp: without it ATen's parallel_for, which is compiled here, runs on one thread. No -ffast-math, which would
# change the handling of NaN and infinity and the order of sums.
CPU_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
             *(("-fopenmp",) if sys.platform == "linux" else ()))  # fmt: skip
CUDA_FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr")
# Without a GPU on this machine: Ampere and Hopper, and PTX for later architectures.
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


def cache_folder() -> Path:
    """Where builds are kept: `$MS_DEFORM_ATTN_CACHE`, or `ms_deform_attn` in the user's cache folder.

    Where another user owns that folder or can write to it, builds are kept in a folder of this user's own inside it.
    """
    named = os.environ.get("MS_DEFORM_ATTN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # still relative without a home
    folder = Path(named or Path(base if os.path.isabs(base) else tempfile.gettempdir(), "ms_deform_attn")).resolve()
    return folder if not os.path.exists(folder) or _is_private(folder) else folder / f"user-{os.geteuid()}"


def _is_private(path: Path) -> bool:
    """Whether only this user and root can change a file or a folder."""
    if not hasattr(os, "geteuid"):  # Windows, whose modes say nothing about other users
        return True
    found = path.stat()
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022


def problem(library: Path) -> str | None:
    """Why an existing library must not be loaded, which runs its code; None if it may be."""
    for path in (library.parent.parent, library.parent, library):
        if not _is_private(path):
            return f"another user owns {path} or can write to it"
    # the system ends a process that loads a truncated library; builds of earlier versions have no digest
    recorded = library.with_suffix(".sha256")
    if recorded.exists() and recorded.read_text() != hashlib.sha256(library.read_bytes()).hexdigest():
        return f"{library} is damaged"
    return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    return next((x for x in cpuinfo.read_text().splitlines() if x.startswith(("flags", "Features"))), "")


@functools.cache
def architectures() -> str:
    """GPU architectures to compile for: `$TORCH_CUDA_ARCH_LIST`, those of this machine, or the default."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if named or not torch.cuda.is_available():
        return named or DEFAULT_ARCHITECTURES
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found))


def library_path(device: Device, source: Path | None = None) -> Path | None:
    """The file that a build of the current source, torch and machine has; it need not exist.

    None where torch itself cannot use such a device. Another source can take the place of the operator's own.
    """
    if device == "cuda" and torch.version.cuda is None:
        return None
    target = _processor() if device == "cpu" else architectures()
    key = hashlib.sha256()
    for part in (
        (source or SOURCES[device]).read_text(encoding="utf-8"),
        torch.__version__,
        str(torch.compiled_with_cxx11_abi()),
        platform.platform(),
        target,
        " ".join(CPU_FLAGS if device == "cpu" else CUDA_FLAGS),
    ):
        key.update(part.encode() + b"\0")
    return cache_folder() / key.hexdigest()[:16] / f"ms_deform_attn_{device}.so"


def compiler(device: Device) -> str | None:
    """The compiler that `build` would use, or None."""
    if device == "cpu":
        return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None) or shutil.which("nvcc")


def _toolkit(nvcc: str) -> Path:
    """The CUDA toolkit's folder, which nvcc is asked for: on the PATH it may be a link or a script."""
    remarks = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = next((line.partition("TOP=")[2] for line in remarks.splitlines() if "TOP=" in line), None)
    return Path(top or Path(nvcc).resolve().parent.parent).resolve()


def prepare(device: Device) -> list[str]:
    """Let torch's extension builder find the tools of this machine. Returns flags for the linker."""
    # ninja comes as a dependency, but its program is on the PATH only in an activated environment
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if device == "cpu":
        return []
    from torch.utils import cpp_extension

    home = _toolkit(compiler("cuda"))
    cpp_extension.CUDA_HOME = str(home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
    return [f"-L{folder}" for folder in sorted(home.glob("targets/*/lib"))]


def build(device: Device, verbose: bool = False, source: Path | None = None) -> Path:
    """Compile the kernels for a device of this machine, unless a build exists that can be used.

    Args:
        device: "cpu" or "cuda".
        verbose: show the compiler's commands and remarks.
        source: the kernels' source, in place of the operator's own.

    Returns:
        The shared library.

    Raises:
        RuntimeError: there is no compiler, or it failed, or torch was built without CUDA.
    """
    target = library_path(device, source)
    if target is None:
        raise RuntimeError(f"torch {torch.__version__} is built without CUDA: there is nothing to compile for a GPU")
    if target.exists() and problem(target) is None:
        return target
    if compiler(device) is None and device == "cpu":
        raise RuntimeError(
            "no C++ compiler found (looked for $CXX, c++, g++, clang++). Install one, for example with "
            "'apt install g++' or 'conda install cxx-compiler', and run 'python -m ms_deform_attn build' again. "
            "Without it the PyTorch version of the operator is used."
        )
    if compiler(device) is None:
        raise RuntimeError(
            f"no CUDA compiler found (looked for nvcc in $CUDA_HOME and on the PATH). Install the CUDA toolkit "
            f"{torch.version.cuda} and run 'python -m ms_deform_attn build' again. Without it the Triton kernels run."
        )
    link_flags = prepare(device)
    from torch.utils import cpp_extension  # imports setuptools: not for everybody who only uses the operator

    folder = target.parent.with_name(f"{target.parent.name}.building-{os.getpid()}")
    cache = target.parent.parent
    cache.parent.mkdir(parents=True, exist_ok=True)
    for own in (cache, folder, target.parent):
        own.mkdir(mode=0o755, exist_ok=True)
    target.parent.chmod(0o755)
    try:
        cpp_extension.load(
            name=target.stem,
            sources=[str(source or SOURCES[device])],
            extra_cflags=list(CPU_FLAGS) if device == "cpu" else ["-O3"],
            extra_cuda_cflags=[*CUDA_FLAGS, *(["-Xptxas=-v"] if verbose else [])],
            extra_ldflags=link_flags,
            build_directory=str(folder),
            is_python_module=False,
            verbose=verbose,
        )
        built = next(folder.glob(f"{target.stem}*{target.suffix}"))  # a second build has _v1 in its name
        built.chmod(0o755)
        digest = folder / "digest"
        digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
        os.replace(digest, target.with_suffix(".sha256"))
        os.replace(built, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target
