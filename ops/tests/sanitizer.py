"""Environment for libraries that are compiled with AddressSanitizer."""

import os
import subprocess


def address_sanitizer(compiler: str) -> dict[str, str]:
    """Environment variables for a process; empty if the compiler has no AddressSanitizer."""
    # PyTorch's C++ exceptions need the C++ library to be there before the sanitizer
    names = ("libasan.so", "libstdc++.so.6")
    found = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    if not os.path.isabs(found[0]):
        return {}
    return {"LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1"}
