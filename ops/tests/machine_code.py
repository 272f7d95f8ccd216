"""Machine code as listed by NVIDIA's cuobjdump."""

import subprocess
from pathlib import Path


def cuobjdump() -> Path | None:
    """The cuobjdump that comes with Triton, if any."""
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


def listing(file: Path) -> tuple[str, str]:
    """Resource usage and machine code of the kernels in a cubin."""

    def output(option: str) -> str:
        return subprocess.run([cuobjdump(), option, file], capture_output=True, text=True, check=True).stdout

    return output("-res-usage"), output("-sass")
