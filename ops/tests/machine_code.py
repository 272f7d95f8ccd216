"""The listings of machine code that NVIDIA's cuobjdump makes."""

import subprocess
from pathlib import Path


def cuobjdump() -> Path | None:
    """The program that lists machine code, from Triton."""
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


def listing(file: Path) -> tuple[str, str]:
    """Of a cubin: what its kernels use, and their machine code."""
    commands = ([cuobjdump(), option, file] for option in ("-res-usage", "-sass"))
    resources, code = (subprocess.run(x, capture_output=True, text=True, check=True).stdout for x in commands)
    return resources, code
